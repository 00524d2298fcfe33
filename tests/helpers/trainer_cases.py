"""A small network, six batches of digits, and the plain training loop to which trainers are compared bit for bit."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from compaware_kernels.study.images import digits

STRENGTHS = {"nuclear": 4.0, "group": 0.2, "warmup": 2}
EPOCHS = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10))


def optimizer_of(model):
    """SGD with two parameter groups: the first layer has a smaller learning rate."""
    first, *rest = model.parameters()
    return torch.optim.Adam([{"params": [first], "lr": 0.005}, {"params": rest}], lr=0.02)


def images(number=192):
    data = digits()
    return data.train_x.flatten(1)[:number], data.train_y[:number]


def batches():
    return list(zip(*(part.split(32) for part in images()), strict=True))


def plain_loop(model, prox, *, accumulate=1, shares=None, dtype=None, clip=0.0, schedule=None):
    """Reference training loop.

    shares: by what the losses of one epoch are divided; schedule: learning-rate scheduler, stepped after every epoch.
    """
    data = batches()
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(data, 1):
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                loss = F.cross_entropy(model(x), y)
            (loss / (shares[i - 1] if shares else accumulate)).backward()
            if i % accumulate == 0 or i == len(data):
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                prox.optimizer.step()
                prox.optimizer.zero_grad()
        if schedule:
            schedule.step()
        if prox.every == "epoch":
            prox.step()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def same_state(one, other):
    """Whether two ProximalStep have equal states."""
    leaves, others = tree_leaves(one.state_dict()), tree_leaves(other.state_dict())
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )


def scalars_of(folder):
    """tag -> [(step, value)] of the TensorBoard event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    return found
