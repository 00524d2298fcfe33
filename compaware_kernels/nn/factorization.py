"""One matrix and a rank -> two small matrices."""

from __future__ import annotations

import torch
from torch import Tensor


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
    U, s, Vh = torch.linalg.svd(M.detach().double(), full_matrices=False)
    root = s[..., :rank].sqrt()
    U, V = U[..., :rank] * root[..., None, :], root[..., :, None] * Vh[..., :rank, :]
    return U.to(M.dtype), V.to(M.dtype)


def check_rank(rank: int, m: int, n: int) -> None:
    """Raise ValueError unless ``rank`` is a whole number from 1 to min(m, n)."""
    if not (isinstance(rank, int) and 1 <= rank <= min(m, n)):
        raise ValueError(f"rank must be a whole number from 1 to {min(m, n)} for a {m} x {n} matrix; got {rank!r}")
