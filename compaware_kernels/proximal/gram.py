"""Dense routes of the solver: f(X) of one matrix X ``[m, n]``, m >= n, by the Gram matrix or by an SVD in fp64.

The Gram route factorizes ``X^T X`` ``[n, n]``,

``X^T X = V diag(s^2) V^T``,   ``f(X) = X V diag(g(s)) V^T``,   ``g(s) = f(s) / s``

which squares the condition number. If the computed factorization is the exact one of ``X^T X + E``, then the error of
the result, between an exact eigenvector (singular value s_i) and a computed one (t_j), is

    ``E_ij s_i (g(t_j) - g(s_i)) / (t_j^2 - s_i^2)``.

For an SVT, ``g(s) = max(1 - tau / s, 0)``, the factor of E_ij is 0 if neither s_i nor t_j exceeds tau, else at most
``1 / max(s_i, t_j)``. So the error relative to tau is about ``eps (s_1 / tau)^2``, which decides the precision: fp32,
fp64, or no Gram matrix. A function whose g changes by at most ``slope`` times as much as that of the SVT has at most
``slope`` times the error; for the firm threshold, g is ``slope min(g_svt, 1 / slope)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.row_sharded import RowSharded
from ..ops.linalg import gram
from .error_bounds import NOT_ZERO, PROBES, norm_from_norm, norm_from_probes, svd_loss, unit_roundoff
from .spectral_functions import Spectral

__all__ = ["EIGH_LOSS", "GRAM_LOSS", "Dense", "by_gram", "by_svd", "gram_error", "split", "top_eigenvalue"]

GRAM_LOSS = 32  # spectral error of the SVT, in units of u s_1^2 / tau; measured: up to 21
EIGH_LOSS = 400  # ||V diag(w) V^T - G||_F in units of u trace(G), fp64; measured: up to 82 (all ones, n <= 1500)


@dataclass
class Dense:
    """Factors of a dense result: ``f(X) = X K`` or, if ``residual``, ``X - X K``; ``K = L R^T``, or L if R is None."""

    L: Tensor  # [n, r], or K itself [n, n]
    R: Tensor | None  # [n, r]
    residual: bool
    s: Tensor  # [k] fp64, descending: the singular values of X
    V: Tensor  # [n, k]
    error: float  # bound of the Frobenius error of f(X) due to the factorization
    method: str


def by_gram(X: RowSharded, function: Spectral, tol: float, norm: float, generator: torch.Generator) -> Dense | None:
    """Spectral function f of X ``[m, n]`` by an eigendecomposition of the Gram matrix ``[n, n]``.

    None if the function does not allow the Gram matrix, or if even fp64 would miss ``tol``: the tolerance relative to
    tau for an SVT; f has ``slope`` times this tolerance.
    """
    if not function.gram:
        return None
    tau = function.floor
    for dtype in (torch.float32, torch.float64):
        u = unit_roundoff(dtype)
        if unit_roundoff(X.X.dtype) < u or u * norm > tau:
            continue
        G = X.gram(dtype)
        if GRAM_LOSS * u * X.broadcast_float(top_eigenvalue(G)) > tol * tau**2:
            continue
        found = _eigh(G, X)
        if found is None:
            continue
        w, V = X.broadcast(found[0]), found[1]
        if GRAM_LOSS * u * float(w[-1]) > tol * tau**2:  # top_eigenvalue was only an estimate
            continue
        s, V = w.double().clamp_min(0).sqrt().flip(0), V.flip(1)
        gain = function(s) / s.clamp_min(NOT_ZERO)
        K = split(V, gain)
        if dtype == torch.float32:
            error = gram_error(X, V, s, gain, K, tau, generator)
        else:  # rounding of the sums of m products, in any order, and the backward error of eigh
            error = (X.m + EIGH_LOSS) * u * norm**2 / tau
        return Dense(*K, s, V, function.slope * error, f"gram, fp{torch.finfo(dtype).bits}")
    return None


def _eigh(G: Tensor, X: RowSharded) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues ``[n]``, ascending, and eigenvectors ``[n, n]`` of G; None on all ranks if LAPACK fails on any.

    Divide and conquer in fp32 may fail to converge if most eigenvalues are zero, e.g. in a layer of dead neurons, and
    may give eigenvectors with NaN if entries of G are subnormal.
    """
    try:
        found = torch.linalg.eigh(G)
        found = found if bool(found.eigenvectors.isfinite().all()) else None
    except torch.linalg.LinAlgError:
        found = None
    failed = X.all_reduce(torch.tensor(float(found is None), device=G.device)) if X.groups else found is None
    return None if failed else (found[0], found[1])


