"""Row-sharded tall matrix [m, n]: products with a few columns, Gram matrix, norms, over one or several ranks.

With ``X = [X_1; ...; X_p]`` sharded by rows, ``X V`` is local, and ``X^T Y = sum_i X_i^T Y_i`` is one all-reduce of the
size of the result. Everything with n rows (V, ``X^T Y``, Gram matrices) is replicated. X itself is never communicated.
Every number that a branch depends on is broadcast from the first rank (:meth:`RowSharded.broadcast`), so that all ranks
take the same branch whatever their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.linalg import ROWS, gram, inner, sum_of_squares, times

__all__ = ["RowSharded"]


@dataclass(frozen=True)
class RowSharded:
    """Matrix [m, n] of which this rank holds the row shard ``X`` [m_i, n].

    Every method that communicates is a collective call: all ranks of ``groups`` must make it, in the same order.
    Without groups the matrix is local, and nothing is communicated.
    """

    X: Tensor  # [m_i, n]
    m: int  # rows of the whole matrix
    groups: Sequence[dist.ProcessGroup] = ()  # the rows are sharded over the first group, each shard over the next, ...

    @property
    def n(self) -> int:
        return self.X.shape[1]

    @property
    def rows_per_rank(self) -> int:
        """ceil(m / number of ranks): about the rows of each rank, the same number on all of them."""
        return -(-self.m // math.prod(group.size() for group in self.groups))

    def to(self, dtype: torch.dtype) -> RowSharded:
        """The same matrix in another dtype."""
        return RowSharded(self.X.to(dtype), self.m, self.groups)

    def matmul(self, V: Tensor) -> Tensor:
        """``X V``: replicated [n, k] -> this rank's row shard [m_i, k]."""
        return times(self.X, V)

    def rmatmul(self, Y: Tensor) -> Tensor:
        """``X^T Y``: row shard [m_i, k] -> replicated [n, k]."""
        return self.all_reduce(times(self.X.mT, Y))

    def inner(self, A: Tensor, B: Tensor) -> Tensor:
        """``A^T B`` in fp64: row shards [m_i, j], [m_i, k] -> replicated [j, k]."""
        return self.all_reduce(inner(A, B))

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Gram matrix ``X^T X`` [n, n], replicated; fp64 converts a few rows at a time. One triangle is all-reduced.

        Args:
            dtype: that of X, or fp64.
        """
        if dtype == self.X.dtype:
            G = gram(self.X)
        else:
            parts = self.X.split(max(1, ROWS // max(1, self.n)))
            G = sum(inner(part, part) for part in parts)
        if not self.groups:
            return G
        lower = torch.ones(G.shape, dtype=torch.bool, device=G.device).tril()
        G[lower] = self.all_reduce(G[lower])
        return G.tril() + G.tril(-1).mT

    def r_factor(self) -> Tensor:
        """R [., n] fp64 with ``R^T R = X^T X``: QR per rank, factors gathered and stacked; X itself without groups."""
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

    def square(self) -> float:
        """``||X||_F^2`` in fp64."""
        X = self.X if self.X.is_contiguous() else self.X.mT.contiguous()
        return float(self.all_reduce(sum_of_squares(X)))

    def norm(self, Y: Tensor) -> float:
        """Frobenius norm of a matrix of which ``Y`` [m_i, k] is this rank's row shard."""
        found = torch.linalg.vector_norm(Y)
        return float(self.all_reduce(found.double().square()).sqrt() if self.groups else found)

    def normalize_columns(self, Y: Tensor) -> Tensor:
        """The row shard ``Y`` [m_i, k], the columns of the whole matrix scaled to norm 1."""
        if not self.groups:
            return torch.nn.functional.normalize(Y, dim=0)
        lengths = self.all_reduce(torch.linalg.vector_norm(Y, dim=0, dtype=torch.float64).square()).sqrt()
        return Y / lengths.clamp_min(1e-12).to(Y.dtype)

    def global_norm(self, norm: float) -> float:
        """Frobenius norm of the whole matrix, from each rank's shard; scaled, so that no square overflows."""
        if not self.groups:
            return norm
        largest = torch.tensor(norm, dtype=torch.float64, device=self.X.device)
        for group in self.groups:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        scale = float(largest) or 1.0
        return scale * math.sqrt(self.all_reduce(torch.full_like(largest, (norm / scale) ** 2)))

    def all_reduce(self, t: Tensor) -> Tensor:
        """Sum of ``t`` over the ranks, in place where ``t`` is contiguous."""
        if not self.groups:
            return t
        t = t.contiguous()
        for group in self.groups:
            dist.all_reduce(t, group=group)
        return t

    def broadcast(self, t: Tensor) -> Tensor:
        """``t`` of the first rank: makes bitwise equal what the ranks have computed alike up to rounding."""
        if not self.groups:
            return t
        t = t.contiguous()
        for group in self.groups:
            dist.broadcast(t, group=group, group_src=0)
        return t

    def broadcast_float(self, number: float) -> float:
        """:meth:`broadcast` of one fp64 number."""
        if not self.groups:
            return number
        return float(self.broadcast(torch.tensor(number, dtype=torch.float64, device=self.X.device)))
