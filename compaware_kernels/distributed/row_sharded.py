"""A matrix whose rows lie on this process, or are divided among several: products with a few columns, and their sums.

With ``X = [X_1; ...; X_p]`` by rows, ``X V`` is local, and ``X^T Y = sum_i X_i^T Y_i`` is one all-reduce of its own
small size; what has n rows (V, ``X^T Y``, Gram matrices) is the same on every process. X itself never travels. Every
number that a branch depends on is the first process's (:meth:`Rows.agree`): whatever rounding does, all take the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.linalg import ROWS, inner, product, times


@dataclass(frozen=True)
class Rows:
    """The rows of a matrix [m, n] that lie here."""

    X: Tensor  # [m_i, n]
    m: int
    groups: Sequence[
        dist.ProcessGroup
    ] = ()  # among which the rows are divided, one after the other; none: all are here

    @property
    def n(self) -> int:
        return self.X.shape[1]

    @property
    def share(self) -> int:
        """About how many rows a process has."""
        return -(-self.m // math.prod(group.size() for group in self.groups))

    def to(self, dtype: torch.dtype) -> Rows:
        return Rows(self.X.to(dtype), self.m, self.groups)

    def ahead(self, V: Tensor) -> Tensor:
        """X V: rows that lie here."""
        return times(self.X, V)

    def back(self, Y: Tensor) -> Tensor:
        """X^T Y."""
        return self.sum(times(self.X.mT, Y))

    def inner(self, A: Tensor, B: Tensor) -> Tensor:
        """A^T B in fp64, for A and B with rows as X."""
        return self.sum(inner(A, B))

    def gram(self, dtype: torch.dtype) -> Tensor:
        """X^T X [n, n], in fp64 converting a few rows at a time; one triangle of it travels."""
        if dtype == self.X.dtype:
            G = product(self.X.mT, self.X)
        else:
            parts = self.X.split(max(1, ROWS // max(1, self.n)))
            G = sum(inner(part, part) for part in parts)
        if not self.groups:
            return G
        below = torch.ones(G.shape, dtype=torch.bool, device=G.device).tril()
        G[below] = self.sum(G[below])
        return G.tril() + G.tril(-1).mT

    def triangle(self) -> Tensor:
        """R [., n] fp64 with ``R^T R = X^T X``, of QR factorisations that are gathered; X itself where it is whole."""
        R = self.X.double()
        for group in self.groups:
            R = torch.linalg.qr(R, mode="r").R
            most = torch.tensor(len(R), device=R.device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
            R = torch.cat([R, R.new_zeros(int(most) - len(R), self.n)])
            parts = [torch.empty_like(R) for _ in range(group.size())]
            dist.all_gather(parts, R.contiguous(), group)
            R = torch.cat(parts)
        return R

    def norm(self, Y: Tensor) -> float:
        """||Y||_F of a Y with rows as X."""
        found = torch.linalg.vector_norm(Y)
        return float(self.sum(found.double().square()).sqrt() if self.groups else found)

    def normalised(self, Y: Tensor) -> Tensor:
        """Y with columns of length 1."""
        if not self.groups:
            return torch.nn.functional.normalize(Y, dim=0)
        lengths = self.sum(torch.linalg.vector_norm(Y, dim=0, dtype=torch.float64).square()).sqrt()
        return Y / lengths.clamp_min(1e-12).to(Y.dtype)

    def hypot(self, norm: float) -> float:
        """The root of the sum of squares of what each process gives."""
        if not self.groups:
            return norm
        largest = torch.tensor(norm, dtype=torch.float64, device=self.X.device)
        for group in self.groups:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        scale = float(largest) or 1.0
        return scale * math.sqrt(self.sum(torch.full_like(largest, (norm / scale) ** 2)))

    def sum(self, found: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if not self.groups:
            return found
        found = found.contiguous()
        for group in self.groups:
            dist.all_reduce(found, group=group)
        return found

    def agree(self, found: Tensor) -> Tensor:
        """What the first process has: for numbers that are the same everywhere, but for rounding."""
        if not self.groups:
            return found
        found = found.contiguous()
        for group in self.groups:
            dist.broadcast(found, group=group, group_src=0)
        return found

    def agree_on(self, number: float) -> float:
        if not self.groups:
            return number
        return float(self.agree(torch.tensor(number, dtype=torch.float64, device=self.X.device)))
