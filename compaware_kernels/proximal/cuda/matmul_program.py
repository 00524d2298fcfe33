"""Program: a list of dependent dense matrix products ``[M, K] x [K, N]``, executed in one kernel launch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FAR", "FIELDS", "LEAST", "TYPES", "VECTOR", "End", "Group", "Loop", "Product", "Program", "layout"]

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAR = 2**31 // 64  # limit of strides, in elements: offsets within a tile of 64 rows are int32
VECTOR = 16  # bytes of the widest load
FIELDS = 26  # int64 fields per problem
LEAST = 16  # fewest steps of the loop over K per split


class Group(NamedTuple):
    """Tile shape ``[BM, BN]`` and accumulator type, an index of TYPES."""

    accumulator: int
    BM: int
    BN: int


class Loop(NamedTuple):
    """Specialization of the main loop over K: operand types, layouts (see :func:`layout`) and step BK."""

    a: int
    a_layout: int
    b: int
    b_layout: int
    BK: int


class End(NamedTuple):
    """Specialization of the epilogue: type and layout of C."""

    c: int
    layout: int


class Product(NamedTuple):
    """One product C = alpha A B + beta plus + gamma I, with its stage and specialization."""

    layer: int
    stage: int
    A: Tensor
    B: Tensor
    C: Tensor
    plus: Tensor | None
    coef: Tensor | None
    gate: Tensor | None
    group: Group
    loop: Loop
    end: End

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return *self.C.shape, self.A.shape[1]

    @property
    def steps(self) -> int:
        """Number of steps of the loop over K."""
        return -(-self.A.shape[1] // self.loop.BK)

    def share_bytes(self, chunks: int) -> int:
        """Bytes of the split-K workspace: the partial tiles of all ``chunks`` splits."""
        size = self.group.BM * self.group.BN * TYPES[self.group.accumulator].itemsize
        return math.prod(self.tiles) * chunks * size

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of tiles, down and across."""
        return -(-self.C.shape[0] // self.group.BM), -(-self.C.shape[1] // self.group.BN)


def layout(X: Tensor) -> int:
    """Layout code: 0 any strides, 1 contiguous columns; aligned to vectors: 2 contiguous rows, 3 columns."""
    steps = [1 if size == 1 else step for size, step in zip(X.shape, X.stride(), strict=True)]
    along = max((axis for axis in (1, 0) if steps[axis] == 1), key=lambda axis: X.shape[axis], default=None)
    if along is None:
        return 0
    whole = X.data_ptr(), X.stride(1 - along) * X.itemsize, X.shape[along] * X.itemsize
    return 1 - along + 2 * all(n % VECTOR == 0 for n in whole)


class Program:
    """Matrix products on a GPU, in one launch: C = A B, or alpha A B + beta D + gamma I.

    A product waits for the products of the same layer in earlier stages; all others run in any order. ::

        program = Program(layers=1)
        program.multiply(0, A, B, T)
        program.stage()
        program.multiply(0, T, C, D)
        program.build(device)
        program.run(counters)

    Args:
        layers: number of independent dependency chains.
        precision: of products of two fp32 matrices, unless wide: ieee or tf32x3.
        awake: int32 ``[1]``; if it is 0 when the program runs, nothing is done. This is nearly free, while a gate is
            read by every tile of its product.
        warps: number of warps of a Triton program.
        at_once: number of tiles a GPU computes concurrently; K is split to give about as many.
    """

    def __init__(
        self, layers: int, precision: str = "tf32x3", at_once: int = 264, awake: Tensor | None = None, warps: int = 4
    ):
        self.layers, self.precision, self.at_once, self.warps = layers, precision, at_once, warps
        self.flops = self.bytes = self.tiles = 0
        self.counters = 1 + layers  # how many int32 counters :meth:`run` needs, zero before every run
        self.tensors: list[Tensor] = []  # kept alive: the tables hold their addresses
        self._products: list[Product] = []
        self.awake, self._stage = awake, 0

    def multiply(
        self,
        layer: int,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        plus: Tensor | None = None,
        coef: Tensor | None = None,
        gate: Tensor | None = None,
        wide: bool = False,
    ) -> None:
        """Append C = A B, or C = alpha A B + beta plus + gamma I.

        Args:
            layer: 0 to layers - 1.
            A: ``[M, K]``, fp32, bf16, fp16 or fp64, any strides.
            B: ``[K, N]``, likewise.
            C: ``[M, N]``, likewise.
            plus: ``[M, N]`` of C's dtype; may be C. Not read if beta is 0.
            coef: fp64 ``[3]``: alpha, beta, gamma; read when the program runs.
            gate: int32 ``[1]``; if it is 0 when the program runs, C is left unchanged.
            wide: multiply and accumulate in fp64, otherwise in fp32.

        Raises:
            ValueError: shapes or dtypes that do not match, a layer out of range, strides beyond int32 offsets.
        """
        M, N, K = *C.shape, A.shape[1]
        if A.shape != (M, K) or B.shape != (K, N) or (plus is not None and plus.shape != C.shape):
            shapes = [list(X.shape) for X in (A, B, C, plus) if X is not None]
            raise ValueError(f"A, B, C and plus: wanted [M, K], [K, N], [M, N] and [M, N]; got {shapes}")
        if (plus is None) is not (coef is None) and plus is not None:
            raise ValueError("coef: wanted alpha, beta and gamma with plus; got None")
        if plus is not None and plus.dtype != C.dtype:
            raise ValueError(f"plus: wanted the dtype of C, {C.dtype}; got {plus.dtype}")
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer: wanted 0 to {self.layers - 1}; got {layer}")
        if any(sum(X.stride()) >= FAR for X in (A, B, C, C if plus is None else plus)):
            raise ValueError(f"strides: wanted a sum below {FAR} for every matrix")
        if layout(C) in (1, 3):
            A, B, C, plus = B.T, A.T, C.T, None if plus is None else plus.T
            M, N = N, M
        a, b = layout(A), layout(B)
        vectors = min(a, b) >= 2
        loop = Loop(
            *(TYPES.index(A.dtype), a if vectors else a % 2, TYPES.index(B.dtype), b if vectors else b % 2),
            BK=32 if vectors and not wide else 16,
        )
        group = Group(TYPES.index(torch.float64 if wide else torch.float32), 64, 64 if vectors and N > 32 else 32)
        end = End(TYPES.index(C.dtype), 2 * all(layout(X) == 2 for X in (C, plus) if X is not None))
        product = Product(layer, self._stage, A, B, C, plus, coef, gate, group, loop, end)
        self._products.append(product)
        self.tensors += [X for X in (A, B, C, plus, coef, gate) if X is not None]
        self.flops += 2 * M * N * K
        self.bytes += sum(X.nbytes for X in (A, B, C, *([] if plus is None else [plus])))

    def stage(self) -> None:
        """Begin a stage: later products wait for all earlier products of the same layer."""
        self._stage += 1

    def build(self, device: torch.device | str) -> Program:
        """Build the tables on the device; no product can be appended afterwards. Returns self."""
        self._products.sort(key=lambda product: (product.stage, -product.sizes[2]))  # longest K first
        kinds, lengths = self._kinds(), self._lengths()
        shares, arrivals = self._memory(lengths, device)
        before, now, stage, used, waiting = Counter(), Counter(), 0, 0, 0
        problems, tiles = [], []
        for number, (product, kind, length) in enumerate(zip(self._products, kinds, lengths, strict=True)):
            if product.stage > stage:
                before, stage = now.copy(), product.stage
            down, across = product.tiles
            chunks = max(1, -(-product.sizes[2] // length))
            pointers = [0 if X is None else X.data_ptr() for X in product[2:8]]
            steps = [step for X in product[2:6] for step in (X.stride() if X is not None else (0, 0))]
            memory = shares.data_ptr() + used, arrivals.data_ptr() + 4 * waiting
            if chunks > 1:
                used += product.share_bytes(chunks)
                waiting += down * across
            where = product.layer, before[product.layer], length, chunks
            problems.append([*pointers, *product.sizes, *steps, *kind, *where, *memory])
            tiles += [(number, *at) for at in itertools.product(range(down), range(across), range(chunks))]
            now[product.layer] += down * across * chunks
        self._problems = torch.tensor(problems, dtype=torch.int64).reshape(-1, FIELDS).to(device)
        self._tiles = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4).to(device)
        self.tiles = len(tiles)
        self._awake = torch.ones(1, dtype=torch.int32, device=device) if self.awake is None else self.awake
        self.tensors.append(self._awake)
        return self

    def _kinds(self) -> list[tuple[int, int, int]]:
        """Indices (group, loop, end) of every product into the distinct ones, ``self.kinds``; loop -1 if K is 0."""
        groups = sorted({p.group for p in self._products})
        loops = sorted({(p.group, p.loop) for p in self._products if p.sizes[2]})
        ends = sorted({(p.group, p.end) for p in self._products})
        self.kinds = (
            tuple(map(tuple, groups)),
            *(tuple((groups.index(group), *kind) for group, kind in kinds) for kinds in (loops, ends)),
        )
        return [
            (
                groups.index(p.group),
                loops.index((p.group, p.loop)) if p.sizes[2] else -1,
                ends.index((p.group, p.end)),
            )
            for p in self._products
        ]

    def _lengths(self) -> list[int]:
        """Length of the K split of each product: balances the tiles of a stage over the ``at_once`` concurrent ones."""
        work = Counter()
        for product in self._products:
            work[product.stage] += math.prod(product.tiles) * product.steps
        longest = {stage: max(LEAST, -(-steps // self.at_once)) for stage, steps in work.items()}
        parts = [max(1, -(-product.steps // longest[product.stage])) for product in self._products]
        return [max(1, -(-p.steps // n)) * p.loop.BK for p, n in zip(self._products, parts, strict=True)]

    def _memory(self, lengths: list[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Split-K workspace: partial tiles, uint8 ``[bytes]``, and arrival counters, int32 ``[tiles]``."""
        chunks = [-(-product.sizes[2] // length) for product, length in zip(self._products, lengths, strict=True)]
        split = [(product, n) for product, n in zip(self._products, chunks, strict=True) if n > 1]
        size = sum(product.share_bytes(n) for product, n in split)
        shares = torch.empty(size, dtype=torch.uint8, device=device)
        arrivals = torch.zeros(sum(math.prod(p.tiles) for p, _ in split), dtype=torch.int32, device=device)
        self.tensors += [shares, arrivals]
        return shares, arrivals

    def run(self, counters: Tensor) -> None:
        """Launch all products on the current stream.

        Args:
            counters: int32 ``[self.counters]``, all 0; overwritten.
        """
        from .matmul_kernel import run

        run(self._problems, self._tiles, counters, self._awake, self.kinds, self.precision, self.warps)
