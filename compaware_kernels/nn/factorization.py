"""Rank-r factorization of a matrix [m, n] by truncated SVD: U [m, r], V [r, n]."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_rank", "factors", "singular_values"]


def singular_values(M: Tensor) -> Tensor:
    """Singular values of ``M`` ``[..., m, n]``, descending, fp64 ``[..., min(m, n)]``; detached."""
    return torch.linalg.svdvals(M.detach().double())


def factors(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-r approximation of M (truncated SVD), the singular values split evenly between them.

    ``M ~ U V,  U = U_r S_r^(1/2),  V = S_r^(1/2) V_r^T``

    The factors have equal norms, so that their gradients have one scale in fine-tuning.

    Args:
        M: ``[G, m, n]``, any floating dtype; computed in fp64.
        rank: 1 to min(m, n).

    Returns:
        ``U`` ``[G, m, r]`` and ``V`` ``[G, r, n]`` in the dtype of M.

    Raises:
        ValueError: rank out of range.

    Source: Eckart & Young, 1936.
    """
    check_rank(rank, *M.shape[-2:])
    U, s, Vh = torch.linalg.svd(M.detach().double(), full_matrices=False)
    root = s[..., :rank].sqrt()
    U, V = U[..., :rank] * root[..., None, :], root[..., :, None] * Vh[..., :rank, :]
    return U.to(M.dtype), V.to(M.dtype)


def check_rank(rank: int, m: int, n: int) -> None:
    """Raise ValueError unless ``rank`` is a whole number from 1 to min(m, n)."""
    if not (isinstance(rank, int) and 1 <= rank <= min(m, n)):
        raise ValueError(f"rank: wanted a whole number from 1 to {min(m, n)} for a {m} x {n} matrix; got {rank!r}")
