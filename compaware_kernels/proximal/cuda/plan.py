"""Plan of the GPU step for a fixed list of matrices: workspace, device tables and matrix programs, built once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from . import device_structs, matrix_sign, subspace_iteration
from .matmul_program import Program
from .polar_express import schedule
from .sizes import is_small

__all__ = ["CHUNK", "CONSTANTS", "PROGRAMS", "SLOT_BYTES", "Plan"]

PROGRAMS = 6
CHUNK = 2**16  # elements per block of the norm reduction
SLOT_BYTES = 2**30  # workspace of the dense route over all slots, unless a single layer needs more
CONSTANTS = {
    "newton_schulz": (-0.5, 1.5, 0), "minus_plus": (-1, 1, 0), "plus_minus": (1, -1, 0), "same": (0, 1, 0),
    "middle": (0.5, 0.5, 1), "identity": (0, 0, 1), "restart": (0.5, 0.51, 0), "sign_check": (-0.25, 0.25, 0),
}  # fmt: skip


class Plan:
    """Plan for a list of L contiguous matrices ``[m, n]`` of one device and dtype.

    Args:
        weights: the matrices, updated in place by every step.
        widths: columns of the subspace of each matrix; 0 for the dense route only.
        firm: whether slopes may exceed 1, which takes a second pass of the dense route.

    Attributes:
        inputs: fp64 ``[L + 2]``: thresholds, seed, and call number, which every step increments.
        slopes: fp64 ``[L]``: 1 for soft, more for firm thresholding.
        out: fp64 ``[sum (R + n)]``: per matrix the R fields of :data:`.device_structs.REPORT`, then n singular values.
    """

    def __init__(self, weights: Sequence[Tensor], widths: Sequence[int], firm: bool = False):
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.new = partial(torch.empty, device=self.device)
        self.inputs = self._zeros(len(weights) + 2)
        self.call = self.inputs[-2:]
        self.slopes, self.firm = torch.ones(len(weights), dtype=torch.float64, device=self.device), firm
        self.refused = self._zeros(1, dtype=torch.int32)
        self.matrices = [_matrix(*each, 1 + firm) for each in zip(weights, self.inputs, self.slopes, strict=False)]
        self.small = [x for x, W in zip(self.matrices, weights, strict=True) if is_small(W)]
        self.layers = [x for x, W in zip(self.matrices, weights, strict=True) if not is_small(W)]
        self.out = self._zeros(sum(x.n + len(device_structs.REPORT) for x in self.matrices))
        self._split_output()
        for number, x in enumerate(self.layers):
            x.number = number
        for x, k in zip(self.matrices, widths, strict=True):
            x.k = 0 if is_small(x.W) else k
        self.chunks = self._chunk_table()
        self.zeroed = self._zeros(1 + PROGRAMS * (1 + len(self.layers)), dtype=torch.int32)  # zeroed by every step
        self.awake, self.counters = self.zeroed[:1], self.zeroed[1:].view(PROGRAMS, -1)
        for x in self.layers:
            self._allocate(x)
        self._fill_tables()
        self._build_programs()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def _constants(self, rows) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64, device=self.device)

    def _split_output(self) -> None:
        """Assign to every matrix its part of ``out``: report fields, then singular values, contiguous."""
        parts = self.out.split([size for x in self.matrices for size in (len(device_structs.REPORT), x.n)])
        for x, report, s in zip(self.matrices, parts[::2], parts[1::2], strict=True):
            x.report, x.s = report, s
        for x in self.small:
            x.row, x.col = x.W.stride()
            for name in ("error", "rank", "method"):
                setattr(x, name, x.report[device_structs.REPORT.index(name) :])

    def _chunk_table(self) -> Tensor:
        """Table of the chunks of all matrices for the norm reduction."""
        rows = []
        for x in self.matrices:
            x.first_chunk, size = len(rows), x.m * x.n
            starts = range(0, size, CHUNK)
            rows += [SimpleNamespace(W=x.W, dtype=x.dtype, first=i, count=min(CHUNK, size - i)) for i in starts]
            x.partials = len(starts)
        self.partials = self.new(len(rows), dtype=torch.float64)
        return device_structs.table(device_structs.CHUNK, rows, self.device)

    def _allocate(self, x: SimpleNamespace) -> None:
        x.partial = self.partials[x.first_chunk :]
        x.awake = self.awake
        pairs = device_structs.PAIRS, device_structs.ROOT_PAIRS
        x.gates = self._zeros(device_structs.SIGN_PAIR + x.passes * sum(pairs), dtype=torch.int32)
        x.coefficients = self.new(x.passes, len(device_structs.COEFFICIENTS), 3, dtype=torch.float64)
        x.omega = self.new(x.n, device_structs.PROBES, dtype=torch.float64)
        x.gate = {name: x.gates[i : i + 1] for i, name in enumerate(device_structs.GATES)}
        each = [part.split(1) for part in x.gates[device_structs.SIGN_PAIR :].split(pairs * x.passes)]
        x.all_sign_pairs, x.all_root_pairs = each[::2], each[1::2]
        x.all_coefficients = [dict(zip(device_structs.COEFFICIENTS, rows, strict=True)) for rows in x.coefficients]
        x.sign_pairs, x.root_pairs, x.coefficient = x.all_sign_pairs[0], x.all_root_pairs[0], x.all_coefficients[0]
        if x.k:
            subspace_iteration.allocate(x, self.new)
            x.V.zero_()
        matrix_sign.allocate(x, self.new)

    def _fill_tables(self) -> None:
        self.table = device_structs.table(device_structs.LAYER, self.layers, self.device)
        self.small_table = device_structs.table(device_structs.SMALL, self.small, self.device)
        steps = schedule()
        sign = [[(c, b, 0), (1, a, 0)] for _, a, b, c in steps]
        root = [(c, b, a) for _, a, b, c in steps[2 * (device_structs.PAIRS - device_structs.ROOT_PAIRS) :]]
        self.lows = self._constants([low for low, *_ in steps])
        self.one = {name: self._constants(row) for name, row in CONSTANTS.items()}
        self.one |= {"sign": self._constants(sign), "root": self._constants(root)}

    def _build_programs(self) -> None:
        count = len(self.layers)
        self.warm = subspace_iteration.programs([x for x in self.layers if x.k], count, self.one)
        out = Program(layers=count)
        for x in self.layers:
            empty = self.new(0)
            out.multiply(x.number, empty.view(x.m, 0), empty.view(0, x.n), x.W, gate=x.gate["clear"])
            if x.k:
                out.multiply(x.number, x.Us, x.right.mT, x.W, gate=x.gate["apply"])
        whole = Program(layers=count, awake=self.awake, warps=8)  # 4 warps spill registers
        matrix_sign.list_products(whole, matrix_sign.assign(self.layers, SLOT_BYTES), self.new, self.one)
        self.programs = [program.build(self.device) for program in (*self.warm, out, whole)]


def _matrix(W: Tensor, tau: Tensor, slope: Tensor, passes: int) -> SimpleNamespace:
    """Fields of one matrix, transposed to m >= n."""
    tall, numbers = W if W.shape[0] >= W.shape[1] else W.mT, {"tau": tau, "slope": slope, "passes": passes}
    return SimpleNamespace(W=tall, m=tall.shape[0], n=tall.shape[1], dtype=device_structs.DTYPES[W.dtype], **numbers)
