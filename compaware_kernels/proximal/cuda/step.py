"""The proximal step of a whole network on a GPU: 13 launches, however many layers, and no word with the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._utils.constants import constant
from ...ops import cuda_launcher
from .plan import Plan
from .sizes import SMALL_BYTES

THREADS = constant("kThreads")  # of every block
COLUMNS = {(8, 0): 128, (9, 0): 160, (10, 0): 160}  # whose squares fit in shared memory in fp64, by compute capability
FEW_COLUMNS = 96  # of any other


def run(plan: Plan, tol: float) -> None:
    """Queue one step, in place, on the current stream; thresholds are those in ``plan.inputs``."""
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
    """Also where there are none: then one block has nothing to do, and every network takes as many launches."""
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
