"""SvtInfo: the report of a spectral proximal operator on one weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["SvtInfo"]


@dataclass(frozen=True)
class SvtInfo:
    """Report of one call on one weight ``[..., m, n]``: rank, spectrum, error bound and route.

    Attributes:
        rank: number of singular values above the threshold, int64 ``W.shape[:-2]``.
        s: singular values of the result, descending, fp64 ``[..., min(m, n)]`` (for :func:`spectral_ball_`: of W minus
            the result).
        error_bound: fp64 ``W.shape[:-2]``, an upper bound of ``||computed - exact||_F``, including the rounding of the
            result to its dtype.  For :func:`svt` it is a-priori: a dense SVD is the exact one of a matrix within
            ``p(m, n) eps ||W||_2`` (LAPACK Users' Guide, 4.9), here with ``p = 2 sqrt(k) max(m, n)`` in the Frobenius
            norm, k = min(m, n), and SVT is non-expansive.  For the in-place forms it is a-posteriori, by
            :mod:`.error_bounds`; its probabilistic parts fail with a probability below 1e-9.
        method: route taken.
        reason: why this route was taken, or its number of iterations.
        name: layer name, if names were given.
    """

    rank: Tensor
    s: Tensor
    error_bound: Tensor
    method: str = "svd"
    reason: str = ""
    name: str | None = None
