"""The leading singular triplets of one matrix from a growing subspace, with a bound on what was left out.

Nothing but products with a few columns: no n x n matrix, no O(n^3). An orthonormal block V ``[n, k]`` goes half a step
to the left and half a step back,

    ``B = X V``,   ``U = B S`` orthonormal,   ``Y = X^T B``,   ``X^T U = Y S = V' diag(mu) Q^T``,   ``U' = U Q``,

after which ``U'^T X = diag(mu) V'^T`` holds exactly. U is never formed: S comes from ``B^T B``, and mu and Q from
``Y^T Y``, both in fp64. What a triplet (u, mu, v) still lacks is ``F = X v - mu u``. Since ``(I - U U^T) X V = 0``, it is
bounded without another product with X:

    ``F = (I - U U^T) X (v - V V^T v)``,   ``||F|| <= rho ||v - V V^T v||``,   ``rho >= ||(I - U U^T) X||_2``.

While that is too much, the directions in which the wanted v leave V join V (a block Krylov step), and only these are
multiplied. After a warm start they are few. At the end ``X - F V'^T`` has the triplets exactly, and the rest of it is
nowhere above the threshold but for the ``tail``: both are within the tolerance.

Sources: Halko, Martinsson & Tropp, SIAM Review 53(2), 2011; Musco & Musco, NIPS 2015 (block Krylov).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .certificate import PROBES, norm_from_probes
from .products import COLUMNS, inner, product, times, without

SPARE = 8  # right singular vectors kept beyond the rank: they follow the top of what is left out
MAX_PASSES = 10
MAX_POWER = 6
DEPENDENT = 0.1  # least diagonal of the Cholesky factor of unit columns that fp32 can do with
COARSE = 0.1  # of the threshold: how accurate the triplets below it are to begin with


@dataclass
class Triplets:
    """The singular triplets of X above a threshold, roughly."""

    U: Tensor  # [m, s]
    s: Tensor  # [s] fp64, descending
    V: Tensor  # [n, s]
    tail: float  # >= how far the rest of X' stands out above the threshold, Frobenius norm of the excess
    spare: Tensor  # [n, e] the next right singular vectors, roughly
    passes: int
    products: int  # columns multiplied with X or X^T


class Subspace:
    """The search for the singular triplets of X ``[m, n]`` above a threshold, or for a number of them.

    Args:
        threshold: how large the singular values are that are looked for; of no use where there is a ``count``: then it
            is the count-th singular value.
        tol: the distance allowed between X and the matrix that has the triplets found, relative to the threshold.
        count: look for this many.
        V: ``[n, k]`` an orthonormal guess of the right singular vectors; its dtype is computed in.
        generator: draws the probes; the guess must not depend on it.
        max_columns: give up when more are needed.
        slack: what rounding may do to a product of X with a unit vector.
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
        self.X, self.threshold, self.relative_tol, self.count = X, threshold, tol, count
        self.generator, self.max_columns, self.slack = generator, max_columns, slack
        self.V, self.Y, self.B = V.new_empty(X.shape[1], 0), V.new_empty(X.shape[1], 0), V.new_empty(X.shape[0], 0)
        self.BtB = self.YtY = self.S = V.new_empty(0, 0, dtype=torch.float64)
        self.next = V
        self.rho, self.sketch = math.inf, None
        self.passes = self.products = 0
        self.coarse = COARSE

    def run(self) -> Triplets | None:
        """The triplets, or None where a dense factorisation is the better way."""
        while self.passes < MAX_PASSES and 0 < self.next.shape[1] <= self.max_columns - self.V.shape[1]:
            self._expand(self.next)
            self._rayleigh_ritz()
            self._bound_rest()
            if 0 < self.rho <= self.threshold and math.hypot(self._missed(), tail := self._tail()) <= self.tol:
                return self._result(tail)
            self.next = self._directions()
        return None

    def _expand(self, V: Tensor) -> None:
        """Take the block V, orthonormal and orthogonal to self.V, into the subspace: two products with X."""
        self.passes += 1
        self.fresh = self.sketch is None
        if self.fresh:
            self.sketch = self._times(self.X, self._draw(PROBES))
        B = self._include(self._times(self.X, V))
        Y = self._times(self.X.mT, B)
        if self.fresh:
            self.powered = self._times(self.X.mT, self._left_out(self.sketch))
        self.YtY = _bordered(self.YtY, self.Y, Y)
        self.V, self.Y = torch.cat([self.V, V], 1), torch.cat([self.Y, Y], 1)

    def _include(self, B: Tensor) -> Tensor:
        """Extend self.B and S so that U = B S spans these columns, too; as they are, or orthonormalised first."""
        BtB = _bordered(self.BtB, self.B, B)
        S, smallest = inverse_root(BtB)
        if smallest < DEPENDENT:
            U = product(self.B, self.S.to(B.dtype))
            B = orthonormalise(without(B, U))
            B = orthonormalise(without(B, U)) if U.shape[1] else B
            BtB = _bordered(self.BtB, self.B, B)
            S, _ = inverse_root(BtB)
        self.B, self.BtB, self.S = torch.cat([self.B, B], 1), BtB, S
        return B

    def _left_out(self, y: Tensor) -> Tensor:
        """(I - U U^T) y."""
        inside = self.S @ (self.S.mT @ inner(self.B, y))
        return y - product(self.B, inside.to(y.dtype))

    def _bound_rest(self) -> None:
        """rho >= ||R||_2, R = (I - U U^T) X. A wider U only makes R smaller: what was proved once stays true."""
        if not self.fresh:
            return
        y, power = self.powered, 2  # R^T R Omega
        self.rho, growth = min(self.rho, norm_from_probes(y, power) + self.slack), 0.0
        while self.rho > self.threshold and power < MAX_POWER and growth < self.threshold:
            before = y.norm()
            y = self._left_out(self._times(self.X, y)) if power % 2 == 0 else self._times(self.X.mT, y)
            growth, power = float(y.norm() / before), power + 1  # growth <= ||R||_2
            self.rho = min(self.rho, norm_from_probes(y, power) + self.slack)

    def _rayleigh_ritz(self) -> None:
        """The triplets of U U^T X, and how far their right vectors leave V."""
        squares, Q = torch.linalg.eigh(self.S.mT @ self.YtY @ self.S)
        mu = squares.clamp_min(0).sqrt().flip(0)
        if self.count is not None:
            self.threshold = float(mu[self.count - 1]) if len(mu) >= self.count else 0.0
        self.tol = self.relative_tol * self.threshold
        self.rank = int((mu > self.threshold).sum()) if self.count is None else min(self.count, len(mu))
        wanted = min(columns_for(self.rank), int((mu > 1e-13 * mu[0]).sum()))
        self.mu, self.SQ = mu[:wanted], self.S @ Q.flip(1)[:, :wanted]
        self.right = product(self.Y, (self.SQ / self.mu).to(self.Y.dtype))
        self.left_V = without(self.right, self.V)

    def _missed(self) -> float:
        """A bound of ||F||_F for the triplets wanted."""
        return self.rho * float(torch.linalg.vector_norm(self.left_V[:, : self.rank]))

    def _tail(self) -> float:
        """A bound of what stands out above the threshold in the rest, (sum (sigma_i - threshold)_+^2)^(1/2).

        The rest is, in orthonormal bases, [[diag(mu), 0], [F, R]] with ||R||_2 <= rho <= threshold: at most len(mu) of
        its singular values are above the threshold, by at most what the norm of [[mu_1, 0], [||F||, rho]] is above it.
        """
        if not (spare := len(self.mu) - self.rank):
            return 0.0
        top, off = float(self.mu[self.rank]), self.rho * float(torch.linalg.vector_norm(self.left_V[:, self.rank :]))
        half, skew = (top**2 + off**2 + self.rho**2) / 2, (top**2 + off**2 - self.rho**2) / 2
        norm = math.sqrt(half + math.hypot(skew, off * self.rho)) + self.slack
        return math.sqrt(spare) * max(0.0, norm - self.threshold)

    def _directions(self) -> Tensor:
        """What the next step adds to V: the directions in which triplets leave V by more than they may."""
        weight = torch.ones_like(self.mu)
        weight[self.rank :] = min(1.0, self.tol / (self.coarse * self.threshold))
        self.coarse /= 10
        values, vectors = torch.linalg.eigh(inner(self.left_V, self.left_V) * weight[:, None] * weight)
        kept = values.clamp_min(0).cumsum(0) > (0.5 * self.tol / self.rho) ** 2
        kept[max(0, len(kept) - even(int(kept.sum()))) :] = True
        kept &= values > 1e-6 * values[-1]
        more = [self.left_V @ (vectors[:, kept] * weight[:, None] / values[kept].sqrt()).to(self.V.dtype)]
        if self.rho <= self.threshold and not kept.any():
            return more[0]
        if self.rho > self.threshold:  # something above it may be outside: follow the probes, and draw new ones
            have = more[0].shape[1] + 2 * PROBES
            more += [self.powered, self._draw(even(have + self.V.shape[1] // 2) - have)]
            self.sketch = None
        return orthonormalise(without(torch.cat(more, 1), self.V))

    def _draw(self, columns: int) -> Tensor:
        n = self.X.shape[1]
        return torch.randn(n, columns, generator=self.generator, dtype=self.V.dtype, device=self.V.device)

    def _times(self, X: Tensor, Y: Tensor) -> Tensor:
        self.products += Y.shape[1]
        return times(X, Y)

    def _result(self, tail: float) -> Triplets:
        r = self.rank
        U = product(self.B, self.SQ[:, :r].to(self.B.dtype))
        return Triplets(U, self.mu[:r], self.right[:, :r], tail, self.right[:, r:], self.passes, self.products)


def inverse_root(G: Tensor) -> tuple[Tensor, float]:
    """S with ``S^T G S = I``, and how independent the columns behind the Gram matrix G are: 1 orthogonal, 0 dependent."""
    scale = G.diagonal().sqrt()
    L, failed = torch.linalg.cholesky_ex(G / scale / scale[:, None])
    smallest = float(L.diagonal().min()) if len(L) and not int(failed) else 0.0
    S = torch.linalg.solve_triangular(L, torch.diag(1 / scale), upper=False).mT
    return S, smallest if smallest > 0 else 0.0  # NaN, of a zero column, is dependent


def orthonormalise(B: Tensor) -> Tensor:
    """An orthonormal basis of the columns of B: Cholesky-QR in fp64, or Householder's where they are too dependent."""
    S, smallest = inverse_root(inner(B, B))
    if smallest < 1e-3:
        return torch.linalg.qr(B).Q
    return product(B, S.to(B.dtype)) if smallest > DEPENDENT else times(B, S).to(B.dtype)


def _bordered(G: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The Gram matrix of [A, B], where G is that of A."""
    own = inner(B, B)
    if not len(G):
        return own
    cross = inner(A, B)
    return torch.cat([torch.cat([G, cross], 1), torch.cat([cross.mT, own], 1)])


def even(columns: int) -> int:
    return -columns // COLUMNS * -COLUMNS


def columns_for(rank: int) -> int:
    """How many columns to keep: some to spare."""
    return even(rank + SPARE)
