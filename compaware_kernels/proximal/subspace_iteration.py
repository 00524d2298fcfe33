"""The leading singular triplets of one matrix from a subspace of right vectors.

Nothing but products with a few columns: no n x n matrix, no O(n^3). V ``[n, k]`` holds a guess of the right singular
vectors, from the last call and at random, or it is grown from nothing by blocks ``(X^T X) Omega``. One step of subspace
iteration, ``V <- orth(X^T X V)``, and Rayleigh-Ritz,

    ``Y = X V = U diag(mu) Q^T``,   ``V' = V Q``,

after which ``X V' = U diag(mu)`` holds exactly; mu and Q come from ``Y^T Y`` in fp64. What is missing in a triplet
(u, mu, v) is ``E = X^T u - mu v``. It is measured by a few Gaussian probes in fp64, which see the rounding, too
(:func:`.error_bounds.sketch_triplets`). Where it is too much, its directions join V (a block Krylov step).

All that is not wanted must be nowhere above the threshold. What is near it is checked like what is wanted. The columns
of the rest are ``U_e diag(mu_e)``, of the pairs that were found, too, and ``R = X (I - V V^T)``: its norm is at most
``sqrt(mu_e^2 + rho^2)``, with rho a bound of ``||R||_2`` from probes.

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
from ..ops.linalg import COLUMNS, inner, product, times, without
from .error_bounds import Sketch, norm_from_log, sketch_triplets

SPARE = 8  # right singular vectors kept beyond the rank: they follow the top of what is left out
FRESH, PART = 12, 5  # so many columns, and one per so many known, at random beside those of the last call
FIRST = 32  # columns to begin with where nothing is known
PROBES = 24  # of the rest
MAX_PASSES, MAX_POWER = 5, 6
MARGIN = constant("kMargin")  # for an estimate of the spectral norm
RESOLVED = constant("kResolved")  # of the largest singular value: triplets below are not checked
NEAR = constant("kNear")  # of the threshold: triplets from here on are checked as if they were wanted,
QUIET = 0.6  # and with a rest of up to here those before cannot be above it together: sqrt(0.8^2 + 0.6^2) = 1
WELL = 0.1  # least diagonal of the Cholesky factor of unit columns that fp32 can do with


@dataclass
class Triplets:
    """The singular triplets of X above a threshold, roughly."""

    U: Tensor  # [m, r]
    s: Tensor  # [r] fp64, descending
    V: Tensor  # [n, r]
    sketch: Sketch  # of how far X is from having exactly these
    tail: float  # >= how far the rest stands out above the threshold, Frobenius norm of the excess
    below: float  # >= the largest singular value of the rest
    basis: Tensor  # [n, k] V and the next right singular vectors, roughly


class Subspace:
    """The search for the singular triplets of X ``[m, n]`` above a threshold, or for a number of them.

    Args:
        threshold: how large the singular values are that are looked for; of no use where there is a ``count``: then it
            is the count-th singular value.
        V: ``[n, k]`` a guess of the right singular vectors, roughly orthonormal, or no column; computed in its dtype.
        tol: how far the result may be from the exact one, relative to the threshold, in the spectral norm.
        generator: draws the probes; the guess must not depend on it.
        max_columns: give up when more are needed.
        slack: what rounding may do to a product of X with a unit vector.
        gain: how far the result moves per unit of what its triplets lack: of (their s ``[r]``, a bound of all other
            singular values) -> ``[r]``.
        count: look for this many.
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
        gain: Callable[[Tensor, float], Tensor],
        count: int | None = None,
    ):
        self.X, self.threshold, self.V, self.tol, self.generator = X, threshold, V, tol, generator
        self.max_columns, self.slack, self.gain, self.count = max_columns, slack, gain, count
        self.rho = math.inf  # >= ||X (I - V V^T)||_2
        self.passes = self.products = 0
        self.too_wide = False  # needs more columns than allowed, whatever the precision

    def run(self) -> Triplets | None:
        """The triplets, or None where a dense factorisation is the better way."""
        if not self.V.shape[1]:
            return self._polish() if self._cover(max(FIRST, columns_for(self.count or 0))) else None
        known = self.V.shape[1]
        fresh = even(known + FRESH + known // PART) - known
        self.V = torch.cat([self.V, without(self._draw(fresh), self.V)], 1)
        found = self._polish()
        if not found and self.rho > self.threshold and self._cover(self.V.shape[1] // 2):
            found = self._polish()
        return found

    def _cover(self, columns: int) -> bool:
        """Widen V until the rest is shown to be below the threshold."""
        while not self.rho <= self.threshold:
            W = without(self._draw(even(columns)), self.V)
            B = self._ahead(W)
            Z = self._back(B)
            W = outside(Z, self.V, self.X)
            if not self._fits(max(W.shape[1], _spread(B, Z, self.X))):
                return False
            self.V = torch.cat([self.V, W], 1)
            if self.count is not None:
                B = self._ahead(self.V)
                self._choose(torch.linalg.eigvalsh(self.X.inner(B, B)))
            self._bound_rest()
            columns = self.V.shape[1] // 2
        return True

    def _polish(self) -> Triplets | None:
        """The triplets from the directions that V has."""
        source = self.X.normalize_columns(self._ahead(self.V))
        self.V, self.Y = self.V[:, :0], source[:, :0]
        self.YtY = source.new_empty(0, 0, dtype=torch.float64)
        for step in range(MAX_PASSES):
            Z = self._back(source)
            if not source.shape[1] or not self._take(outside(Z, self.V, self.X) if step else torch.linalg.qr(Z).Q):
                return None
            self.passes += 1
            s, U, V = self._rayleigh_ritz()
            if step == 0:
                self._bound_rest()
            if self.checked < self.rank or not self.rho <= self.threshold or not self.threshold > 0:
                return None
            gain = self.gain(s, self.rho)
            sketch = sketch_triplets(self.X, U, s, V, gain, self.generator)
            tail = self._tail(sketch)
            if MARGIN * sketch.spectral + tail <= self.tol * self.threshold:
                return self._result(s, U, sketch, tail)
            source = U[:, gain**2 * sketch.columns > (0.5 * self.tol * self.threshold) ** 2 / max(1, self.rank)]
        return None

    def _fits(self, columns: int) -> bool:
        """Whether as many may join V."""
        self.too_wide = self.V.shape[1] + columns > self.max_columns
        return columns > 0 and not self.too_wide

    def _take(self, V: Tensor) -> bool:
        """Take the block V, orthonormal and orthogonal to self.V, into the subspace."""
        if not self._fits(V.shape[1]):
            return False
        Y = self._ahead(V)
        own = self.X.inner(Y, Y)
        if len(self.YtY):
            cross = self.X.inner(self.Y, Y)
            own = torch.cat([torch.cat([self.YtY, cross], 1), torch.cat([cross.mT, own], 1)])
        self.V, self.Y, self.YtY = torch.cat([self.V, V], 1), torch.cat([self.Y, Y], 1), own
        return math.isfinite(float(own.trace()))

    def _rayleigh_ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """The triplets to check."""
        squares, Q = torch.linalg.eigh(self.YtY)
        self._choose(squares)
        c, dtype, Q = self.checked, self.V.dtype, Q.flip(1)
        s = torch.tensor(self.mu[:c], dtype=torch.float64, device=Q.device)
        self.right = product(self.V, Q[:, : columns_for(self.rank)].to(dtype))
        return s, product(self.Y, (Q[:, :c] / s).to(dtype)), self.right[:, :c]

    def _choose(self, squares: Tensor) -> None:
        """mu, descending, from ascending squares; how many triplets are wanted, and how many are to be checked."""
        mu = self.mu = [math.sqrt(max(square, 0.0)) for square in reversed(self.X.broadcast(squares).tolist())]
        if self.count is not None:
            self.threshold = mu[self.count - 1] if len(mu) >= self.count else 0.0
        self.rank = sum(x > self.threshold for x in mu) if self.count is None else min(self.count, len(mu))
        near = sum(x > NEAR * self.threshold for x in mu)
        self.checked = min(max(1, self.rank, near), columns_for(self.rank), sum(x > RESOLVED * mu[0] for x in mu))

    def _bound_rest(self) -> None:
        """rho >= ||R||_2 from the powers (R^T R)^j Omega, R = X (I - V V^T).

        A larger V only makes R smaller, and so does a step of the subspace iteration: what was shown of it stays true.
        """
        y = without(self._draw(PROBES), self.V)
        power, growth, log_norm = 0, 0.0, 0.0
        while power < MAX_POWER and growth < self.threshold and self.rho > QUIET * self.threshold:
            ahead = power % 2 == 0
            y = self._ahead(y) if ahead else without(self._back(y), self.V)
            norm = self.X.norm(y) if ahead else self.X.broadcast_float(float(torch.linalg.vector_norm(y)))
            power += 1
            if norm == 0:
                self.rho = min(self.rho, self.slack)
                break
            y, log_norm, growth = y / norm, log_norm + math.log(norm), norm if power > 1 else 0.0
            self.rho = min(self.rho, norm_from_log(log_norm, PROBES, power) + self.slack)

    def _tail(self, sketch: Sketch) -> float:
        """A bound of (sum (sigma_i - threshold)_+^2)^(1/2) over the singular values of all that is not wanted."""
        if not self.rho <= self.threshold:
            return math.inf
        sigma = (math.hypot(x, self.rho) for x in self.mu[self.checked :])  # Weyl; all others are at most rho
        return math.hypot(*(max(0.0, x + self.slack + sketch.bound - self.threshold) for x in sigma))

    def _result(self, s: Tensor, U: Tensor, sketch: Sketch, tail: float) -> Triplets:
        r, c = self.rank, self.checked
        below = max(math.hypot(*self.mu[c : c + 1], self.rho), *self.mu[r : r + 1], 0.0)
        return Triplets(U[:, :r], s[:r], self.right[:, :r], sketch, tail, below, self.right)

    def _draw(self, columns: int) -> Tensor:
        return torch.randn(self.X.n, columns, generator=self.generator, dtype=self.V.dtype, device=self.V.device)

    def _ahead(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.X.matmul(V)

    def _back(self, Y: Tensor) -> Tensor:
        self.products += Y.shape[1]
        return self.X.rmatmul(Y)


def _spread(B: Tensor, Z: Tensor, X: RowSharded) -> int:
    """About how many directions R has, from R Omega and R^T R Omega: ``(sum sigma^2)^2 / sum sigma^4``."""
    first, second = X.norm(B.double()), X.broadcast_float(float(torch.linalg.vector_norm(Z, dtype=torch.float64)))
    return int((first * (first / second)) ** 2 / B.shape[1]) if second else 0  # in this order it cannot overflow


def outside(Y: Tensor, V: Tensor, X: RowSharded) -> Tensor:
    """An orthonormal basis of (I - V V^T) Y, or of the directions of it that are more than rounding; the same for all
    among whom X is divided."""
    if not V.shape[1]:
        return orthonormalise(Y)
    W = without(orthonormalise(without(Y, V)), V)
    norms = X.broadcast(torch.linalg.vector_norm(W, dim=0))
    return W if bool((norms > 1 - 1e-5).all()) else without(orthonormalise(W[:, norms > 0.1]), V)


def orthonormalise(B: Tensor) -> Tensor:
    """An orthonormal basis of the columns of B.

    Cholesky-QR in fp64 on columns scaled to length 1, or Householder's QR where they are too dependent for that.
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
    return -columns // COLUMNS * -COLUMNS


def columns_for(rank: int) -> int:
    """How many columns to keep: some to spare."""
    return even(rank + SPARE)
