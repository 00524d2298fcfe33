"""Spectral shrinkage of one matrix by a full factorisation: the Gram matrix of the short side, or an SVD in fp64.

``X^T X = V diag(s^2) V^T``,   ``f(X) = X V diag(g(s)) V^T``,   ``g(s) = f(s) / s``

squares the condition number. Where the factorisation is that of ``X^T X + E``, the result is wrong by, between a vector
of the exact eigenbasis (s_i) and one of the computed (t_j),

    ``E_ij s_i (g(t_j) - g(s_i)) / (t_j^2 - s_i^2)``.

For an SVT, ``g(s) = max(1 - tau / s, 0)``, the factor of E_ij is 0 where neither s_i nor t_j is above tau, else at most
``1 / max(s_i, t_j)``. So the error relative to tau is some ``eps (s_1 / tau)^2``, and by that the precision is chosen:
fp32, fp64, or no Gram matrix. Any other function whose g changes by at most ``slope`` times as much errs by at most
slope times as much: the firm threshold's is ``slope min(g, 1 / slope)`` of this g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.row_sharded import RowSharded
from ..ops.linalg import product
from .error_bounds import NOT_ZERO, PROBES, in_range, norm_from_norm, norm_from_probes, svd_loss, unit_roundoff
from .spectral_functions import Spectral

GRAM_LOSS = 32  # spectral error of the SVT, in units of u s_1^2 / tau; measured: up to 21
EIGH_LOSS = 400  # ||V diag(w) V^T - G||_F in units of u trace(G), fp64; measured: up to 82 (all ones, n <= 1500)


@dataclass
class Dense:
    """``f(X) = X K`` or, where ``residual``, ``X - X K``, with ``K = L R^T``, or L where R is None."""

    L: Tensor  # [n, r], or K [n, n]
    R: Tensor | None  # [n, r]
    residual: bool
    s: Tensor  # [k] fp64, descending: the singular values of X
    V: Tensor  # [n, k]
    error: float  # of f(X), from the factorisation
    method: str


def by_gram(X: RowSharded, function: Spectral, tol: float, norm: float, generator: torch.Generator) -> Dense | None:
    """Through the Gram matrix, where the function allows it; None where even fp64 would not give ``tol``.

    tol: relative to tau, for an SVT; that of the function is ``slope`` times as large.
    """
    if not function.gram:
        return None
    tau = function.floor
    for dtype in (torch.float32, torch.float64):
        u = unit_roundoff(dtype)
        if unit_roundoff(X.X.dtype) < u or u * norm > tau or not in_range(dtype, norm, tau):
            continue
        G = X.gram(dtype)
        if GRAM_LOSS * u * X.broadcast_float(top_eigenvalue(G)) > tol * tau**2:
            continue
        found = _eigh(G, X)
        if found is None:
            continue
        w, V = X.broadcast(found[0]), found[1]
        if GRAM_LOSS * u * float(w[-1]) > tol * tau**2:  # the estimate was one
            continue
        s, V = w.double().clamp_min(0).sqrt().flip(0), V.flip(1)
        gain = function(s) / s.clamp_min(NOT_ZERO)
        K = split(V, gain)
        if dtype == torch.float32:
            error = gram_error(X, V, s, gain, K, tau, generator)
        else:  # a sum of m products, in any order, and what LAPACK does to it
            error = (X.m + EIGH_LOSS) * u * norm**2 / tau
        return Dense(*K, s, V, function.slope * error, f"gram, fp{torch.finfo(dtype).bits}")
    return None


def _eigh(G: Tensor, X: RowSharded) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, ascending, and eigenvectors of G; None where LAPACK does not converge, on any rank.

    The divide and conquer of fp32 may fail where most eigenvalues are zero, as those of a layer of dead neurons.
    """
    try:
        found = torch.linalg.eigh(G)
    except torch.linalg.LinAlgError:
        found = None
    failed = X.all_reduce(torch.tensor(float(found is None), device=G.device)) if X.groups else found is None
    return None if failed else (found[0], found[1])


def by_svd(X: RowSharded, function: Spectral, norm: float) -> Dense:
    """Any function of the spectrum, through an SVD in fp64."""
    _, s, Vh = torch.linalg.svd(X.r_factor(), full_matrices=False)
    s = X.broadcast(s)
    error = (1 + len(X.groups)) * svd_loss(torch.float64, X.m, X.n) * norm  # a QR of as many rows loses no more
    error *= function.lipschitz(s, 0.0, error)
    return Dense(*split(Vh.mT, function(s) / s.clamp_min(NOT_ZERO)), s, Vh.mT, error, "svd, fp64")


def split(V: Tensor, gain: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """L, R and residual for ``V diag(gain) V^T``: the cheaper of what is kept and what is taken away."""
    r = int((gain > 0).sum())
    if 2 * r < V.shape[0]:
        return V[:, :r] * gain[:r].to(V.dtype), V[:, :r], False
    return product(V * (1 - gain).to(V.dtype), V.mT), None, True


def gram_error(
    X: RowSharded, V: Tensor, s: Tensor, gain: Tensor, K: tuple, tau: float, generator: torch.Generator
) -> float:
    """A bound of the error of X K, all of it probed in fp64: the factorisation, V's orthogonality, the product in K.

    With ``V^T V = I + 2 S`` both ``V diag(w) V^T`` and K are off in the same direction: what remains of it in X K is,
    by the quotients above, at most ``3 |S_ij| max(s_i, s_j)``.
    """
    omega = torch.randn(X.n, PROBES, generator=generator, dtype=torch.float64, device=V.device)
    V = V.double()
    in_V = V.mT @ omega
    L, R, residual = K
    in_K = L.double() @ (omega if R is None else R.double().mT @ omega)
    products = X.matmul(torch.cat([omega, in_K - V @ ((1 - gain if residual else gain)[:, None] * in_V)], 1))
    E = V @ (s.square()[:, None] * in_V) - X.rmatmul(products[:, :PROBES])
    # Rows and columns above tau alike; 0.9 and 1.1, since the computed basis stands for the exact one.
    factorisation = 1.1 * math.sqrt(2) * torch.where(s > 0.9 * tau, 1 / s, 0)[:, None] * (V.mT @ E)
    skew = V.mT @ (V @ (s[:, None] * omega)) - s[:, None] * omega
    rounding = norm_from_norm(X.norm(products[:, PROBES:]))
    return X.broadcast_float(norm_from_probes(factorisation) + 3 * norm_from_probes(skew)) + rounding


def top_eigenvalue(G: Tensor) -> float:
    """About the largest eigenvalue, by a few power steps."""
    scale = G.diagonal().max().clamp_min(torch.finfo(G.dtype).tiny)
    x = G[:, G.diagonal().argmax(), None] / scale
    for _ in range(4):
        x = (G @ (x / x.norm())) / scale
    return float(x.norm().double() * scale.double())
