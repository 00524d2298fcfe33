"""Training loop with checkpoints: an interrupted run resumes where it stopped; fine-tuning and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ranks
from .._utils.atomic_write import atomic_write
from ..compression import checkpoint
from ..nn.discovery import foldable_layers
from ..nn.factorization import singular_values
from .arms import ARMS, Arm, Plan
from .config import Config, Key
from .data import Batches, Source
from .networks import build, last_layers

__all__ = ["Diverged", "Trained", "accuracy", "fit", "require_finite", "tune"]

SAVE_EVERY = 5.0  # seconds, at the end of an epoch


class Diverged(ValueError):
    """The loss or a weight became NaN or Inf."""


@dataclass
class Trained:
    """Training state: network, arm, optimizer, and the history after every epoch."""

    model: nn.Module
    arm: Arm
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # the next one
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)  # that are not zero


def fit(config: Config, key: Key, data: Source, folder: Path, advance: Callable[[], None]) -> Trained:
    """Train the run ``key``, resuming from the checkpoint in ``folder`` if there is one; the final one stays there.

    ``advance`` is called once for every epoch of training, those done earlier included.

    Raises:
        Diverged: the loss or a weight became NaN or Inf.
    """
    run = _start(config, key, data, folder)
    for _ in range(run.epoch):
        advance()
    saved = time.monotonic()
    while run.epoch < config.epochs:
        started = time.process_time()
        try:
            _epoch(run, config, key, data)
        except Diverged:
            raise
        except torch.linalg.LinAlgError as error:
            raise Diverged(str(error)) from error
        except ValueError:  # raised by a proximal step if a weight is NaN or Inf
            require_finite(run.model)
            raise
        run.seconds += time.process_time() - started
        _record_ranks(run)
        if time.monotonic() - saved >= SAVE_EVERY or run.epoch == config.epochs:
            _save(run, folder)
            saved = time.monotonic()
        advance()
    return run


def tune(model: nn.Module, data: Source, config: Config, seed: int, masks: Mapping[str, Tensor] | None = None) -> None:
    """Fine-tune a compressed network without penalty; weights where ``masks`` is False stay zero.

    Raises:
        Diverged: the network is unusable.
    """
    optimizer = torch.optim.SGD(model.parameters(), config.tune_lr, config.momentum)
    layers = [layer for layer in foldable_layers(model)[0] if layer.name in (masks or {})]
    steps = math.ceil(data.examples / config.batch)
    model.train()
    for epoch in range(config.tune_epochs):
        for i, (x, y) in enumerate(data.train(config.batch, seed, epoch)):
            _set_rate(optimizer, config.tune_lr, epoch + i / steps, config.tune_epochs)
            _backward(model, optimizer, x, y, config.amp)
            optimizer.step()
            with torch.no_grad():
                for layer in layers:
                    layer.weight.mul_(masks[layer.name])
    require_finite(model)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Accuracy in per cent."""
    model.eval()
    right = count = 0
    for x, y in batches:
        right += int((model(x).argmax(1) == y).sum())
        count += len(y)
    return 100 * right / count


def _start(config: Config, key: Key, data: Source, folder: Path) -> Trained:
    example = data.example(1)
    model = build(config.network, data.shape, data.classes, key.seed, config.weights).to(example.device)
    steps = math.ceil(data.examples / config.batch)
    plan = Plan(config.epochs, steps, data.examples, key.seed, last_layers(model), example)
    arm = ARMS[key.arm](dict(key.strength), plan)
    path = folder / "state.pt"
    state = torch.load(path, weights_only=True, map_location=example.device) if path.is_file() else None
    if state is None or not (folder / state["model"]).is_file():
        model = arm.prepare(model)
        run = Trained(model, arm, _optimizer(model, arm, config))
        arm.attach(run.model, run.optimizer, 0)
        return run
    model = checkpoint.load(folder / state["model"], model, verify=False).to(example.device)
    run = Trained(model, arm, _optimizer(model, arm, config), **state["run"])
    arm.attach(model, run.optimizer, run.epoch)
    run.optimizer.load_state_dict(state["optimizer"])
    arm.load_state_dict(state["arm"])
    return run


def _save(run: Trained, folder: Path) -> None:
    """Write the weights, then the state that names them: an interruption in between keeps the earlier checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{run.epoch}.safetensors"
    checkpoint.save(run.model, folder / name, verify=False)  # a diverged one, too
    about = {k: getattr(run, k) for k in ("epoch", "seconds", "losses", "ranks", "rows")}
    state = {"model": name, "run": about, "optimizer": run.optimizer.state_dict(), "arm": run.arm.state_dict()}
    with atomic_write(folder / "state.pt") as new:
        torch.save(state, new)
    for other in folder.glob("*.safetensors"):
        if other.name != name:
            other.unlink()


def _epoch(run: Trained, config: Config, key: Key, data: Source) -> None:
    total, arm = 0.0, run.arm
    _set_rate(run.optimizer, config.lr, run.epoch, config.epochs)
    run.model.train()
    for x, y in data.train(config.batch, key.seed, run.epoch):
        arm.before()
        loss = _backward(run.model, run.optimizer, x, y, config.amp)
        arm.after_backward()
        run.optimizer.step()
        arm.after_step()
        total += loss * len(x)
    run.losses.append(total / data.examples)
    model = arm.after_epoch(run.model, run.epoch)
    run.epoch += 1
    if model is not run.model:
        run.model, run.optimizer = model, _optimizer(model, arm, config)
        arm.attach(model, run.optimizer, run.epoch)


def _backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, amp: bool) -> float:
    optimizer.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    if not math.isfinite(value := loss.item()):
        raise Diverged(f"the loss became {value}")
    return value


def _optimizer(model: nn.Module, arm: Arm, config: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), config.lr, config.momentum, **arm.options())


def _set_rate(optimizer: torch.optim.Optimizer, lr: float, epoch: float, epochs: int) -> None:
    """Cosine learning rate schedule, by epochs in training, by steps in fine-tuning (which may last one epoch)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2


@torch.no_grad()
def _record_ranks(run: Trained) -> None:
    """Append the current rank and number of nonzero rows of every layer to the history."""
    require_finite(run.model)
    for layer in foldable_layers(run.model)[0]:
        s = singular_values(layer.matrix())
        run.ranks.setdefault(layer.name, []).append(int(ranks.numerical_rank(s, layer.weight.dtype).max()))
        run.rows.setdefault(layer.name, []).append(int(layer.rows.flatten(1).any(1).sum()))


def require_finite(model: nn.Module) -> None:
    """Raise Diverged, naming the parameter, if one contains NaN or Inf."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise Diverged(f"{name} contains NaN or Inf")
