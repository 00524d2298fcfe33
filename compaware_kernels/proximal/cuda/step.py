"""GPU step: prox of all layers of a plan in 13 kernel launches, without device-to-host synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._utils.constants import constant
from ...ops import cuda_launcher
from .plan import Plan
from .sizes import SMALL_BYTES

__all__ = ["COLUMNS", "FEW_COLUMNS", "THREADS", "run"]

THREADS = constant("kThreads")  # per block
COLUMNS = {(8, 0): 128, (9, 0): 160, (10, 0): 160}  # largest k with k^2 fp64 in shared memory, by compute capability
FEW_COLUMNS = 96  # the same, for all other devices


def run(plan: Plan, tol: float) -> None:
    """Enqueue one in-place step on the current stream; thresholds are read from ``plan.inputs``."""
    first, second, third, fourth, out, whole = plan.programs
    counters, layers = list(plan.counters), len(plan.layers)
    _begin(plan)
    _small(plan, tol)
    first.run(counters[0])
    _orth(plan, tol, first=True)
    second.run(counters[1])
    _orth(plan, tol, first=False)
    third.run(counters[2])
    _ritz(plan)
    fourth.run(counters[3])
    _launch(plan, "ck_judge", layers, 0, [plan.table, plan.lows, tol])
    out.run(counters[4])
    whole.run(counters[5])
    _launch(plan, "ck_finish", layers + 1, 0, [plan.table, layers, plan.refused, plan.call, tol])


def _begin(plan: Plan) -> None:
    pieces, layers = len(plan.chunks), len(plan.layers)
    arguments = [plan.table, layers, plan.chunks, pieces, plan.partials, plan.call, plan.refused, plan.zeroed]
    _launch(plan, "ck_begin", pieces + layers + 1, 0, [*arguments, plan.zeroed.numel()])


def _orth(plan: Plan, tol: float, first: bool) -> None:
    arguments = [plan.table, plan.refused, plan.call, plan.lows, tol, int(first)]
    _launch(plan, "ck_orth", len(plan.layers), 0, arguments)


def _small(plan: Plan, tol: float) -> None:
    """Launched even without small matrices (one idle block), so that the number of launches is fixed."""
    count = len(plan.small)
    arguments = [plan.small_table, count, plan.refused, tol]
    _launch(plan, "ck_small", max(1, count), SMALL_BYTES, arguments)


def _ritz(plan: Plan) -> None:
    columns = COLUMNS.get(_capability(plan.device), FEW_COLUMNS)
    used = max((x.k for x in plan.layers if x.k <= columns), default=0)
    _launch(plan, "ck_ritz", len(plan.layers), 8 * used**2, [plan.table, plan.call, columns])


def _launch(plan: Plan, kernel: str, grid: int, shared: int, arguments: Sequence[int | float | Tensor]) -> None:
    cuda_launcher.launch(kernel, grid, THREADS, shared, arguments, plan.device)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
