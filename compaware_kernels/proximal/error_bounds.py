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
    "RitzPairs",
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
class RitzPairs:
    """Rayleigh-Ritz pairs of X ``[m, n]`` in the span of a basis B ``[n, k]``, with Y = X B as it was computed.

    ``V = B T`` and ``U = Y T / s`` are orthonormal in exact arithmetic: T comes from ``B^T B`` and ``Y^T Y`` in fp64.
    """

    B: Tensor  # [n, k]
    Y: Tensor  # [m, k]
    T: Tensor  # [k, k] fp64
    s: Tensor  # [k] fp64, descending


@dataclass
class Sketch:
    """Backward error of r computed singular triplets: distance of X to a matrix that has exactly these triplets."""

    bound: float  # upper bound of the Frobenius norm; fails with probability at most 4 FAILURE
    spectral: float  # estimate of the spectral norm, the residual of each triplet weighted by its gain
    columns: Tensor  # [r] estimates of the squared residual norm of each triplet
    missing: float  # >= ||s||^2 - ||X V||_F^2 over all k pairs; fails with probability at most 2 FAILURE


def sketch_triplets(
    X: RowSharded, pairs: RitzPairs, U: Tensor, V: Tensor, gain: Tensor, generator: torch.Generator
) -> Sketch:
    """Backward error of the first r Ritz pairs, stored as U ``[m, r]`` and V ``[n, r]``, from probes in fp64.

    For exactly orthonormal U, V the nearby matrix that has exactly these triplets is
    ``U diag(s) V^T + (I - U U^T) X (I - V V^T)``, at a distance of at most ``(||E||^2 + ||F||^2)^(1/2)``, with
    ``E = X^T U - V s`` and ``F = X V - U s``: the latter is the rounding error of Y. The bound adds what storing U and
    V changes in U s and V s. ``gain`` ``[r]`` weights the residual of each triplet by its effect on the result; it
    enters the estimate only, never the bound.
    """
    B, Y, T, s = pairs.B, pairs.Y, pairs.T, pairs.s
    r, p = len(gain), PROBES
    draw = {"generator": generator, "dtype": torch.float64, "device": B.device}
    right, inside = torch.randn(X.n, p, **draw), torch.randn(len(s), p, **draw)
    kept, scaled, mixed = inside[:r], s[:r, None] * inside[:r], T @ inside
    B_inside, B_scaled = times(B, torch.cat([mixed, T[:, :r] @ scaled], 1)).split(p, 1)
    Y_inside, Y_kept = times(Y, torch.cat([mixed, T[:, :r] @ kept], 1)).split(p, 1)
    X_right, X_inside = X.matmul(torch.cat([right, B_inside], 1)).split(p, 1)
    F = X_inside - Y_inside
    YX, YF = (T.mT @ X.inner(Y, torch.cat([X_right, F], 1))).split(p, 1)
    E = YX[:r] / s[:r, None] - s[:r, None] * (T.mT[:r] @ inner(B, right))
    rows = X.all_reduce(torch.stack([R.mT @ R for R in (F, times(U, scaled) - Y_kept)]))
    parts = (E, times(V, scaled) - B_scaled, gain[:, None] * E, YF)
    K = X.broadcast(torch.cat([rows, torch.stack([R.mT @ R for R in parts])]))
    columns = X.broadcast(E.square().mean(1))
    traces = K.diagonal(dim1=1, dim2=2).sum(1).tolist()
    if not math.isfinite(sum(traces)):
        return Sketch(math.inf, math.inf, torch.full_like(gain, math.inf), math.inf)
    F, in_U, E, in_V, _, correlated = (_factor(p) * math.sqrt(trace) for trace in traces)
    about_F, about_U, _, about_V, about_E, _ = spectral_estimates(K)
    inner_product = X.broadcast_float(float((inside * YF).sum()) / p) - _trace_deviation(correlated, p)
    spectral = math.hypot(about_E, about_F) + about_U + about_V
    return Sketch(math.hypot(E, F) + in_U + in_V, spectral, columns, -2 * inner_product)


def _trace_deviation(norm: float, probes: int) -> float:
    """By how much the mean of x^T M x over Gaussian probes x may exceed tr M; norm: upper bound of ||M||_F.

    Fails with probability at most FAILURE. Source: Laurent & Massart, Ann. Stat. 28(5), 2000, lemma 1.
    """
    t = -math.log(FAILURE) / probes
    return 2 * norm * (math.sqrt(t) + t)


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
