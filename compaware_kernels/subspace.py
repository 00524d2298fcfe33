"""The leading singular triplets of one matrix from a growing subspace of right vectors.

Nothing but products with a few columns: no n x n matrix, no O(n^3). From an orthonormal block V ``[n, k]``,

    ``B = X V``,   ``V <- [V, orth((I - V V^T) X^T B)]``,   ``X V = U diag(mu) Q^T``,   ``V' = V Q``   (Rayleigh-Ritz)

after which ``X V' = U diag(mu)`` holds exactly; mu and Q come from ``B^T B`` in fp64. What is missing in a triplet
(u, mu, v) is ``E = X^T u - mu v``. It is measured by a few Gaussian probes in fp64, which see the rounding, too
(:func:`.certificate.sketch_triplets`), and the directions of what is too large join V (a block Krylov step). After a
warm start the first V is nearly right, and once is enough.

All that is not wanted must be nowhere above the threshold. What is near it is checked like what is wanted. The columns
of the rest are ``U_e diag(mu_e)``, of the pairs that were found, too, and ``R = X (I - V V^T)``: its norm is at most
``sqrt(mu_e^2 + rho^2)``, with rho a bound of ``||R||_2`` from probes.

Sources: Halko, Martinsson & Tropp, SIAM Review 53(2), 2011; Musco & Musco, NIPS 2015 (block Krylov).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .certificate import PROBES, Sketch, norm_from_log, sketch_triplets
from .products import COLUMNS, inner, product, times, without

SPARE = 16  # right singular vectors kept beyond the rank: they follow the top of what is left out
MAX_PASSES = 8
MAX_POWER = 7
MARGIN = 1.25  # for what is an estimate of the spectral norm, by 12 probes; measured: it was at most 6 % too small
NEAR = 0.8  # of the threshold: triplets from here on are checked as if they were wanted
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
    passes: int
    products: int  # columns multiplied with X or X^T


class Subspace:
    """The search for the singular triplets of X ``[m, n]`` above a threshold, or for a number of them.

    Args:
        threshold: how large the singular values are that are looked for; of no use where there is a ``count``: then it
            is the count-th singular value.
        V: ``[n, k]`` an orthonormal guess of the right singular vectors; its dtype is computed in.
        tol: the distance allowed between X and the matrix that has the triplets found, relative to the threshold, in
            the spectral norm.
        generator: draws the probes; the guess must not depend on it.
        max_columns: give up when more are needed.
        slack: what rounding may do to a product of X with a unit vector.
        count: look for this many.
    """

    def __init__(
        self,
        X: Tensor,
        threshold: float,
        V: Tensor,
        tol: float,
        generator: torch.Generator,
        max_columns: int,
        slack: float,
        count: int | None = None,
    ):
        self.X, self.threshold, self.tol, self.count = X, threshold, tol, count
        self.generator, self.max_columns, self.slack = generator, max_columns, slack
        self.V, self.B = V[:, :0], V.new_empty(X.shape[0], 0)
        self.BtB = V.new_empty(0, 0, dtype=torch.float64)
        self.passes = self.products = 0
        self.rho = math.inf
        self._take(V)

    def run(self) -> Triplets | None:
        """The triplets, or None where a dense factorisation is the better way."""
        source = self.B
        while source.shape[1] and self.passes < MAX_PASSES and self.V.shape[1] + source.shape[1] <= self.max_columns:
            self.passes += 1
            self._take(self._outside(self._times(self.X.mT, source)))
            if not self.BtB.isfinite().all():
                return None
            self._rayleigh_ritz()
            if self.checked < self.rank:
                return None
            self._bound_rest()
            if self.below > self.threshold and self.spread > self.max_columns - self.V.shape[1]:
                return None
            sketch = sketch_triplets(self.X, *self.triplets, self.generator)
            tail = self._tail(sketch)
            if MARGIN * sketch.spectral + tail <= self.tol * self.threshold and self.threshold > 0:
                return self._result(sketch, tail)
            source = self._sources(sketch)
        return None

    def _take(self, V: Tensor) -> None:
        """Take the block V, orthonormal and orthogonal to self.V, into the subspace."""
        B = self._times(self.X, V)
        own = inner(B, B)
        if len(self.BtB):
            cross = inner(self.B, B)
            own = torch.cat([torch.cat([self.BtB, cross], 1), torch.cat([cross.mT, own], 1)])
        self.V, self.B, self.BtB = torch.cat([self.V, V], 1), torch.cat([self.B, B], 1), own

    def _outside(self, Y: Tensor) -> Tensor:
        """An orthonormal basis of (I - V V^T) Y, filled up at random where that has too few directions."""
        W = without(Y, self.V)
        for _ in range(4):
            W = without(orthonormalise(W), self.V)
            norms = torch.linalg.vector_norm(W, dim=0)
            if bool((norms > 1 - 1e-5).all()):
                break
            lost = norms < 0.1  # little more than rounding, which lay in V
            W[:, lost] = without(self._draw(int(lost.sum())), self.V)
        return W

    def _rayleigh_ritz(self) -> None:
        squares, Q = torch.linalg.eigh(self.BtB)
        mu = squares.clamp_min(0).sqrt().flip(0)
        if self.count is not None:
            self.threshold = float(mu[self.count - 1]) if len(mu) >= self.count else 0.0
        self.rank = int((mu > self.threshold).sum()) if self.count is None else min(self.count, len(mu))
        self.mu, Q = mu, Q.flip(1)[:, : columns_for(self.rank)]
        self.right = product(self.V, Q.to(self.V.dtype))
        near = int((mu > NEAR * self.threshold).sum())
        self.checked = c = min(max(1, self.rank, near), Q.shape[1], int((mu > 1e-6 * mu[0]).sum()))
        self.triplets = product(self.B, (Q[:, :c] / mu[:c]).to(self.B.dtype)), mu[:c], self.right[:, :c]

    def _bound_rest(self) -> None:
        """below >= the norm of all that is not wanted, from the powers (R^T R)^j Omega, R = X (I - V V^T).

        A larger V only makes R smaller: what was shown of it stays true.
        """
        top = float(self.mu[self.checked]) if self.checked < len(self.mu) else 0.0
        y = self.probes = without(self._draw(PROBES), self.V)
        power, growth, log_norm, self.spread = 0, 0.0, 0.0, 0.0
        while power < MAX_POWER and growth < self.threshold < math.hypot(top, self.rho):
            y = self._times(self.X, y) if power % 2 == 0 else without(self._times(self.X.mT, y), self.V)
            norm, power = float(torch.linalg.vector_norm(y)), power + 1
            if norm == 0:
                self.rho = min(self.rho, self.slack)
                break
            y, log_norm, growth = y / norm, log_norm + math.log(norm), norm if power > 1 else 0.0
            self.rho = min(self.rho, norm_from_log(log_norm, PROBES, power) + self.slack)
            if power == 1:
                first = norm**2 / PROBES  # about sum sigma^2
            elif power == 2:  # (sum sigma^2)^2 / sum sigma^4: about how many directions R has
                self.spread = first / norm**2
            if power % 2 == 0:
                self.probes = y
        self.below = math.hypot(top, self.rho)

    def _tail(self, sketch: Sketch) -> float:
        """A bound of (sum (sigma_i - threshold)_+^2)^(1/2) over the singular values of all that is not wanted."""
        if self.rho > self.threshold:
            return math.inf
        sigma = (self.mu[self.checked :].square() + self.rho**2).sqrt()  # Weyl; all others are at most rho
        sigma = sigma + self.slack + sketch.bound
        return float((sigma - self.threshold).clamp_min(0).norm())

    def _sources(self, sketch: Sketch) -> Tensor:
        """What to multiply with X^T, so that the next directions are those that are missing."""
        U, _, _ = self.triplets
        bad = sketch.columns > (0.5 * self.tol * self.threshold) ** 2 / max(1, self.rank)
        source = [U[:, bad]]
        if self.below > self.threshold:  # follow what stands out of the rest, and look elsewhere
            draw = self._draw(even(int(bad.sum()) + PROBES + self.V.shape[1] // 2) - int(bad.sum()) - PROBES)
            source.append(self._times(self.X, torch.cat([self.probes, draw], 1)))
        return torch.cat(source, 1)

    def _draw(self, columns: int) -> Tensor:
        n = self.X.shape[1]
        return torch.randn(n, columns, generator=self.generator, dtype=self.V.dtype, device=self.V.device)

    def _times(self, X: Tensor, Y: Tensor) -> Tensor:
        self.products += Y.shape[1]
        return times(X, Y)

    def _result(self, sketch: Sketch, tail: float) -> Triplets:
        U, s, V = (x[..., : self.rank] for x in self.triplets)
        below = max(self.below, float(self.mu[self.rank]) if self.rank < len(self.mu) else 0.0)
        return Triplets(U, s, V, sketch, tail, below, self.right, self.passes, self.products)


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
