"""Singular values and truncated SVDs of folded weights, in fp64; one matrix and a rank -> two small matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SVD(NamedTuple):
    """The thin singular value decomposition ``M = U diag(s) Vh`` of ``M`` ``[G, m, n]``, k = min(m, n), in fp64."""

    U: Tensor  # [G, m, k]
    s: Tensor  # [G, k], descending
    Vh: Tensor  # [G, k, n]

    @classmethod
    def of(cls, M: Tensor) -> SVD:
        return cls(*torch.linalg.svd(M.detach().double(), full_matrices=False))

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two factors of :func:`factors`, in ``dtype``."""
        root = self.s[..., :rank].sqrt()
        U, V = self.U[..., :rank] * root[..., None, :], root[..., :, None] * self.Vh[..., :rank, :]
        return U.to(dtype), V.to(dtype)


def singular_values(M: Tensor) -> Tensor:
    """Singular values of ``M`` ``[..., m, n]``, descending, computed in fp64 and returned so: ``[..., min(m, n)]``."""
    return torch.linalg.svdvals(M.detach().double())


def factors(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of M as a product, the singular values shared evenly between the factors.

    ``M ~ U V,  U = U_r S_r^(1/2),  V = S_r^(1/2) V_r^T``  (Eckart & Young, 1936)

    Equal norms on both sides keep the gradients of the two factors on one scale when they are fine-tuned.

    Args:
        M: ``[G, m, n]``; computed in fp64.
        rank: 1 to min(m, n).

    Returns:
        ``U`` ``[G, m, r]`` and ``V`` ``[G, r, n]`` in the dtype of M.

    Raises:
        ValueError: rank out of range.
    """
    check_rank(rank, *M.shape[-2:])
    return SVD.of(M).factors(rank, M.dtype)


def check_rank(rank: int, m: int, n: int) -> None:
    """Raise ValueError unless ``rank`` is a whole number from 1 to min(m, n)."""
    if not (isinstance(rank, int) and 1 <= rank <= min(m, n)):
        raise ValueError(f"rank must be a whole number from 1 to {min(m, n)} for a {m} x {n} matrix; got {rank!r}")
