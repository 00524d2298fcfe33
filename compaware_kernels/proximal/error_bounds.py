"""Probabilistic error bounds: norms of implicit matrices, bounded from above by fp64 products with Gaussian probes.

For a fixed matrix R, which is never formed, and p independent standard normal probes Omega, ``||R Omega||_F^2`` is a
sum of chi-squared variables with p degrees of freedom, weighted by the sigma_i(R)^2; by Chernoff's inequality

    ``P(||R Omega||_F^2 <= c p ||R||_F^2) <= exp(p / 2 (1 - c + ln c))``,   0 < c < 1,

so ``||R||_2 <= ||R||_F <= ||R Omega||_F / sqrt(c p)`` fails with probability at most FAILURE, which fixes c. Applied to
a power of R, followed by the corresponding root, the bound of ||R||_2 is sharper. Rounding errors are covered as well:
the probes compare the computed low-precision products with fp64 products.

Sources: Laurent & Massart, Ann. Stat. 28(5), 2000, section 4 (the inequality); Halko, Martinsson & Tropp, SIAM Review
53(2), 2011, 4.3 (the use).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..distributed.row_sharded import RowSharded
from ..ops.linalg import inner, times

__all__ = [
    "FAILURE",
    "NOT_ZERO",
    "ORDINARY",
    "PROBES",
    "UNCHANGED",
    "Sketch",
    "in_range",
    "norm_from_log",
    "norm_from_norm",
    "norm_from_probes",
    "norms",
    "rescale",
    "sketch_triplets",
    "spectral_estimates",
    "storage",
    "svd_loss",
    "unit_exponent",
    "unit_roundoff",
]

PROBES = 12
NOT_ZERO = torch.finfo(torch.float64).tiny
UNCHANGED = "nothing was changed"  # end of the errors that values cause
ORDINARY = 20  # matrices with norms from 2^-ORDINARY to 2^ORDINARY are computed as they are
FAILURE = 5e-12  # failure probability of one inequality; an error bound combines fewer than two hundred


@lru_cache
def _factor(probes: int) -> float:
    """The factor ``1 / sqrt(c p)`` from ``||R Omega||_F`` to the bound of ``||R||_F``, by bisection for c."""
    low, high = 1e-20, 1.0
    for _ in range(100):
        c = math.sqrt(low * high)
        low, high = (c, high) if probes / 2 * (1 - c + math.log(c)) <= math.log(FAILURE) else (low, c)
    return 1 / math.sqrt(low * probes)


def norm_from_log(log_norm: float, probes: int, power: int = 1) -> float:
    """Upper bound of ||R||_2 (of ||R||_F for ``power`` 1) from the logarithm of the Frobenius norm of a sketch.

    The sketch is ``R Omega``, ``R^T R Omega``, ``R R^T R Omega``, ... with ``power`` factors.
    """
    return math.exp((math.log(_factor(probes)) + log_norm) / power)


def norm_from_probes(sketch: Tensor) -> float:
    """Upper bound of ||R||_F from the sketch ``R Omega`` ``[., p]``."""
    return norm_from_norm(float(torch.linalg.vector_norm(sketch.double())), sketch.shape[1])


def norm_from_norm(norm: float, probes: int = PROBES) -> float:
    """Upper bound of ||R||_F from the Frobenius norm of the sketch ``R Omega`` with p = ``probes`` columns."""
    return _factor(probes) * norm


@dataclass
class Sketch:
    """Backward error of r computed singular triplets: distance of X to a matrix that has exactly these triplets."""

    bound: float  # upper bound of the Frobenius norm; fails with probability at most 4 FAILURE
    spectral: float  # estimate of the spectral norm, the residual of each triplet weighted by its gain
    columns: Tensor  # [r] estimates of the squared residual norm of each triplet


def sketch_triplets(X: RowSharded, U: Tensor, s: Tensor, V: Tensor, gain: Tensor, generator: torch.Generator) -> Sketch:
    """Backward error of the triplets U ``[m, r]``, s ``[r]``, V ``[n, r]`` of X ``[m, n]``, from probes in fp64.

    For orthonormal U and V the nearby matrix that has exactly these triplets is
    ``U diag(s) V^T + (I - U U^T) X (I - V V^T)``, at a distance of at most
    ``(||X^T U - V s||^2 + ||X V - U s||^2)^(1/2)``. Computed U and V stand for the nearest orthonormal matrices, which
    moves U s by about ``||(U^T U - I) s|| / 2``; the bound adds the whole norm. ``gain`` ``[r]`` weights the residual
    of each triplet by its effect on the result; it enters the estimate only, never the bound.
    """
    draw = {"generator": generator, "dtype": torch.float64, "device": V.device}
    right, inside = torch.randn(X.n, PROBES, **draw), torch.randn(len(s), PROBES, **draw)
    scaled = s[:, None] * inside
    V_inside, V_scaled = times(V, torch.cat([inside, scaled], 1)).split(PROBES, 1)
    X_right, X_inside = X.matmul(torch.cat([right, V_inside], 1)).split(PROBES, 1)
    U_scaled = times(U, scaled)
    UX, UU = X.inner(U, torch.cat([X_right, U_scaled], 1)).split(PROBES, 1)
    VR, VV = inner(V, torch.cat([right, V_scaled], 1)).split(PROBES, 1)
    left = UX - s[:, None] * VR  # (X^T U - V s)^T Omega
    F = X_inside - U_scaled
    squares = [R.mT @ R for R in (left, F, UU - scaled, VV - scaled, gain[:, None] * left)]
    squares[1] = X.all_reduce(squares[1])
    K, columns = X.broadcast(torch.stack(squares)), X.broadcast(left.square().mean(1))
    traces = K.diagonal(dim1=1, dim2=2).sum(1).tolist()
    if not math.isfinite(sum(traces)):
        return Sketch(math.inf, math.inf, torch.full_like(s, math.inf))
    E, F, skew_U, skew_V, _ = (_factor(PROBES) * math.sqrt(trace) for trace in traces)
    _, about_F, about_skew_U, about_skew_V, about_E = spectral_estimates(K)
    spectral = math.hypot(about_E, about_F) + about_skew_U + about_skew_V
    return Sketch(math.hypot(E, F) + skew_U + skew_V, spectral, columns)


def spectral_estimates(K: Tensor) -> list[float]:
    """Estimates of ``||R||_2`` of q matrices R, erring upward, from the sketches' Gram matrices ``[q, p, p]``.

    ``K = (R Omega)^T R Omega`` gives the Schatten-4 norm ``(tr (R^T R)^2)^(1/4) >= ||R||_2``, unbiased up to the root:
    two independent probes x, y have ``E (x^T R^T R y)^2 = tr (R^T R)^2``. The variance grows as the effective rank of R
    (``1 / concentration``) falls, so the estimate is inflated by up to a factor of 2, for rank 1.
    Source: Kong & Valiant, Ann. Stat. 45(5), 2017, section 2.
    """
    p, trace = K.shape[-1], K.diagonal(dim1=1, dim2=2).sum(1).clamp_min(NOT_ZERO)
    K = K / trace[:, None, None]  # so that the squares below cannot overflow
    pairs = K.square().sum((1, 2)) - K.diagonal(dim1=1, dim2=2).square().sum(1)
    fourth = pairs.clamp_min(0) / (p * (p - 1))
    concentration = (fourth * p**2).clamp_max(1)
    return (trace.sqrt() * fourth.sqrt().sqrt() * (1 + concentration)).tolist()


def svd_loss(dtype: torch.dtype, m: int, n: int) -> float:
    """Backward error of a dense SVD of a matrix ``[m, n]``, relative to its Frobenius norm.

    ``p(m, n) eps`` with ``p = 2 sqrt(min(m, n)) max(m, n)``. Source: LAPACK Users' Guide, 4.9.
    """
    return 2 * min(m, n) ** 0.5 * max(m, n) * torch.finfo(dtype).eps


def unit_roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff ``u = eps / 2`` of round-to-nearest in ``dtype``."""
    return torch.finfo(dtype).eps / 2


