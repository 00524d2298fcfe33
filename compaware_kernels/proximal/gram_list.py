"""Gram route of small matrices: spectral functions of a list of any shapes, all of them in a few calls.

For X ``[m, n]`` with m >= n, else its transpose, by the eigenvectors of ``X^T X`` above the threshold, in fp64
(:func:`torch.ops.compaware.gram_eigh`): ``f(X) = X V diag(g(s)) V^T``, ``g(s) = f(s) / s``. Accuracy: as :mod:`.gram`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.dtypes import compute_dtype
from ..ops.linalg import gram_eigh
from . import jacobi
from .error_bounds import NOT_ZERO, ORDINARY, norms, storage, unit_roundoff
from .gram import EIGH_LOSS, GRAM_LOSS
from .spectral_functions import Spectral, batched

__all__ = ["LIGHT", "LONGEST", "MEDIUM", "Listed", "compute", "served"]

LIGHT, MEDIUM, LONGEST = 4096, 128, 4096  # limits: m n^2 of what Jacobi does as fast; largest n; largest m
PRODUCTS = 32  # error of X V diag(g) V^T, in units of u ||X||_F, as assumed to choose the dtype of the products
U64, U32 = unit_roundoff(torch.float64), unit_roundoff(torch.float32)


class Listed(jacobi.Group):
    """All matrices of one weight ``[..., m, n]``, and their results."""

    each: list[One]

    @property
    def possible(self) -> bool:
        """Whether the route can serve the shape and the function."""
        n, m = sorted(self.W.shape[-2:])
        return self.function.gram and 0 < n <= MEDIUM and m <= LONGEST and self.W.numel() > 0 and not self.W.is_cuda

    @property
    def light(self) -> bool:
        """Whether Jacobi is as fast for a matrix of this shape."""
        return self.W.shape[-2:].numel() * min(self.W.shape[-2:]) <= LIGHT

    def meets(self, tol: float) -> bool:
        """Whether fp64 is precise enough for all matrices, and none is zero after the step or has an extreme norm."""
        tau, least, most = self.function.floor, min(one.norm for one in self.each), max(one.norm for one in self.each)
        ordinary = tau < least and least >= 2.0**-ORDINARY and most <= 2.0**ORDINARY
        return ordinary and U64 * most <= tau and GRAM_LOSS * U64 * most**2 <= self.function.tolerance(tol) * tau**2


@dataclass
class One:
    """One matrix, its function, and the result."""

    X: Tensor  # [m, n], fp32 or fp64
    function: Spectral
    norm: float = 0.0  # >= ||X||_F
    P: Tensor | None = None
    error: float = 0.0  # bound of the Frobenius error of P

    def apply(self, V: Tensor, gain: Tensor, r: int, tol: float, ball: bool) -> None:
        """Set P: ``X K``, K = V diag(gain) V^T, or ``K X`` if X is wide, or X minus that; V: r rows ``[k]``, flat."""
        f, (k, longer) = self.function, sorted(self.X.shape)
        coarse = PRODUCTS * U32 * self.norm > f.tolerance(tol) * f.floor
        dtype = torch.float64 if coarse else self.X.dtype
        X, V, gain = self.X.to(dtype), V.view(k, k)[:r].to(dtype), gain[:r].to(dtype)
        left, right = (X @ V.mT * gain, V) if X.shape[0] == longer else (V.mT * gain, V @ X)
        self.P = torch.addmm(X, left, right, beta=float(ball), alpha=-1 if ball else 1)
        self.error = f.slope * (longer + EIGH_LOSS) * U64 * self.norm**2 / f.floor
        self.error += (k + r + 1) * unit_roundoff(dtype) * self.norm


def served(groups: dict[int, Listed], tol: float) -> dict[int, Listed]:
    """The weights that the route serves; none if all are light."""
    groups = {i: entry for i, entry in groups.items() if entry.possible}
    if all(entry.light for entry in groups.values()):
        return {}
    for entry in groups.values():
        X = entry.matrices()
        entry.each = [One(M, entry.function) for M in X.to(compute_dtype(X.dtype)).unbind()]
    each = [one for entry in groups.values() for one in entry.each]
    for one, norm in zip(each, torch._foreach_norm([one.X for one in each]), strict=True):
        one.norm = 1.01 * float(norm)
    return {i: entry for i, entry in groups.items() if entry.meets(tol)}


def compute(groups: Sequence[Listed], tol: float, ball: bool) -> None:
    """Compute the results of all groups; weights stay unchanged."""
    each, counts = [one for entry in groups for one in entry.each], [len(entry.each) for entry in groups]
    w, V = _eigenpairs(each)
    s = w.sqrt()
    new = batched([entry.function for entry in groups], counts)(s)
    gain, kept = new / s.clamp_min(NOT_ZERO), (s > 0).sum(1).tolist()
    for one, *factors in zip(each, V, gain, kept, strict=True):
        one.apply(*factors, tol, ball)
    for entry in groups:
        if entry.center is not None:
            for one, C in zip(entry.each, entry.center.reshape(-1, *entry.W.shape[-2:]), strict=True):
                one.P = one.P + C.to(one.P.dtype)
    stored = map(float, torch._foreach_norm([one.P for one in each]))
    parts = zip(groups, new.split(counts), (new > 0).sum(1).split(counts), strict=True)
    for entry, spectra, ranks in parts:
        _report(entry, [1.01 * next(stored) for _ in entry.each], spectra, ranks)


def _report(entry: Listed, stored: Sequence[float], spectra: Tensor, ranks: Tensor) -> None:
    """Set the results of a weight: norms of what is stored, singular values ``[B, K]`` and ranks ``[B]``."""
    (*batch, m, n), dtype, narrow = entry.W.shape, entry.W.dtype, entry.stored_as or entry.W.dtype
    entry.P = entry.each[0].P if entry.W.ndim == 2 else torch.stack([one.P for one in entry.each]).view(entry.W.shape)
    if not max(stored) <= torch.finfo(narrow).max:
        jacobi.check_each([entry], [1], entry.P.to(narrow).isfinite().all()[None], f"a result that fits {narrow}")
        stored = norms(entry.P).flatten().tolist()
    rounding = 2 * storage(dtype, 1.0, 0), storage(dtype, 0.0, m * n)  # twice: adding the center, storing the result
    error = [one.error + rounding[0] * norm + rounding[1] for one, norm in zip(entry.each, stored, strict=True)]
    entry.error = torch.tensor(error, dtype=torch.float64).view(batch)
    entry.s, entry.rank, entry.method = spectra[:, : min(m, n)].reshape(*batch, -1), ranks.view(batch), "gram, fp64"


def _eigenpairs(each: Sequence[One]) -> tuple[Tensor, list[Tensor]]:
    """Eigenvalues above the thresholds of the Gram matrices, ``[L, K]``, then zeros, and eigenvectors, rows, flat."""
    X, floor = [one.X for one in each], torch.tensor([one.function.floor**2 for one in each], dtype=torch.float64)
    w, V, residuals = torch.ops.compaware.gram_eigh(X, floor)
    V = list(V.split([min(M.shape) ** 2 for M in X]))
    for i, (one, residual) in enumerate(zip(each, residuals.tolist(), strict=True)):
        if not residual <= EIGH_LOSS * U64 * one.norm**2:
            own, V[i], _ = gram_eigh._init_fn(X[i : i + 1], floor[i : i + 1])  # by LAPACK
            w[i, : own.shape[1]] = own[0]
    return w, V