def by_svd(X: RowSharded, function: Spectral, norm: float) -> Dense:
    """Spectral function f of X ``[m, n]`` by an SVD in fp64; serves every function."""
    _, s, Vh = torch.linalg.svd(X.r_factor(), full_matrices=False)
    s = X.broadcast(s)
    error = (1 + len(X.groups)) * svd_loss(torch.float64, X.m, X.n) * norm  # the QR of each process group loses no more
    error *= function.lipschitz(s, 0.0, error)
    return Dense(*split(Vh.mT, function(s) / s.clamp_min(NOT_ZERO)), s, Vh.mT, error, "svd, fp64")


def split(V: Tensor, gain: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Factors (L, R, residual) of ``K = V diag(gain) V^T``: low-rank if cheaper, else ``I - K`` in full."""
    r = int((gain > 0).sum())
    if 2 * r < V.shape[0]:
        return V[:, :r] * gain[:r].to(V.dtype), V[:, :r], False
    return gram((V * (1 - gain).clamp_min(0).sqrt().to(V.dtype)).mT), None, True


def gram_error(
    X: RowSharded, V: Tensor, s: Tensor, gain: Tensor, K: tuple, tau: float, generator: torch.Generator
) -> float:
    """Upper bound of ``||computed X K - f(X)||_F`` from fp64 probes.

    Three terms: the residual of the factorization, the loss of orthogonality of V, and the rounding of K. With
    ``V^T V = I + 2 S`` both ``V diag(w) V^T`` and K are perturbed in the same direction; by the divided differences
    above, at most ``3 |S_ij| max(s_i, s_j)`` of it remains in X K.
    """
    omega = torch.randn(X.n, PROBES, generator=generator, dtype=torch.float64, device=V.device)
    V = V.double()
    in_V = V.mT @ omega
    L, R, residual = K
    in_K = L.double() @ (omega if R is None else R.double().mT @ omega)
    products = X.matmul(torch.cat([omega, in_K - V @ ((1 - gain if residual else gain)[:, None] * in_V)], 1))
    E = V @ (s.square()[:, None] * in_V) - X.rmatmul(products[:, :PROBES])
    # sqrt(2): rows and columns above tau count alike; 0.9 and 1.1: the computed basis stands in for the exact one.
    factorization = 1.1 * math.sqrt(2) * torch.where(s > 0.9 * tau, 1 / s, 0)[:, None] * (V.mT @ E)
    skew = V.mT @ (V @ (s[:, None] * omega)) - s[:, None] * omega
    rounding = norm_from_norm(X.norm(products[:, PROBES:]))
    return X.broadcast_float(norm_from_probes(factorization) + 3 * norm_from_probes(skew)) + rounding


def top_eigenvalue(G: Tensor) -> float:
    """Estimate of the largest eigenvalue of G ``[n, n]`` by four steps of power iteration."""
    scale = G.diagonal().max().clamp_min(torch.finfo(G.dtype).tiny)
    x = G[:, G.diagonal().argmax(), None] / scale
    for _ in range(4):
        x = (G @ (x / x.norm())) / scale
    return float(x.norm().double() * scale.double())