def in_range(dtype: torch.dtype, *values: float) -> bool:
    """Whether squares of the values neither overflow nor underflow in ``dtype``, with a margin of 1e6 both ways."""
    info = torch.finfo(dtype)
    low, high = 1e6 * math.sqrt(info.smallest_normal), 1e-6 * math.sqrt(info.max)
    return all(low < value < high for value in values)


def rescale(x, exponents: int | Sequence[int]):
    """``2^e x`` of a number or tensor x, or of B matrices ``[B, ...]`` with one e each; exact within the range of fp64.

    In two steps, as a single factor may be out of range.
    """
    if isinstance(exponents, int):
        half = exponents // 2
        return x * 2.0**half * 2.0 ** (exponents - half) if exponents else x
    halves = [[2.0 ** (e // 2), 2.0 ** (e - e // 2)] for e in exponents]
    factors = torch.tensor(halves, dtype=torch.float64, device=x.device).reshape(-1, 2, *[1] * (x.ndim - 1))
    return x * factors[:, 0] * factors[:, 1]


def unit_exponent(norm: float) -> int:
    """Exponent e of the power of two with ``2^e norm`` near 1; 0 where squares and products are in every range."""
    return 0 if norm == 0 or 2.0**-ORDINARY <= norm <= 2.0**ORDINARY else -math.frexp(norm)[1]


def norms(W: Tensor) -> Tensor:
    """Upper bounds of ||W||_F of matrices ``[..., m, n]``, at most 1 % too large: fp64 ``[...]`` on the CPU.

    Finite for finite W: matrices whose squares would overflow or underflow are scaled first.
    """
    if not W.numel():
        return torch.zeros(W.shape[:-2], dtype=torch.float64)
    dtype = torch.promote_types(W.dtype, torch.float32)
    found = torch.linalg.vector_norm(W, dim=(-2, -1), dtype=dtype).double().cpu()
    if not in_range(dtype, float(found.min()), float(found.max())):
        scale = W.abs().amax((-2, -1), keepdim=True).double().clamp_min(torch.finfo(torch.float64).tiny)
        found = (torch.linalg.vector_norm(W.double() / scale, dim=(-2, -1)) * scale[..., 0, 0]).cpu()
    return 1.01 * found


def storage(dtype: torch.dtype, norm: float, numel: int) -> float:
    """Bound of the storage error: Frobenius norm of the rounding of a matrix to ``dtype``, subnormals included."""
    info = torch.finfo(dtype)
    return info.eps / 2 * norm + math.sqrt(numel) * info.smallest_normal * info.eps
