"""ProximalStep with Accelerate, without a callback: prepared models and optimizers, saving and resuming."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, TensorDataset

import compaware_kernels as ck
from tests.helpers.trainer_cases import EPOCHS, STRENGTHS, images, network, optimizer_of, plain_loop, same, same_state


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def prepared(every, strengths=STRENGTHS, schedule=None, scaler=None, **options):
    """Accelerator, prepared model, optimizer and loader, ProximalStep, prepared schedules."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, **options)
    accelerator.scaler = scaler
    model = network()
    optimizer = optimizer_of(model)
    loader = DataLoader(TensorDataset(*images()), 32)
    extras = [] if schedule is None else [schedule(optimizer)]
    model, optimizer, loader, *extras = accelerator.prepare(model, optimizer, loader, *extras)
    prox = ck.ProximalStep(model, optimizer, every=every, **strengths)
    accelerator.register_for_checkpointing(prox)
    return accelerator, model, optimizer, loader, prox, extras


def epoch(accelerator, model, optimizer, loader, prox, extras, *, clip=0.0, scale=None, save=None, skipped=0):
    """One epoch, as in the training loop of Accelerate's documentation."""
    for i, (x, y) in enumerate(loader, skipped):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss * scale(i) if scale else loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if save:
            save(i + 1)
    if prox.every == "epoch":
        prox.step()
    for schedule in extras:
        schedule.step()


@pytest.mark.parametrize("every", ["epoch", 2])
@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 4}, {"accumulate": 4, "clip": 0.1}),
        ({"mixed_precision": "bf16"}, {"dtype": torch.bfloat16}),
    ],
    ids=["plain", "accumulated", "bf16"],
)
def test_same_weights_as_a_plain_loop(every, options, loop):
    parts = prepared(every, **options)
    for _ in range(EPOCHS):
        epoch(*parts, clip=loop.get("clip", 0.0))
    plain = network()
    prox = ck.ProximalStep(plain, optimizer_of(plain), every=every, **STRENGTHS)
    plain_loop(plain, prox, **loop)
    assert same(parts[1], plain) and not same(network(), plain)
    assert same_state(parts[4], prox) and prox.applied > 0


def test_steps_that_the_scaler_skips_do_not_count():
    parts = prepared(1, {"nuclear": 1.0}, scaler=torch.amp.GradScaler("cpu"))
    epoch(*parts, scale=lambda i: torch.inf if i == 2 else 1.0)
    assert parts[4].steps == parts[4].applied == 5


def test_thresholds_follow_the_prepared_schedule():
    parts = prepared("epoch", {"l1": 1.0}, halving)
    epoch(*parts)
    assert {name: by["l1"] for name, by in parts[4].thresholds().items()} == {"0": 0.0025, "2": 0.01, "4": 0.01}


@pytest.mark.parametrize("every", [3, "epoch"])
def test_resuming_is_bitwise_identical_to_not_stopping(every, tmp_path):
    """From a checkpoint in the middle of the second epoch, and from one at its end."""
    whole = prepared(every, schedule=halving)
    save = whole[0].save_state
    epoch(*whole)
    epoch(*whole, save=lambda i: save(tmp_path / "middle") if i == 4 else None)
    save(tmp_path / "end")
    epoch(*whole)
    for place, skipped in (("middle", 4), ("end", 0)):
        parts = prepared(every, schedule=halving)
        accelerator, model, optimizer, loader, prox, extras = parts
        accelerator.load_state(tmp_path / place)
        if skipped:
            rest = accelerator.skip_first_batches(loader, skipped)
            epoch(accelerator, model, optimizer, rest, prox, extras, skipped=skipped)
        epoch(*parts)
        assert same(whole[1], model) and same_state(whole[4], prox), place
        assert prox.applied == EPOCHS * (1 if every == "epoch" else 2)
