"""The penalties that ProximalStep knows: keyword, proximal operator, scale, default order.

To add one: a class (or, for a penalty on singular values, an instance of :class:`SpectralPenalty`) in
:data:`PENALTIES`, and its keyword in :class:`.proximal_step.ProximalStep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.validation import check_all_finite
from ..proximal import shrinkage, solver
from ..proximal.cuda import backend as gpu
from ..proximal.cuda.finite_guard import Guard
from ..proximal.spectral_functions import FirmThreshold, SoftThreshold, Spectral
from ..proximal.warm_state import WarmState
from .layer_record import LayerRecord

TOL = 1e-3  # of the solver, relative to the threshold: that of ck.svt_


@dataclass(frozen=True)
class Settings:
    """What holds for every proximal step: the order of the penalties, and their parameters beside the strength."""

    order: tuple[str, ...]
    gamma: float = 3.0  # of the firm threshold


@dataclass(frozen=True)
class Step:
    """What the penalties of one proximal step share."""

    warm: WarmState
    settings: Settings
    guard: Guard | None = None  # of weights on a GPU, which elementwise operators need

    def send(self, tau: Tensor) -> Tensor:
        """Thresholds as the elementwise operators take them: 0 where a weight on the GPU is not finite."""
        return self.guard.thresholds(tau) if self.guard else tau


@dataclass(frozen=True)
class SpectralPenalty:
    """A penalty on the singular values of a layer's folded weight, by what its proximal operator does to them."""

    name: str
    function: Callable[[float, Settings], Spectral]  # of the threshold
    with_bias = False  # whether a neuron's bias belongs to what is shrunk
    can_be_centered = True  # whether it may act on W - C
    guards_itself = True  # whether NaN and Inf on a GPU are found without a Guard

    def scale(self, parameters: int) -> float:
        """The threshold per unit of strength; parameters: of one neuron."""
        return 1.0

    def prox_(self, records: Sequence[LayerRecord], taus: Sequence[float], step: Step) -> None:
        """Apply the proximal operator to every record, in place."""
        solver.shrink_(records, [self.function(tau, step.settings) for tau in taus], tol=TOL, state=step.warm)


class GroupLasso:
    """``sum_n sqrt(P) ||w_n||_2`` over the neurons, each its weights and its bias: P parameters."""

    name = "group"
    with_bias, can_be_centered, guards_itself = True, False, False

    def scale(self, parameters: int) -> float:
        return math.sqrt(parameters)

    def prox_(self, records: Sequence[LayerRecord], taus: Sequence[float], step: Step) -> None:
        shrinkage.shrink_neurons_(records, torch.tensor(taus, dtype=torch.float64), step.send)


class L1:
    """``||W||_1``: the sum of absolute values."""

    name = "l1"
    with_bias, can_be_centered, guards_itself = False, False, False

    def scale(self, parameters: int) -> float:
        return 1.0

    def prox_(self, records: Sequence[LayerRecord], taus: Sequence[float], step: Step) -> None:
        taus = step.send(torch.tensor(taus, dtype=torch.float64))
        shrinkage.shrink_elements_([record.weight for record in records], taus)


Penalty = SpectralPenalty | GroupLasso | L1
# In the default order: L1 after the nuclear norm can raise the rank again, scaling rows cannot.
PENALTIES: dict[str, Penalty] = {
    penalty.name: penalty
    for penalty in (
        SpectralPenalty("nuclear", lambda tau, _: SoftThreshold(tau)),
        SpectralPenalty("firm", lambda tau, settings: FirmThreshold(tau, settings.gamma)),
        GroupLasso(),
        L1(),
    )
}


def thresholds(strengths: Mapping[str, float], step: float, parameters: int) -> dict[str, float]:
    """Strength x step x the penalty's scale, by penalty; parameters: of one neuron."""
    return {name: value * step * PENALTIES[name].scale(parameters) for name, value in strengths.items()}


def shrink(records: Sequence[LayerRecord], settings: Settings, warm: WarmState) -> None:
    """Apply the penalties in turn to the records, in place."""
    step = Step(warm, settings, _guard(records, warm))
    for penalty in (PENALTIES[name] for name in settings.order):
        used = [record for record in records if penalty.name in record.taus]
        if used:
            penalty.prox_(used, [record.taus[penalty.name] for record in used], step)
    if step.guard:
        step.guard.all_finite = None


def _guard(records: Sequence[LayerRecord], warm: WarmState) -> Guard | None:
    """Of all penalties on one GPU, unless all of them guard themselves."""
    parts = [(part, record.label) for record in records if record.in_place for part in record.results]
    if not parts or all(PENALTIES[name].guards_itself for record in records for name in record.taus):
        return None
    weights, names = map(list, zip(*parts, strict=True))
    if len({W.device for W in weights}) == 1 and all(record.in_place for record in records):
        return gpu.guard(warm, weights, names)
    check_all_finite(weights, names)  # of several devices: waits for them
    return None
