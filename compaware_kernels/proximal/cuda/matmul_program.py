"""Lists of dense products that one launch works off: :class:`Program`."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAR = 2**31 // 64  # elements from one row of a tile to the next: offsets within a tile are int32
VECTOR = 16  # bytes: the widest load
FIELDS = 26  # of a problem
LEAST = 16  # steps of the loop over K that are worth a tile


class Group(NamedTuple):
    """What tiles of one accumulator have in common; its type is an index of TYPES."""

    accumulator: int
    BM: int
    BN: int


class Loop(NamedTuple):
    """What the loop over K is specialised for: types, and layouts as :func:`layout` says."""

    a: int
    a_layout: int
    b: int
    b_layout: int
    BK: int


class End(NamedTuple):
    """What the rest is specialised for."""

    c: int
    layout: int


class Product(NamedTuple):
    """C = alpha A B + beta plus + gamma I."""

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
        """Of the loop over K."""
        return -(-self.A.shape[1] // self.loop.BK)

    def share_bytes(self, chunks: int) -> int:
        """Of the tiles of all shares of the sum."""
        size = self.group.BM * self.group.BN * TYPES[self.group.accumulator].itemsize
        return math.prod(self.tiles) * chunks * size

    @property
    def tiles(self) -> tuple[int, int]:
        """How many, down and across."""
        return -(-self.C.shape[0] // self.group.BM), -(-self.C.shape[1] // self.group.BN)


def layout(X: Tensor) -> int:
    """1 where columns are contiguous, 0 elsewhere; 3, or 2 where rows are, if whole vectors lie everywhere."""
    steps = [1 if size == 1 else step for size, step in zip(X.shape, X.stride(), strict=True)]
    along = max((axis for axis in (1, 0) if steps[axis] == 1), key=lambda axis: X.shape[axis], default=None)
    if along is None:
        return 0
    whole = X.data_ptr(), X.stride(1 - along) * X.itemsize, X.shape[along] * X.itemsize
    return 1 - along + 2 * all(n % VECTOR == 0 for n in whole)


class Program:
    """Products of matrices on a GPU, in one launch: C = A B, or alpha A B + beta D + gamma I.

    Products of one layer in one stage are computed in any order, those of different layers always are. ::

        program = Program(layers=1)
        program.multiply(0, A, B, T)
        program.stage()
        program.multiply(0, T, C, D)
        program.build(device)
        program.run(counters)

    Args:
        layers: how many wait for each other on their own.
        precision: of the products of two fp32 matrices that are not wide: ieee or tf32x3.
        awake: int32 ``[1]``; where it is 0 when the program runs, nothing is done. That costs next to nothing, while a
            gate costs every tile of its product a look.
        warps: of a Triton program.
        at_once: tiles that a GPU computes at a time; sums are split so that there are about as many.
    """

    def __init__(
        self, layers: int, precision: str = "tf32x3", at_once: int = 264, awake: Tensor | None = None, warps: int = 4
    ):
        self.layers, self.precision, self.at_once, self.warps = layers, precision, at_once, warps
        self.flops = self.bytes = self.tiles = 0
        self.counters = 1 + layers  # int32, zero before every run
        self.tensors: list[Tensor] = []  # all that the tables point to
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
        """Lists C = A B, or C = alpha A B + beta plus + gamma I.

        Args:
            layer: 0 to layers - 1.
            A: ``[M, K]``, fp32, bf16, fp16 or fp64, any strides.
            B: ``[K, N]``, likewise.
            C: ``[M, N]``, likewise.
            plus: ``[M, N]`` of C's dtype; may be C. It is not read where beta is 0.
            coef: fp64 ``[3]``: alpha, beta, gamma; read when the program runs.
            gate: int32 ``[1]``; where it is 0 when the program runs, C stays as it is.
            wide: multiplied and summed in fp64, otherwise in fp32.
        """
        M, N, K = *C.shape, A.shape[1]
        if A.shape != (M, K) or B.shape != (K, N) or (plus is not None and plus.shape != C.shape):
            shapes = [list(X.shape) for X in (A, B, C, plus) if X is not None]
            raise ValueError(f"A, B, C and plus do not fit each other: {shapes}")
        if (plus is None) is not (coef is None) and plus is not None:
            raise ValueError("plus counts beta times: it needs coef")
        if plus is not None and plus.dtype != C.dtype:
            raise ValueError(f"plus must be of the dtype of C; got {plus.dtype} and {C.dtype}")
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer must be 0 to {self.layers - 1}; got {layer}")
        if any(sum(X.stride()) >= FAR for X in (A, B, C, C if plus is None else plus)):
            raise ValueError(f"strides that add up to less than {FAR} are wanted")
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
        """What is listed from here on waits for all that was listed before for the same layer."""
        self._stage += 1

    def build(self, device: torch.device | str) -> Program:
        """Makes the tables on the device; nothing can be listed after."""
        self._products.sort(key=lambda product: (product.stage, -product.sizes[2]))  # what takes longest first
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
        """Numbers the groups, loops and ends that there are; those of every product, -1 for the loop where K is 0."""
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
        """How much of K one tile of each product sums: no more than keeps the others of its stage busy as long."""
        work = Counter()
        for product in self._products:
            work[product.stage] += math.prod(product.tiles) * product.steps
        longest = {stage: max(LEAST, -(-steps // self.at_once)) for stage, steps in work.items()}
        parts = [max(1, -(-product.steps // longest[product.stage])) for product in self._products]
        return [max(1, -(-p.steps // n)) * p.loop.BK for p, n in zip(self._products, parts, strict=True)]

    def _memory(self, lengths: list[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Where the shares of sums lie, and how many of a sum have been stored."""
        chunks = [-(-product.sizes[2] // length) for product, length in zip(self._products, lengths, strict=True)]
        split = [(product, n) for product, n in zip(self._products, chunks, strict=True) if n > 1]
        size = sum(product.share_bytes(n) for product, n in split)
        shares = torch.empty(size, dtype=torch.uint8, device=device)
        arrivals = torch.zeros(sum(math.prod(p.tiles) for p, _ in split), dtype=torch.int32, device=device)
        self.tensors += [shares, arrivals]
        return shares, arrivals

    def run(self, counters: Tensor) -> None:
        """Launches: everything listed, in the current stream.

        Args:
            counters: int32, all 0, ``self.counters`` of them; a run leaves other numbers there.
        """
        from .matmul_kernel import run

        run(self._problems, self._tiles, counters, self._awake, self.kinds, self.precision, self.warps)
