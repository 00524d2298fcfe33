"""Registry of the penalties of ProximalStep: keyword, proximal operator, scale, default order.

To add one, add a class (or, for a penalty on singular values, an instance of :class:`SpectralPenalty`) to
:data:`PENALTIES`, and its keyword to :class:`.proximal_step.ProximalStep`.
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
from ..proximal.error_feedback import spectrum_size, warn_if_rounded_away
from ..proximal.spectral_functions import FirmThreshold, SoftThreshold, Spectral
from ..proximal.warm_state import WarmState
from .layer_record import LayerRecord

__all__ = ["PENALTIES", "Settings", "SpectralPenalty", "Step", "shrink", "thresholds"]

TOL = 1e-3  # of the solver, relative to the threshold; the default of ck.svt_


@dataclass(frozen=True)
class Settings:
    """Settings of all proximal steps: order of the penalties, and their parameters besides the strength."""

    order: tuple[str, ...]
    gamma: float = 3.0  # of the firm threshold


@dataclass(frozen=True)
class Step:
    """Context of one proximal step, shared by its penalties."""

    warm: WarmState
    settings: Settings
    guard: Guard | None = None  # finite check of weights on a GPU, for operators that have none of their own

    def guarded(self, tau: Tensor) -> Tensor:
        """Thresholds ``[L]``, all 0 (so that nothing changes) if a weight on the GPU is not finite.

        Args:
            tau: fp64 on the CPU; the result is on the GPU if there is a guard.
        """
        return self.guard.thresholds(tau) if self.guard else tau


@dataclass(frozen=True)
class SpectralPenalty:
    """A penalty on the singular values of a layer's folded weight, defined by its proximal operator."""

    name: str
    function: Callable[[float, Settings], Spectral]  # threshold -> function of the singular values
    with_bias = False  # whether a neuron's bias is shrunk together with its weights
    can_be_centered = True  # whether it may act on W - C
    guards_itself = True  # whether the operator finds NaN and Inf on a GPU without a Guard

    def scale(self, parameters: int) -> float:
        """Threshold per unit of strength, for neurons of so many parameters."""
        return 1.0

    def count(self, record: LayerRecord) -> int:
        """How many numbers of a weight are shrunk by the threshold."""
        return spectrum_size(record)

    def prox_(self, records: Sequence[LayerRecord], taus: Sequence[float], step: Step) -> None:
        """Apply the proximal operator to every record, in place; taus: threshold by record."""
        solver.shrink_(records, [self.function(tau, step.settings) for tau in taus], tol=TOL, state=step.warm)


class GroupLasso:
    """Group lasso ``sum_n sqrt(P) ||w_n||_2`` over the neurons n, w_n [P] the weights and the bias of one."""

    name = "group"
    with_bias, can_be_centered, guards_itself = True, False, False

    def scale(self, parameters: int) -> float:
        return math.sqrt(parameters)

    def count(self, record: LayerRecord) -> int:
        return len(record.weight)

    def prox_(self, records: Sequence[LayerRecord], taus: Sequence[float], step: Step) -> None:
        shrinkage.shrink_neurons_(records, torch.tensor(taus, dtype=torch.float64), step.guarded)


class L1:
    """L1 norm ``||W||_1``: the sum of the absolute values of the weights."""

    name = "l1"
    with_bias, can_be_centered, guards_itself = False, False, False

    def scale(self, parameters: int) -> float:
        return 1.0

    def count(self, record: LayerRecord) -> int:
        return record.weight.numel()

    def prox_(self, records: Sequence[LayerRecord], taus: Sequence[float], step: Step) -> None:
        taus = step.guarded(torch.tensor(taus, dtype=torch.float64))
        shrinkage.shrink_elements_([record.weight for record in records], taus)


Penalty = SpectralPenalty | GroupLasso | L1
# In the default order. L1 after the nuclear norm can raise the rank again; scaling rows, as group lasso does, cannot.
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
    """Threshold by penalty: strength x step x the penalty's scale, for neurons of so many parameters."""
    return {name: value * step * PENALTIES[name].scale(parameters) for name, value in strengths.items()}


def shrink(records: Sequence[LayerRecord], settings: Settings, warm: WarmState) -> None:
    """Apply the proximal operators of the penalties to the records, one after the other, in place."""
    step = Step(warm, settings, _guard(records, warm))
    for penalty in (PENALTIES[name] for name in settings.order):
        used = [record for record in records if penalty.name in record.taus]
        if used:
            taus = [record.taus[penalty.name] for record in used]
            steps = list(zip(used, taus, map(penalty.count, used), strict=True))
            warn_if_rounded_away(steps, "error_feedback=True keeps what it cuts off")
            penalty.prox_(used, taus, step)
    if step.guard:
        step.guard.all_finite = None


def _guard(records: Sequence[LayerRecord], warm: WarmState) -> Guard | None:
    """Guard against NaN and Inf for weights on one GPU; None if every penalty has a check of its own.

    Raises:
        ValueError: NaN or Inf at an earlier step; if weights are on several devices, now.
    """
    parts = [(part, record.label) for record in records if record.guarded for part in record.results]
    if not parts or all(PENALTIES[name].guards_itself for record in records for name in record.taus):
        return None
    weights, names = map(list, zip(*parts, strict=True))
    if len({W.device for W in weights}) == 1 and all(record.guarded for record in records):
        return gpu.guard(warm, weights, names)
    check_all_finite(weights, names)  # synchronizes: the weights are on several devices
    return None
