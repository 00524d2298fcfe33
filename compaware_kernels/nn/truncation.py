"""Truncated SVD of matrices M [G, m, n] at the cost that it needs: the rank by a rule first, then factors of that rank.

A rank rule needs bounds of the singular values only, and the truncation to rank r only the leading singular vectors of
the shorter side: with V_r of the tall ``T = M`` or ``M^T`` ``[N, k]`` it is ``T V_r V_r^T``; nothing is inverted.
Routes in order of cost, each with bounds of its errors:

* the Frobenius norm decides rules that need no singular value, and thresholds above it;
* ``sketch``: Rayleigh-Ritz in the range of ``T^T T Omega``, Omega ``[k, k/8]`` random, in fp32. Sums of Ritz values are
  lower bounds, and what ``||T||_F^2`` exceeds the sum of all by is all that can be missing: a certificate without any
  failure probability, useful where the spectrum falls fast;
* ``gram``: eigenvalues, and eigenvectors if needed, of ``T^T T`` ``[k, k]``, in fp32, then in fp64;
* an SVD in fp64.

A route that leaves the rank undecided, or whose factors may lose more than LOSS of the truncation error and more than
their rounding to the dtype of M, falls back to the next one: ranks are those of an SVD in fp64.

Sources: Halko, Martinsson & Tropp, SIAM Review 53(2), 2011, algorithms 4.4 and 5.1; Fan, PNAS 35(11), 1949 (sums of
eigenvalues of a compression are lower bounds).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.autocast import without_autocast
from ..ops.linalg import product
from ..ranks import Rule, Spectrum
from .factorization import SVD, check_rank, singular_values

__all__ = ["Truncation", "factors", "work"]

SMALL = 32  # min(m, n) up to which an SVD costs no more than the rest
SKETCHED, SHARE = 128, 8  # min(m, n) from which a sketch pays; k / SHARE columns
LOSS = 1e-3  # of the squared truncation error: what the factors may lose at most
BLOCKED = 512  # min(m, n) from which the upper triangle of a Gram matrix is left out
KEPT = 1024  # min(m, n) up to which Gram matrices are kept for the factors
TAIL = 1e6  # energy, in units of its error, from which on partial sums are as good as exact
ORDINARY = 2.0**20  # largest entry, and inverse of the least largest one, of matrices that the routes take
# Errors in units of the unit roundoff u: of a square, and of a sum of squares. Measured in fp32 for random, constant,
# positive, flat and falling spectra from 64 x 64 to 512 x 4608 and 20,000 x 32: at most 13 and 66, beside twice the
# error of the trace, which constant matrices have.
VALUE, SUM = 64, 128


class _Gram:
    """Eigendecomposition of ``T^T T`` of tall matrices T ``[G, N, k]``, in their dtype.

    Raises torch.linalg.LinAlgError where LAPACK does: divide and conquer in fp32 may fail if most values are zero.
    """

    def __init__(self, T: Tensor, total: Tensor, vectors: bool):
        self.G = _lower_gram(T)  # of which LAPACK reads the lower triangle
        bias = 2 * (self.G.diagonal(dim1=1, dim2=2).double().sum(1) - total).abs()
        values = torch.linalg.eigvalsh(self.G) if not vectors else self._vectors()
        u, squares = torch.finfo(T.dtype).eps / 2, values.double().flip(-1).clamp_min(0)
        error = VALUE * u * (squares[:, 0] + total / math.sqrt(T.shape[-1])) + bias
        self.spectrum = Spectrum(squares, total, torch.zeros_like(total), error, SUM * u * total + bias)

    def right(self, rank: int) -> Tensor:
        """The leading eigenvectors ``[G, k, r]``.  Raises torch.linalg.LinAlgError."""
        if self.G is not None:
            self._vectors()
        return self.V[..., -rank:].flip(-1)

    def _vectors(self) -> Tensor:
        """Computes the eigenvectors, in place of the Gram matrix; returns the eigenvalues ``[G, k]``, ascending."""
        values, self.V = torch.linalg.eigh(self.G)
        self.G = None
        return values


def _lower_gram(T: Tensor) -> Tensor:
    """``T^T T`` ``[G, k, k]`` of T ``[G, N, k]``, at least in its lower triangle: a large one by block rows."""
    if len(T) > 1:
        return T.mT @ T
    X, k = T[0], T.shape[-1]
    if k < BLOCKED:
        return product(X.mT, X)[None]
    G, step = X.new_zeros(k, k), -(-k // 4)
    for start in range(0, k, step):
        rows = slice(start, start + step)
        G[rows, : start + step] = product(X[:, rows].mT, X[:, : start + step])
    return G[None]


class _Sketch:
    """Rayleigh-Ritz of a tall matrix T ``[1, N, k]`` in the range of ``T^T T Omega``, Omega ``[k, k / SHARE]``."""

    def __init__(self, T: Tensor, total: Tensor, vectors: bool):
        X, k = T[0], T.shape[-1]
        draw = torch.Generator(T.device).manual_seed(k)
        omega = torch.randn(k, k // SHARE, generator=draw, dtype=T.dtype, device=T.device)
        Q = torch.linalg.qr(product(X.mT, product(X, omega))).Q
        B = product(X, Q).double()
        values, W = torch.linalg.eigh(B.mT @ B)
        self.V = product(Q, W.flip(-1).to(Q.dtype))[None]
        squares, u = values.flip(-1).clamp_min(0), torch.finfo(T.dtype).eps / 2
        sum_error = SUM * u * total
        missed = (total - squares.sum()).clamp_min(0) + sum_error
        squares = F.pad(squares, (0, k - len(squares)))[None]
        self.spectrum = Spectrum(squares, total, missed, VALUE * u * squares[:, 0], sum_error)

    def right(self, rank: int) -> Tensor:
        """Approximations of the leading right singular vectors ``[1, k, r]``."""
        return self.V[..., :rank]


class Truncation:
    """Truncated SVD of ``M`` ``[G, m, n]``, any floating dtype; a route that was taken once is kept.

    Args:
        vectors: whether factors will be needed; else eigenvectors are computed only when they are.
    """

    def __init__(self, M: Tensor, vectors: bool = True):
        self.M, self._with_vectors = M.detach(), vectors
        self._found: dict[tuple, _Gram | _Sketch | None] = {}

    @without_autocast()
    def rank(self, rule: Rule) -> int:
        """The rank that the rule gives for the singular values."""
        if self._by_routes:
            rank = rule.decide(self._unknown())
            for route in () if rank is not None or rule.limits is None else self._routes():
                rank = rule.decide(route.spectrum)
                if rank is not None:
                    break
            if min(self.M.shape[-2:]) > KEPT:
                self._found.clear()
            if rank is not None:
                return rank
        return rule(self.s)

    @without_autocast()
    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors ``[G, m, r]``, ``[G, r, n]`` in ``dtype`` of equal norms, as of :func:`factors`."""
        for route in self._routes(rank) if self._by_routes and "_svd" not in vars(self) else ():
            x = route.spectrum
            left = self._total - x.sums[1][:, rank - 1]
            may_lose = torch.maximum(LOSS * left, torch.finfo(self.M.dtype).eps ** 2 * self._total)
            if bool((2 * x.sum_error + x.missed <= may_lose).all()):
                V = _of_lapack(route.right, rank)
                if V is not None:
                    return self._balanced(V, dtype)
        return self._svd.factors(rank, dtype)

    @without_autocast()
    def singular_values(self, rank: int) -> Tensor:
        """Singular values ``[G, k]``, fp64, from which the energy of any truncation up to ``rank`` may be computed.

        From the Gram matrix in fp64, unless the energy beyond ``rank`` is so small that its rounding counts.
        """
        gram = self._route(_Gram, torch.float64) if self._by_routes else None
        if gram and bool((gram.spectrum.squares[:, rank:].sum(1) >= TAIL * gram.spectrum.sum_error).all()):
            return gram.spectrum.squares.sqrt()
        return self.s

    @property
    def s(self) -> Tensor:
        """Singular values ``[G, k]``, fp64, of an SVD."""
        return singular_values(self.M) if self._by_routes else self._svd.s

    @cached_property
    def _svd(self) -> SVD:
        return SVD.of(self.M)

    @cached_property
    def _by_routes(self) -> bool:
        """Whether M is larger than SMALL, of ordinary size, and no fake tensor: for all others the SVD remains."""
        if type(self.M) not in (Tensor, nn.Parameter) or self.M.is_meta or not self.M.numel():
            return False
        return min(self.M.shape[-2:]) > SMALL and 1 / ORDINARY < float(self.M.abs().max()) < ORDINARY

    @cached_property
    def _total(self) -> Tensor:
        """``||M||_F^2`` ``[G]`` in fp64."""
        return torch.linalg.vector_norm(self.M, dim=(1, 2), dtype=torch.float64).square()

    def _tall(self, dtype: torch.dtype) -> Tensor:
        """M or its transpose in ``dtype``, the one with more rows ``[G, N, k]``."""
        return (self.M if self.M.shape[-2] >= self.M.shape[-1] else self.M.mT).to(dtype)

    def _unknown(self) -> Spectrum:
        """What the norm alone tells of the singular values."""
        zero, k = torch.zeros_like(self._total), min(self.M.shape[-2:])
        return Spectrum(zero[:, None].expand(-1, k), self._total, self._total, zero, zero)

    def _routes(self, rank: int = 0) -> Iterator[_Gram | _Sketch]:
        """The routes that may serve M, and factors of this rank, in order of cost."""
        single, k = self.M.dtype != torch.float64, min(self.M.shape[-2:])
        kinds = [(_Sketch, torch.float32)] if len(self.M) == 1 and k >= SKETCHED and rank <= k // SHARE else []
        for kind, dtype in [*kinds, (_Gram, torch.float32)] if single else []:
            yield from filter(None, [self._route(kind, dtype)])
        yield from filter(None, [self._route(_Gram, torch.float64)])

    def _route(self, kind: type[_Gram] | type[_Sketch], dtype: torch.dtype) -> _Gram | _Sketch | None:
        """A route, taken at most once; None if LAPACK fails."""
        if (kind, dtype) not in self._found:
            self._found[kind, dtype] = _of_lapack(kind, self._tall(dtype), self._total, self._with_vectors)
        return self._found[kind, dtype]

    def _balanced(self, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors of equal norms of the projection of M onto the orthonormal V ``[G, k, r]`` of the shorter side."""
        T = self._tall(V.dtype)
        Y = (product(T[0], V[0].contiguous())[None] if len(T) == 1 else T @ V).double()
        V, tiny = V.double(), torch.finfo(torch.float64).tiny
        norm_Y, norm_V = (torch.linalg.vector_norm(A, dim=1, keepdim=True) for A in (Y, V))
        root = (norm_Y / norm_V).sqrt()
        left, right = (Y / root.clamp_min(tiny)).to(dtype), (V * root).to(dtype)
        return (left, right.mT) if self.M.shape[-2] >= self.M.shape[-1] else (right, left.mT)


def factors(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-r approximation of M (truncated SVD), the singular values split evenly between them.

    ``M ~ U V,  U = U_r S_r^(1/2),  V = S_r^(1/2) V_r^T``

    The factors have equal norms, so that their gradients have one scale in fine-tuning.

    Args:
        M: ``[G, m, n]``, any floating dtype.
        rank: 1 to min(m, n).

    Returns:
        ``U`` ``[G, m, r]`` and ``V`` ``[G, r, n]`` in the dtype of M.

    Raises:
        ValueError: rank out of range.

    Source: Eckart & Young, 1936.
    """
    check_rank(rank, *M.shape[-2:])
    return Truncation(M).factors(rank, M.dtype)


def work(M: Tensor) -> int:
    """Cost of a factorization of M ``[G, m, n]``, up to a factor."""
    return M.numel() * min(M.shape[-2:])


def _of_lapack(function, *args):
    """What the function returns; None if LAPACK fails to converge, or gives eigenvectors with NaN."""
    try:
        found = function(*args)
    except torch.linalg.LinAlgError:
        return None
    values = found if isinstance(found, Tensor) else found.spectrum.squares
    return found if bool(values.isfinite().all()) else None
