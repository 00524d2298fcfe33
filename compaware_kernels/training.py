"""ProximalStep: the proximal operators attached to any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import prox
from .factorize import singular_values
from .folds import Layer, foldable_layers, require_matches, row_axes
from .ranks import numerical_rank
from .state import WarmState
from .tables import text_table

Strength = float | Mapping[str, float]
PENALTIES = ("nuclear", "group", "l1")


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer now: its rank and spectrum under the fold (over groups: largest rank, summed sigma)."""

    name: str
    shape: tuple[int, ...]  # of the folded weight, [G, m, n]
    rank: int
    full_rank: int
    sigma_sum: float  # nuclear norm
    sigma_max: float
    rows_alive: float  # share of neurons with a weight other than zero
    thresholds: dict[str, float]  # used by the last proximal step


class ProximalReport(list):
    """A list of :class:`LayerSpectrum`; ``str(report)`` is a table."""

    def __str__(self) -> str:
        rows = [(r.name, "x".join(map(str, r.shape[-2:])), f"{r.rank}/{r.full_rank}", f"{r.sigma_sum:.4g}",
                 f"{r.sigma_max:.4g}", f"{r.rows_alive:.0%}") for r in self]  # fmt: skip
        return text_table(("layer", "matrix", "rank", "sum sigma", "max sigma", "rows alive"), rows, right=range(1, 6))


