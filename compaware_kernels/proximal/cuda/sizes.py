"""Which matrices one block does whole, and how wide the basis of the others is."""

from __future__ import annotations

from torch import Tensor

from ..._utils.constants import constant

SMALL_BYTES = constant("kSmallBytes")  # of shared memory, for (m + n) n numbers in fp64
SPARE = 8  # columns of a basis beyond the rank
MAX_COLUMNS = constant("kMaxColumns")


def is_small(W: Tensor) -> bool:
    m, n = max(W.shape), min(W.shape)
    return (m + n) * n * 8 <= SMALL_BYTES


def width(rank: int, n: int) -> int:
    """Columns of the basis for this rank, or 0 where products with all of the matrix are as good."""
    columns = -(rank + SPARE) // 16 * -16
    return columns if columns <= min(n // 2, MAX_COLUMNS) else 0
