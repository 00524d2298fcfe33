"""Sizes on the GPU: which matrices one thread block handles alone, and the subspace width of the others."""

from __future__ import annotations

from torch import Tensor

from ..._utils.constants import constant

__all__ = ["MAX_COLUMNS", "SMALL_BYTES", "SPARE", "is_small", "width"]

SMALL_BYTES = constant("kSmallBytes")  # shared memory of a block, for (m + n) n fp64 numbers
SPARE = 8  # oversampling: columns of a subspace beyond the rank
MAX_COLUMNS = constant("kMaxColumns")


def is_small(W: Tensor) -> bool:
    """Whether W ``[m, n]`` fits in the shared memory of one block, for a Jacobi SVD."""
    m, n = max(W.shape), min(W.shape)
    return (m + n) * n * 8 <= SMALL_BYTES


def width(rank: int, n: int) -> int:
    """Columns of the subspace for this rank, a multiple of 16; 0 if the dense route is as fast."""
    columns = -(rank + SPARE) // 16 * -16
    return columns if columns <= min(n // 2, MAX_COLUMNS) else 0
