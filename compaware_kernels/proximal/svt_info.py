"""What the proximal operators say of what they did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SvtInfo:
    """What one call did to one weight ``[..., m, n]``.

    Attributes:
        rank: singular values above the threshold, int64 ``W.shape[:-2]``.
        s: singular values of the result, descending, fp64 ``[..., min(m, n)]`` (of :func:`spectral_ball_`: of what was
            taken away).
        error_bound: fp64 ``W.shape[:-2]``, an upper bound of ``||computed - exact||_F``, the rounding of the result to
            its dtype included.  Of :func:`svt`: a-priori; a dense SVD is the exact one of a matrix within
            ``p(m, n) eps ||W||_2`` (LAPACK Users' Guide, 4.9), here with ``p = 2 sqrt(k) max(m, n)`` in the Frobenius
            norm, k = min(m, n), and SVT is non-expansive.  Of the forms in place: a-posteriori, as
            :mod:`.error_bounds` explains; its probabilistic parts fail with a probability below 1e-9.
        method: the route taken.
        reason: why, or what it took.
        name: the layer's name, where names were given.
    """

    rank: Tensor
    s: Tensor
    error_bound: Tensor
    method: str = "svd"
    reason: str = ""
    name: str | None = None
