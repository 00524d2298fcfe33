"""Subspace iteration: the leading singular triplets of one matrix X ``[m, n]``, m >= n, warm-started or from scratch.

Only products of X with blocks of few columns: no n x n matrix, no O(n^3). V ``[n, k]`` approximates the right singular
vectors: those of the last call, or grown from nothing by blocks ``(X^T X) Omega``. One step of subspace iteration gives
a basis B of the columns of ``X^T X V``, extended by the directions that the singular triplets nearest to the threshold
lack, as these converge last (:func:`torch.ops.compaware.subspace_step`); then Rayleigh-Ritz,

    ``B^T B = L L^T``,   ``L^-1 (X B)^T (X B) L^-T = Q diag(mu^2) Q^T``,   ``V = B T``,   ``T = L^-T Q``,

after which ``X V = U diag(mu)`` holds exactly; all k x k matrices are in fp64. The residual of a triplet (u, mu, v) is
``E = X^T u - mu v``. It is measured by Gaussian probes in fp64, which include rounding errors
(:func:`.error_bounds.sketch_triplets`). If it is too large, the residual directions are appended to B (a block Krylov
step).

The discarded part must have no singular value above the threshold. Ritz triplets near the threshold are verified like
the kept ones. The discarded part consists of the other Ritz pairs, ``U_e diag(mu_e)``, and of ``R = X (I - V V^T)``:
its norm is at most ``sqrt(mu_e^2 + rho^2)``, with rho a bound of ``||R||_2``. The Frobenius norm of R is
``(||X||_F^2 - ||X V||_F^2)^(1/2)``; where that is small enough, no probe is needed. Elsewhere rho comes from probes.

Sources: Rutishauser, Numer. Math. 13, 1969; Halko, Martinsson & Tropp, SIAM Review 53(2), 2011; Musco & Musco, NIPS
2015 (block Krylov).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.constants import constant
from ..distributed.row_sharded import RowSharded
from ..ops.linalg import COLUMNS, inner, product, subspace_step, times, without
from .error_bounds import RitzPairs, Sketch, norm_from_log, sketch_triplets, unit_roundoff
from .gram import EIGH_LOSS

__all__ = [
    "FIRST",
    "MARGIN",
    "NEAR",
    "PROBES",
    "SPARE",
    "Subspace",
    "Triplets",
    "columns_for",
    "even",
    "orthonormalize",
    "outside",
]

SPARE = 8  # oversampling: right singular vectors kept beyond the rank, which track the next singular values
FIRST = 32  # columns of a cold start
PROBES = 24  # probes for the bound of ||X (I - V V^T)||_2
MAX_PASSES, MAX_POWER = 5, 6
MARGIN = constant("kMargin")  # safety factor of the estimate of the spectral norm
RESOLVED = constant("kResolved")  # triplets below RESOLVED mu_1 are not verified
NEAR = constant("kNear")  # triplets above NEAR threshold are verified like the kept ones
QUIET = 0.6  # rho below QUIET threshold is small enough: sqrt(0.8^2 + 0.6^2) = 1, with NEAR = 0.8
WELL = 0.1  # smallest diagonal entry of the Cholesky factor of unit columns for which fp32 suffices


@dataclass
class Triplets:
    """Approximate singular triplets of X ``[m, n]`` above a threshold, with what error bounds need."""

    U: Tensor  # [m, r]
    s: Tensor  # [r] fp64, descending
    V: Tensor  # [n, r]
    sketch: Sketch  # backward error of the triplets
    tail: float  # >= (sum (sigma_i - threshold)_+^2)^(1/2) over the discarded singular values
    below: float  # >= the largest discarded singular value
    basis: Tensor  # [n, k] V and approximations of the next right singular vectors, for a warm start


class Subspace:
    """Subspace iteration for the singular triplets of X ``[m, n]`` above a threshold, or the ``count`` leading ones.

    Args:
        X: the matrix, m >= n, possibly row-sharded.
        threshold: singular values above it are computed; ignored if ``count`` is given: then it is the count-th
            singular value.
        V: ``[n, k]`` initial right singular vectors, nearly orthonormal; k = 0 for a cold start. Sets the dtype.
        tol: tolerance of the result relative to the threshold, in the spectral norm.
        generator: draws the probes; V must be independent of it.
        max_columns: give up if V needs more columns.
        slack: bound of the rounding error of a product of X with a unit vector.
        square: ``||X||_F^2``, up to the rounding errors of sums in fp64.
        gain: effect of a unit residual of each triplet on the result: (s ``[r]``, upper bound of all other singular
            values) -> ``[r]``.
        count: number of leading triplets.
    """

    def __init__(
        self,
        X: RowSharded,
        threshold: float,
        V: Tensor,
        tol: float,
        generator: torch.Generator,
        *,
        max_columns: int,
        slack: float,
        square: float,
        gain: Callable[[Tensor, float], Tensor],
        count: int | None = None,
    ):
        self.X, self.threshold, self.V, self.tol, self.generator = X, threshold, V, tol, generator
        self.max_columns, self.slack, self.square, self.gain, self.count = max_columns, slack, square, gain, count
        self.rho = math.inf  # >= ||X (I - V V^T)||_2
        self.passes = self.products = 0
        self.too_wide = False  # needs more than max_columns, in any precision

    def run(self) -> Triplets | None:
        """The triplets, or None if a dense factorization should be used instead."""
        found = self._polish() if self.V.shape[1] else None
        if found or self.too_wide or (self.V.shape[1] and self.rho <= self.threshold):
            return found
        wanted = self.V.shape[1] // 2 or max(FIRST, columns_for(self.count or 0))
        return self._polish() if self._cover(wanted) else None

    def _cover(self, columns: int) -> bool:
        """Append random blocks to V until rho <= threshold; False if that takes more than max_columns."""
        while not self.rho <= self.threshold:
            W = without(self._draw(even(columns)), self.V)
            B = self._matmul(W)
            Z = self._rmatmul(B)
            W = outside(Z, self.V, self.X)
            if not self._fits(max(W.shape[1], _effective_rank(B, Z, self.X))):
                return False
            self.V = torch.cat([self.V, W], 1)
            if self.count is not None:
                B = self._matmul(self.V)
                self._choose(torch.linalg.eigvalsh(self.X.inner(B, B)))
            self._bound_rest()
            columns = self.V.shape[1] // 2
        return True

    def _polish(self) -> Triplets | None:
        """Subspace iteration from V, extended by residual directions until the tolerance is met; None if it fails.

        Leaves orthonormal Ritz vectors in V.
        """
        source = None
        for step in range(MAX_PASSES):
            if not (self._extend(source) if step else self._start()):
                return None
            self.passes += 1
            found = self._rayleigh_ritz()
            if found is None:
                return None
            pairs, U = found
            if self.checked < self.rank or not self.threshold > 0:
                self._bound_rest()
                return None
            guess = min(self.rho, math.sqrt(max(0.0, self.square - float(pairs.s.square().sum()))))
            gain = self.gain(pairs.s[: self.checked], guess)
            sketch = sketch_triplets(self.X, pairs, U, self.V[:, : self.checked], gain, self.generator)
            if not self._certify(pairs.s, sketch):
                return None
            tail = self._tail(sketch)
            if MARGIN * sketch.spectral + tail <= self.tol * self.threshold:
                return self._result(pairs.s, U, sketch, tail)
            source = U[:, gain**2 * sketch.columns > (0.5 * self.tol * self.threshold) ** 2 / max(1, self.rank)]
            self._rotate(pairs)
        return None

    def _certify(self, s: Tensor, sketch: Sketch) -> bool:
        """Whether rho, lowered from the Frobenius norm alone or, if that is not enough, from probes, is small enough.

        ``||X (I - V V^T)||_F^2 = ||X||_F^2 - ||X V||_F^2``
        """
        lost = (self.X.m + EIGH_LOSS) * unit_roundoff(torch.float64) * self.square
        rest = self.X.broadcast_float(self.square - float(s.square().sum())) + sketch.missing + lost
        rho = math.sqrt(max(0.0, rest)) if rest < math.inf else math.inf
        enough = QUIET * self.threshold
        if self.count is None:  # the largest discarded Ritz value and R together
            enough = math.sqrt(
                max(0.0, self.threshold**2 - max(self.mu[self.checked : self.checked + 1], default=0.0) ** 2)
            )
        self.rho = min(self.rho, rho)
        if not self.rho <= enough:
            self._bound_rest()
        return self.rho <= self.threshold

    def _fits(self, columns: int) -> bool:
        """Whether V may grow by so many columns."""
        self.too_wide = self.V.shape[1] + columns > self.max_columns
        return columns > 0 and not self.too_wide

    def _start(self) -> bool:
        """Make a basis B of the columns of ``X^T X V``, and ``Y = X B``; False if too wide, or not finite."""
        k = self.V.shape[1]
        if k > self.max_columns:
            self.too_wide = True
            return False
        self.products += 3 * k
        found = 0
        if not self.X.groups and self.V.dtype == torch.float32:
            self.B, self.Y, self.BtB, self.YtY = subspace_step(self.X.X, self.V, NEAR * self.threshold)
            found = self.B.shape[1]
            self.products += 2 * max(0, found - k)
        if not found:  # sharded, in fp64, or nearly dependent columns
            source = self.X.normalize_columns(self.X.matmul(self.V))
            self.B = torch.linalg.qr(self.X.rmatmul(source)).Q
            self.Y = self.X.matmul(self.B)
            self.BtB, self.YtY = inner(self.B, self.B), self.X.inner(self.Y, self.Y)
        return math.isfinite(float(self.YtY.trace()))

    def _extend(self, source: Tensor) -> bool:
        """Append the directions ``X^T source`` outside of the basis; False if none, too wide, or not finite."""
        if not source.shape[1]:
            return False
        B = outside(self._rmatmul(source), self.B, self.X)
        if not self._fits(B.shape[1]):
            return False
        Y = self._matmul(B)
        self.BtB = _bordered(self.BtB, inner(self.B, B), inner(B, B))
        self.YtY = _bordered(self.YtY, self.X.inner(self.Y, Y), self.X.inner(Y, Y))
        self.B, self.Y = (torch.cat(pair, 1) for pair in ((self.B, B), (self.Y, Y)))
        return math.isfinite(float(self.YtY.trace()))

    def _rayleigh_ritz(self) -> tuple[RitzPairs, Tensor] | None:
        """Ritz pairs of the basis, their V into self.V, U ``[m, c]`` of those to verify; None: it is dependent."""
        L, failed = torch.linalg.cholesky_ex(self.BtB)
        if self.X.broadcast_float(float(failed)):
            return None
        M = torch.linalg.solve_triangular(L, self.YtY, upper=False)
        M = torch.linalg.solve_triangular(L, M.mT, upper=False)
        squares, Q = torch.linalg.eigh(M)
        self._choose(squares)
        s = torch.tensor(self.mu, dtype=torch.float64, device=Q.device)
        T = torch.linalg.solve_triangular(L.mT, Q.flip(1), upper=True)
        self.V = product(self.B, T.to(self.B.dtype))
        U = product(self.Y, (T[:, : self.checked] / s[: self.checked]).to(self.B.dtype))
        return RitzPairs(self.B, self.Y, T, s), U

    def _rotate(self, pairs: RitzPairs) -> None:
        """Make the Ritz vectors the basis, so that directions outside can be appended."""
        self.B, self.Y = self.V, product(self.Y, pairs.T.to(self.Y.dtype))
        self.BtB, self.YtY = inner(self.B, self.B), self.X.inner(self.Y, self.Y)

    def _choose(self, squares: Tensor) -> None:
        """Set mu, descending, from ascending squares ``[k]``, and how many triplets to keep and to verify."""
        mu = self.mu = [math.sqrt(max(square, 0.0)) for square in reversed(self.X.broadcast(squares).tolist())]
        if self.count is not None:
            self.threshold = mu[self.count - 1] if len(mu) >= self.count else 0.0
        self.rank = sum(x > self.threshold for x in mu) if self.count is None else min(self.count, len(mu))
        near = sum(x > NEAR * self.threshold for x in mu)
        self.checked = min(max(1, self.rank, near), columns_for(self.rank), sum(x > RESOLVED * mu[0] for x in mu))

    def _bound_rest(self) -> None:
        """Lower rho >= ||R||_2, R = X (I - V V^T), from probes of the powers R Omega, R^T R Omega, ...

        The bound stays valid later: extending V, or a step of subspace iteration, can only make ||R||_2 smaller.
        """
        y = without(self._draw(PROBES), self.V)
        power, growth, log_norm = 0, 0.0, 0.0
        while power < MAX_POWER and growth < self.threshold and self.rho > QUIET * self.threshold:
            ahead = power % 2 == 0
            y = self._matmul(y) if ahead else without(self._rmatmul(y), self.V)
            norm = self.X.norm(y) if ahead else self.X.broadcast_float(float(torch.linalg.vector_norm(y)))
            power += 1
            if norm == 0:
                self.rho = min(self.rho, self.slack)
                break
            y, log_norm, growth = y / norm, log_norm + math.log(norm), norm if power > 1 else 0.0
            self.rho = min(self.rho, norm_from_log(log_norm, PROBES, power) + self.slack)

    def _tail(self, sketch: Sketch) -> float:
        """Upper bound of (sum (sigma_i - threshold)_+^2)^(1/2) over the discarded singular values."""
        if not self.rho <= self.threshold:
            return math.inf
        sigma = (math.hypot(x, self.rho) for x in self.mu[self.checked :])  # Weyl; all others are at most rho
        return math.hypot(*(max(0.0, x + self.slack + sketch.bound - self.threshold) for x in sigma))

    def _result(self, s: Tensor, U: Tensor, sketch: Sketch, tail: float) -> Triplets:
        r, c = self.rank, self.checked
        below = max(math.hypot(*self.mu[c : c + 1], self.rho), *self.mu[r : r + 1], 0.0)
        basis = self.V[:, : columns_for(r)]
        return Triplets(U[:, :r], s[:r], basis[:, :r], sketch, tail, below, basis)

    def _draw(self, columns: int) -> Tensor:
        return torch.randn(self.X.n, columns, generator=self.generator, dtype=self.V.dtype, device=self.V.device)

    def _matmul(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.X.matmul(V)

    def _rmatmul(self, Y: Tensor) -> Tensor:
        self.products += Y.shape[1]
        return self.X.rmatmul(Y)


def _bordered(G: Tensor, cross: Tensor, own: Tensor) -> Tensor:
    """Gram matrix of two blocks of columns."""
    return torch.cat([torch.cat([G, cross], 1), torch.cat([cross.mT, own], 1)])


def _effective_rank(B: Tensor, Z: Tensor, X: RowSharded) -> int:
    """Effective rank ``(sum sigma^2)^2 / sum sigma^4`` of R, estimated from B = R Omega and Z = R^T R Omega."""
    first, second = X.norm(B.double()), X.broadcast_float(float(torch.linalg.vector_norm(Z, dtype=torch.float64)))
    return int((first * (first / second)) ** 2 / B.shape[1]) if second else 0  # in this order, no overflow


def outside(Y: Tensor, V: Tensor, X: RowSharded) -> Tensor:
    """Orthonormal basis ``[n, <= b]`` of ``(I - V V^T) Y``, Y ``[n, b]``, without directions that are only rounding.

    Identical on all ranks that share X.
    """
    if not V.shape[1]:
        return orthonormalize(Y)
    W = without(orthonormalize(without(Y, V)), V)
    norms = X.broadcast(torch.linalg.vector_norm(W, dim=0))
    return W if bool((norms > 1 - 1e-5).all()) else without(orthonormalize(W[:, norms > 0.1]), V)


def orthonormalize(B: Tensor) -> Tensor:
    """Orthonormal basis ``[n, b]`` of the columns of B ``[n, b]``.

    Cholesky QR in fp64 on columns scaled to unit length; Householder QR if they are nearly dependent.
    """
    G = inner(B, B)
    scale = G.diagonal().sqrt()
    L, failed = torch.linalg.cholesky_ex(G / scale / scale[:, None])
    smallest = 0.0 if int(failed) or not len(L) else float(L.diagonal().min())
    if not smallest > 1e-3:  # or NaN, of a zero column
        return torch.linalg.qr(B).Q
    S = torch.linalg.solve_triangular(L, torch.diag(1 / scale), upper=False).mT
    return product(B, S.to(B.dtype)) if smallest > WELL else times(B, S).to(B.dtype)


def even(columns: int) -> int:
    """``columns`` rounded up to a multiple of COLUMNS, so that few matrix shapes occur."""
    return -columns // COLUMNS * -COLUMNS


def columns_for(rank: int) -> int:
    """Columns of a basis kept for this rank: oversampled by SPARE and rounded up."""
    return even(rank + SPARE)