class ProximalStep:
    """Compression-aware training: after the optimizer has moved the weights, shrink them towards low rank and few rows.

    Minimises ``loss + sum_l nuclear_l ||W_l||_* + group_l sum_n sqrt(P_l) ||w_l^n||_2 + l1_l ||W_l||_1`` by alternating
    the optimizer's steps on the loss with proximal steps on the penalties (applied in turn):

        ``W <- prox(W, t * strength * ramp)``

    with t the learning rate that W's parameter group has now (or 1), and ramp the warm-up factor. A neuron's group is
    its weights and its bias, ``P_l`` their number. With plain SGD this is the proximal gradient method of the source;
    with momentum or an adaptive optimizer the step is decoupled from its metric, as weight decay is in AdamW.

    Args:
        model: its Linear layers and (transposed) convolutions are treated; the rest is listed in ``skipped``.
        optimizer: any torch optimizer over the model's parameters. Parameters it does not hold, and frozen ones, are
            left alone.
        nuclear, group, l1: strengths >= 0 of the three penalties: one number, or numbers by layer name pattern
            (``{"features.*": 0.1, "head": 0.0}``, first match wins, no match is 0).
        every: ``"epoch"``: you call :meth:`step` at the end of each epoch, as in the paper. An int k: a proximal step
            runs by itself after every k optimizer steps. The strength is per proximal step: more steps shrink more.
        scale_by_lr: multiply by the current learning rate (the proximal gradient method) or not.
        order: the order of the penalties. L1 after nuclear can raise the rank again; scaling rows cannot.
        fold: how convolutions become matrices for the nuclear norm, see :mod:`compaware_kernels.folds`.
        skip: name patterns of layers to leave alone.
        warmup: the thresholds of the first ``warmup`` proximal steps grow linearly to their full size.

    Attributes:
        layers: the layers treated.  skipped: name -> reason for all others that have weights.
        steps: optimizer steps seen.  applied: proximal steps taken.
        warm: what the nuclear prox remembers of each layer, see :class:`WarmState`.

    Raises:
        ValueError: negative or infinite strength, unknown fold or order, every < 1, a pattern that matches no layer,
            a model none of whose foldable layers is trained by the optimizer.

    Source: Alvarez & Salzmann, NIPS 2017 (arXiv 1711.02638), section 3; NIPS 2016 for the group term.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        nuclear: Strength = 0.0,
        group: Strength = 0.0,
        l1: Strength = 0.0,
        every: int | str = "epoch",
        scale_by_lr: bool = True,
        order: Sequence[str] = PENALTIES,
        fold: str = "paper",
        skip: Sequence[str] = (),
        warmup: int = 0,
    ):
        if not (every == "epoch" or (isinstance(every, int) and every >= 1)):
            raise ValueError(f"every must be 'epoch' or a number of optimizer steps >= 1; got {every!r}")
        if sorted(order) != sorted(PENALTIES):
            raise ValueError(f"order must hold {', '.join(PENALTIES)}, each once; got {tuple(order)}")
        if not (isinstance(warmup, int) and warmup >= 0):
            raise ValueError(f"warmup must be a number of proximal steps >= 0; got {warmup!r}")
        row_axes(fold, 2)
        self.optimizer, self.every, self.scale_by_lr = optimizer, every, scale_by_lr
        self.order, self.fold, self.warmup = tuple(order), fold, warmup
        self.layers, self.skipped = foldable_layers(model, skip)
        names = [layer.name for layer in self.layers]
        self.strengths = {
            name: {
                penalty: _strength(spec, name, penalty)
                for penalty, spec in zip(PENALTIES, (nuclear, group, l1), strict=True)
            }
            for name in names
        }
        for penalty, spec in zip(PENALTIES, (nuclear, group, l1), strict=True):
            require_matches(list(spec) if isinstance(spec, Mapping) else [], names, penalty)
        if not self._trained():
            raise ValueError(
                "the optimizer holds no weight of a Linear or convolution of this model: nothing to shrink"
            )
        self.steps = self.applied = 0
        self.warm = WarmState()
        self._hook = optimizer.register_step_post_hook(self._after_optimizer_step)

    def _after_optimizer_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.steps += 1
        if self.every != "epoch" and self.steps % self.every == 0:
            self.step()

    def remove(self) -> None:
        """Detach from the optimizer: no proximal step runs by itself any more."""
        self._hook.remove()

    @torch.no_grad()
    def step(self) -> None:
        """Take one proximal step now, on every layer.

        All or nothing: on an error (NaN or Inf in a weight: ValueError with the layer's name) no weight is changed.
        """
        layers = self._trained()
        ramp = min(1.0, (self.applied + 1) / (self.warmup + 1))
        taus = [self._thresholds(layer, lr, ramp) for layer, lr in layers]
        targets = [(layer, layer.module.bias) for layer, _ in layers]
        copies = [[layer.rows.detach().clone(), None if bias is None else bias.detach().clone()]
                  for layer, bias in targets]  # fmt: skip
        for penalty in self.order:
            used = [i for i, tau in enumerate(taus) if tau[penalty] > 0]
            shrink = {"nuclear": self._nuclear, "group": _group, "l1": _l1}[penalty]
            shrink([layers[i][0] for i in used], [copies[i] for i in used], [taus[i][penalty] for i in used])
        for (layer, bias), (W, b) in zip(targets, copies, strict=True):
            layer.set_rows(W)
            if bias is not None:
                bias.copy_(b)
        self.applied += 1

    def thresholds(self) -> dict[str, dict[str, float]]:
        """What the next proximal step will subtract, per layer and penalty."""
        ramp = min(1.0, (self.applied + 1) / (self.warmup + 1))
        return {layer.name: self._thresholds(layer, lr, ramp) for layer, lr in self._trained()}

    def _thresholds(self, layer: Layer, lr: float, ramp: float) -> dict[str, float]:
        """Strength x learning rate x ramp; for the group term also x sqrt(P), P the parameters of one neuron."""
        per_neuron = layer.rows[0].numel() + (layer.module.bias is not None)
        scale = {"nuclear": 1.0, "group": math.sqrt(per_neuron), "l1": 1.0}
        step = ramp * (lr if self.scale_by_lr else 1.0)
        return {penalty: value * step * scale[penalty] for penalty, value in self.strengths[layer.name].items()}

    def _trained(self) -> list[tuple[Layer, float]]:
        """The layers whose weights the optimizer holds and trains now, with their learning rates."""
        lr = {id(p): float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
        trained = [layer for layer in self.layers if layer.weight.requires_grad and id(layer.weight) in lr]
        return [(layer, lr[id(layer.weight)]) for layer in trained]

    def _nuclear(self, layers: list[Layer], copies: list[list[Tensor | None]], taus: list[float]) -> None:
        groups, names = [layer.groups for layer in layers], [layer.name for layer in layers]
        prox.svt_([weight for weight, _ in copies], taus, state=self.warm, fold=self.fold, groups=groups, names=names)

    @torch.no_grad()
    def report(self) -> ProximalReport:
        """Rank, sum and largest of the singular values, and share of live rows, of every layer now.

        A singular value counts in the rank when it stands out of the rounding of the weight's dtype
        (:func:`compaware_kernels.ranks.numerical_rank`). Costs one set of singular values per layer.
        """
        thresholds = self.thresholds()
        report = ProximalReport()
        for layer in self.layers:
            M, s = layer.matrix(self.fold), singular_values(layer.matrix(self.fold))
            alive = layer.rows.flatten(1).any(1).double().mean().item()
            rank = int(numerical_rank(s, M.dtype).max())
            sums = (float(s.sum()), float(s.max()), alive)
            report.append(
                LayerSpectrum(layer.name, tuple(M.shape), rank, s.shape[-1], *sums, thresholds.get(layer.name, {}))
            )
        return report

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model and the optimizer to go on as if nothing had happened."""
        return {"steps": self.steps, "applied": self.applied, "warm": self.warm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.  Raises ValueError for anything else, and then changes nothing."""
        wanted = self.state_dict().keys()
        if (
            not isinstance(state, Mapping)
            or state.keys() != wanted
            or any(not isinstance(state[key], int) for key in ("steps", "applied"))
        ):
            raise ValueError(f"wanted a ProximalStep state with {', '.join(wanted)}; got {state!r:.200}")
        self.warm.load_state_dict(state["warm"])
        self.steps, self.applied = state["steps"], state["applied"]


def _group(layers: list[Layer], copies: list[list[Tensor | None]], taus: list[float]) -> None:
    """Group lasso over neurons [weights, bias]; the shrunk rows go back to both."""
    rows = [
        weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
        for weight, bias in copies
    ]
    prox.group_shrink_(rows, taus, names=[layer.name for layer in layers])
    for (weight, bias), row in zip(copies, rows, strict=True):
        weight.copy_(row[:, : weight[0].numel()].reshape(weight.shape))
        if bias is not None:
            bias.copy_(row[:, -1])


def _l1(layers: list[Layer], copies: list[list[Tensor | None]], taus: list[float]) -> None:
    prox.soft_threshold_([weight for weight, _ in copies], taus, names=[layer.name for layer in layers])


def _strength(spec: Strength, name: str, penalty: str) -> float:
    """The strength of one layer, from one number or from a mapping of name patterns."""
    value = (
        next((v for pattern, v in spec.items() if fnmatchcase(name, pattern)), 0.0)
        if isinstance(spec, Mapping)
        else spec
    )
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{penalty}: wanted a finite strength >= 0; got {value!r} for {name}")
    return float(value)
