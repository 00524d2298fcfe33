"""ProximalStep: the proximal operators attached to any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import prox
from .folds import Layer, foldable_layers, require_matches, row_axes, to_matrix
from .spectra import ProximalReport, spectrum
from .state import WarmState
from .wrappers import unwrapped, unwrapped_optimizer

Strength = float | Mapping[str, float]
PENALTIES = ("nuclear", "group", "l1")


class ProximalStep:
    """Compression-aware training: after the optimizer has moved the weights, shrink them towards low rank and few rows.

    Minimises ``loss + sum_l nuclear_l ||W_l||_* + group_l sum_n sqrt(P_l) ||w_l^n||_2 + l1_l ||W_l||_1`` by alternating
    the optimizer's steps on the loss with proximal steps on the penalties (applied in turn):

        ``W <- prox(W, t * strength * ramp)``

    with t the learning rate that W's parameter group has now (or 1), and ramp the warm-up factor. A neuron's group is
    its weights and its bias, ``P_l`` their number. With plain SGD this is the proximal gradient method of the source;
    with momentum or an adaptive optimizer the step is decoupled from its metric, as weight decay is in AdamW.

    Args:
        model: its Linear layers and (transposed) convolutions are treated; the rest is listed in ``skipped``. A weight
            that several layers share is shrunk once; a parametrized one through its parametrization's right inverse.
            What torch.compile, DistributedDataParallel or AveragedModel wrapped around the model is looked through.
        optimizer: any torch optimizer over the model's parameters. Parameters it does not hold, and frozen ones, are
            left alone. Steps that a GradScaler skips do not count.
        nuclear, group, l1: strengths >= 0 of the three penalties: one number, or numbers by layer name pattern
            (``{"features.*": 0.1, "head": 0.0}``, first match wins, no match is 0).
        every: ``"epoch"``: you call :meth:`step` at the end of each epoch, as in the paper. An int k: a proximal step
            runs by itself after every k optimizer steps. The strength is per proximal step: more steps shrink more.
        scale_by_lr: multiply by the current learning rate (the proximal gradient method) or not.
        order: the order of the penalties. L1 after nuclear can raise the rank again; scaling rows cannot.
        fold: how convolutions become matrices for the nuclear norm, see :mod:`compaware_kernels.folds`.
        skip: name patterns of layers to leave alone.
        warmup: the thresholds of the first ``warmup`` proximal steps grow linearly to their full size.
        center: a model of the same architecture, with weights C: the penalty is ``nuclear_l ||W_l - C_l||_*``, so that
            fine-tuning learns the rank of its update (see :func:`export_lora`). The report is then that of ``W - C``.

    Attributes:
        layers: the layers treated.  skipped: name -> reason for all others that have weights.
        steps: optimizer steps seen.  applied: proximal steps taken.
        warm: what the nuclear prox remembers of each layer, see :class:`WarmState`.

    Raises:
        ValueError: negative or infinite strength, unknown fold or order, every < 1, a pattern that matches no layer,
            a model none of whose foldable layers is trained by the optimizer, a center of another architecture or
            together with ``group`` or ``l1``.

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
        center: nn.Module | None = None,
    ):
        if not (every == "epoch" or (isinstance(every, int) and every >= 1)):
            raise ValueError(f"every must be 'epoch' or a number of optimizer steps >= 1; got {every!r}")
        if sorted(order) != sorted(PENALTIES):
            raise ValueError(f"order must hold {', '.join(PENALTIES)}, each once; got {tuple(order)}")
        if not (isinstance(warmup, int) and warmup >= 0):
            raise ValueError(f"warmup must be a number of proximal steps >= 0; got {warmup!r}")
        row_axes(fold, 2)
        self.optimizer, self.every, self.scale_by_lr = unwrapped_optimizer(optimizer), every, scale_by_lr
        self.order, self.fold, self.warmup = tuple(order), fold, warmup
        self.layers, self.skipped = foldable_layers(unwrapped(model), skip, training=True)
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
        self.centers = None if center is None else _centers(center, self.layers, self.strengths)
        self.steps = self.applied = 0
        self.warm = WarmState()
        self._hook = self.optimizer.register_step_post_hook(self._after_optimizer_step)

    @torch.compiler.disable
    def _after_optimizer_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        overflow = getattr(
            optimizer, "found_inf", None
        )  # a GradScaler lets fused optimizers skip their steps themselves
        if overflow is not None and bool(overflow):
            return
        self.steps += 1
        if self.every != "epoch" and self.steps % self.every == 0:
            self.step()

    def remove(self) -> None:
        """Detach from the optimizer: no proximal step runs by itself any more."""
        self._hook.remove()

    @torch.no_grad()
    def step(self) -> None:
        """Take one proximal step now, on every layer.

        All or nothing: on an error no weight is changed.

        Raises:
            ValueError: NaN or Inf in a weight, or a parametrization that cannot hold the result, with the layer's name.
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
        _write(targets, copies)
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
        lr = {
            id(p): float(group["lr"])
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        }
        found = ((layer, [lr[id(p)] for p in layer.parameters if id(p) in lr]) for layer in self.layers)
        return [(layer, rates[0]) for layer, rates in found if rates]

    def _nuclear(self, layers: list[Layer], copies: list[list[Tensor | None]], taus: list[float]) -> None:
        groups, names = [layer.groups for layer in layers], [layer.name for layer in layers]
        centers = (
            None
            if self.centers is None
            else [self.centers[name].rows.to(copy) for name, (copy, _) in zip(names, copies, strict=True)]
        )
        weights = [weight for weight, _ in copies]
        prox.svt_(weights, taus, state=self.warm, center=centers, fold=self.fold, groups=groups, names=names)

    @torch.no_grad()
    def report(self) -> ProximalReport:
        """Rank, sum and largest of the singular values, and share of live rows, of every layer now.

        A singular value counts in the rank when it stands out of the rounding of the weight's dtype
        (:func:`compaware_kernels.ranks.numerical_rank`). Costs one set of singular values per layer.
        """
        thresholds = self.thresholds()
        report = ProximalReport()
        for layer in self.layers:
            rows = layer.rows if self.centers is None else layer.rows - self.centers[layer.name].rows.to(layer.weight)
            M = to_matrix(rows, self.fold, layer.groups)
            report.append(spectrum(layer.name, M, rows, layer.weight.dtype, thresholds.get(layer.name, {})))
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


def _write(targets: list[tuple[Layer, Tensor | None]], copies: list[list[Tensor | None]]) -> None:
    """Put the copies in the weights and biases. Parametrizations may refuse: they come first, and can be undone."""
    undo = [(p, p.detach().clone()) for layer, _ in targets if layer.is_parametrized for p in layer.parameters]
    pairs = sorted(zip(targets, copies, strict=True), key=lambda pair: not pair[0][0].is_parametrized)
    try:
        for (layer, _), (W, _) in pairs:
            layer.set_rows(W)
    except ValueError:
        for p, old in undo:
            p.copy_(old)
        raise
    for (_, bias), (_, b) in pairs:
        if bias is not None:
            bias.copy_(b)


def _centers(center: nn.Module, layers: list[Layer], strengths: Mapping[str, Mapping[str, float]]) -> dict[str, Layer]:
    """The layers of ``center`` by the names of the model's."""
    if any(by["group"] or by["l1"] for by in strengths.values()):
        raise ValueError("center: only the nuclear penalty can be centered; wanted group = l1 = 0")
    found = {layer.name: layer for layer in foldable_layers(unwrapped(center), training=True)[0]}
    for layer in layers:
        other = found.get(layer.name)
        if other is None or other.weight.shape != layer.weight.shape:
            got = "none" if other is None else list(other.weight.shape)
            raise ValueError(f"center: wanted a weight {list(layer.weight.shape)} for {layer.name}; got {got}")
        if any(p is q for p in layer.parameters for q in other.parameters):
            raise ValueError(f"center: {layer.name} is the same weight there; wanted a copy made before training")
    return found


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
