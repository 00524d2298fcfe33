"""Singular values and thin SVD of matrices [G, m, n] in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SVD", "check_rank", "singular_values"]


class SVD(NamedTuple):
    """Thin singular value decomposition ``M = U diag(s) Vh`` of ``M`` ``[G, m, n]``, k = min(m, n), in fp64."""

    U: Tensor  # [G, m, k]
    s: Tensor  # [G, k], descending
    Vh: Tensor  # [G, k, n]

    @classmethod
    def of(cls, M: Tensor) -> SVD:
        """SVD of ``M`` ``[G, m, n]``, any floating dtype, computed in fp64; detached."""
        U, s, Vh = torch.linalg.svd(_tall(M), full_matrices=False)
        return cls(U, s, Vh) if M.shape[-2] >= M.shape[-1] else cls(Vh.mT, s, U.mT)

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rank-r factors ``[G, m, r]``, ``[G, r, n]`` in ``dtype``, as of :func:`.truncation.factors`."""
        root = self.s[..., :rank].sqrt()
        U, V = self.U[..., :rank] * root[..., None, :], root[..., :, None] * self.Vh[..., :rank, :]
        return U.to(dtype), V.to(dtype)


def singular_values(M: Tensor) -> Tensor:
    """Singular values of ``M`` ``[..., m, n]``, descending, fp64 ``[..., min(m, n)]``; detached."""
    return torch.linalg.svdvals(_tall(M))


def _tall(M: Tensor) -> Tensor:
    """M or its transpose in fp64, the one with more rows: LAPACK takes up to three times as long for wide matrices."""
    return (M if M.shape[-2] >= M.shape[-1] else M.mT).detach().double()


def check_rank(rank: int, m: int, n: int) -> None:
    """Raise ValueError unless ``rank`` is a whole number from 1 to min(m, n)."""
    if not (isinstance(rank, int) and 1 <= rank <= min(m, n)):
        raise ValueError(f"rank: wanted a whole number from 1 to {min(m, n)} for a {m} x {n} matrix; got {rank!r}")
