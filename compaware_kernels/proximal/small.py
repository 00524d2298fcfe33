"""Small matrices: spectral functions of all those of a call at once, each matrix decomposed by one thread.

Two routes, for a matrix X ``[m, n]`` with m >= n, else its transpose:

* ``jacobi``: a one-sided Jacobi SVD of many matrices of one shape (:func:`torch.ops.compaware.small_svd`), with the
  singular vectors of the longer side: ``f(X) = U diag(g(s)) U^T X``, ``g(s) = f(s) / s``;
* ``gram``: the eigenvectors of ``X^T X`` in fp64 above the threshold, for a list of any shapes
  (:func:`torch.ops.compaware.gram_eigh`): ``f(X) = X V diag(g(s)) V^T``. Accuracy: as :mod:`.gram`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.constants import constant
from ..ops.linalg import gram_eigh
from .error_bounds import NOT_ZERO, ORDINARY, UNCHANGED, norms, rescale, storage, unit_exponent, unit_roundoff
from .gram import EIGH_LOSS, GRAM_LOSS
from .record import Record
from .spectral_functions import Spectral, batched

__all__ = [
    "ALONE",
    "COARSE",
    "LONG",
    "LOSS",
    "MANY",
    "SHORT",
    "Group",
    "compute",
    "difference",
    "groups_of",
    "small_shapes",
    "write",
]

SHORT, LONG = 64, 256  # limits of min(m, n) and max(m, n) for Jacobi
ALONE, MANY = 16, 16  # min(m, n) up to ALONE pays for any number of matrices; up to SHORT, for MANY of one shape
LIGHT, MEDIUM, LONGEST = 4096, 128, 4096  # limits of the Gram route: least m n^2, largest n, largest m
PRODUCTS = 32  # error of the products of the Gram route, in units of u ||W||_F, as assumed to choose their dtype
LOSS = constant("kLoss")  # error of U g(s) U^T before the last products, in units of u ||W||_F
COARSE = constant("kCoarse")  # the same error, as assumed when choosing between fp32 and fp64


@dataclass
class Group:
    """All matrices of one weight ``[..., m, n]``, and their results."""

    W: Tensor
    function: Spectral
    center: Tensor | None
    label: str  # name of the weight in error messages
    stored_as: torch.dtype | None = None  # if the result is rounded to a narrower dtype later
    gram: bool = False  # takes the Gram route
    # results
    s: Tensor | None = None  # fp64 [..., k], singular values of the result
    rank: Tensor | None = None  # int64 [...]
    error: Tensor | None = None  # fp64 [...], bound of the Frobenius error, storage rounding included
    P: Tensor | None = None  # [..., m, n]
    method: str = ""

    def matrices(self) -> Tensor:
        """``W - center`` as one batch ``[B, m, n]``."""
        return difference(self.W, self.center).reshape(-1, *self.W.shape[-2:])


def difference(W: Tensor, center: Tensor | None) -> Tensor:
    """``W - center`` in fp64, or W as it is if there is no center."""
    return W if center is None else W.double() - center.double()


def groups_of(records: Sequence[Record], functions: Sequence[Spectral], tol: float) -> list[Group | None]:
    """The group of each record that a route of this module serves; None for the others."""
    whole = [record.target for record in records if record.shards is None]
    counts, jacobi = _counts(whole), small_shapes(whole)
    groups: list[Group | None] = []
    for record, function in zip(records, functions, strict=True):
        entry, shape = None, tuple(record.target.shape[-2:])
        if record.shards is None and record.target.numel() and min(shape) <= MEDIUM:
            entry = Group(record.target, function, record.target_center, record.label, record.stored_as)
            many = shape in jacobi and counts[shape] >= MANY
            entry.gram = not many and _takes_gram(entry, tol)
        groups.append(entry if entry and (entry.gram or shape in jacobi) else None)
    return groups


def _counts(weights: Sequence[Tensor]) -> dict[tuple[int, ...], int]:
    """Number of matrices of each shape."""
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    for W in weights:
        counts[tuple(W.shape[-2:])] += W.shape[:-2].numel()
    return counts


def small_shapes(weights: Sequence[Tensor]) -> set[tuple[int, ...]]:
    """Matrix shapes (m, n) for which a Jacobi SVD is the fastest route, unless the Gram route serves a few of them."""
    return {
        shape
        for shape, count in _counts(weights).items()
        if 0 < min(shape) <= (SHORT if count >= MANY else ALONE) and max(shape) <= LONG
    }


def _takes_gram(entry: Group, tol: float) -> bool:
    """Whether the Gram route in fp64 meets the tolerance for all matrices of a weight, and pays."""
    n, m = sorted(entry.W.shape[-2:])
    tau, u = entry.function.floor, unit_roundoff(torch.float64)
    pays = m * n * n > LIGHT and n <= MEDIUM and m <= LONGEST and entry.W.device.type == "cpu"
    if not (entry.function.gram and pays):
        return False
    size = norms(entry.matrices())
    least, most = float(size.min()), float(size.max())
    ordinary = tau < least and least >= 2.0**-ORDINARY and most <= 2.0**ORDINARY
    return ordinary and u * most <= tau and GRAM_LOSS * u * most**2 <= entry.function.tolerance(tol) * tau**2


def compute(groups: Sequence[Group], tol: float, ball: bool) -> None:
    """Compute the results of all groups, matrices of one shape, dtype and device together; weights stay unchanged."""
    alike = defaultdict(list)
    for entry in groups:
        key = entry.gram, entry.W.shape[-2:], entry.W.dtype, entry.stored_as, entry.W.device, entry.center is None
        alike[key].append(entry)
    batches = [Batch(members, tol) for members in alike.values()]
    _by_gram([batch for batch in batches if batch.groups[0].gram])
    for batch in batches:
        if not batch.groups[0].gram:
            batch.by_jacobi()
        batch.apply(ball)


class Batch:
    """Matrices ``[B, m, n]`` of one shape and dtype, of one or several weights."""

    s: Tensor  # [B, k] fp64, descending
    Q: Tensor  # singular vectors of the rows' or columns' side, [B, m or n, r], in the dtype of the products
    rows: bool  # whose side that is
    moved: Tensor  # [B] fp64: bound of the backward error of the decomposition and the products

    def __init__(self, groups: Sequence[Group], tol: float):
        self.groups, self.counts = groups, [entry.W.shape[:-2].numel() for entry in groups]
        self.functions, self.repeats = [entry.function for entry in groups], self.counts
        self.X, self.exponents = torch.cat([entry.matrices() for entry in groups]), None
        self.size = norms(self.X)
        if ((self.size > 0) & ((self.size < 2.0**-ORDINARY) | (self.size > 2.0**ORDINARY))).any():
            self._normalize()
        self.floor = self._each([function.floor for function in self.functions])
        exact = [function.count is not None for function in self.functions]  # a rank: no threshold to resolve
        tols = [float("inf") if e else f.tolerance(tol) for e, f in zip(exact, self.functions, strict=True)]
        self.allowed = self._each(tols) * self.floor.clamp_min(0 if not any(exact) else NOT_ZERO)

    def _normalize(self) -> None:
        """Multiply each matrix by a power of two that brings its norm near 1, and scale its function."""
        self.check(self.size.isfinite(), "singular values that fp64 can hold")
        self.exponents = [unit_exponent(norm) for norm in self.size.tolist()]
        owners = (f for f, count in zip(self.functions, self.counts, strict=True) for _ in range(count))
        self.functions = [f.scaled(e) for f, e in zip(owners, self.exponents, strict=True)]
        self.repeats = [1] * len(self.X)
        self.X = rescale(self.X.double(), self.exponents)
        self.size = norms(self.X)

    def _each(self, values: Sequence[float]) -> Tensor:
        """One number per function -> one per matrix, fp64 ``[B]``, or ``[1]`` if there is only one function."""
        each = torch.tensor(values, dtype=torch.float64)
        return each if len(values) == 1 else each.repeat_interleave(torch.tensor(self.repeats))

    def check(self, holds: Tensor, wanted: str) -> None:
        """Raise ValueError with the name of the first weight for one of whose matrices ``holds`` ``[B]`` is false."""
        for entry, part in zip(self.groups, holds.split(self.counts), strict=True):
            if not part.all():
                raise ValueError(f"{entry.label}: wanted {wanted}; got larger numbers; {UNCHANGED}")

    def dtype_for(self, loss: float) -> torch.dtype:
        """fp32 if that is enough for W and an error of ``loss`` units of roundoff times ||X||_F meets the tolerance."""
        coarse = loss * unit_roundoff(torch.float32) * self.size > self.allowed
        return torch.float64 if self.groups[0].W.dtype == torch.float64 or bool(coarse.any()) else torch.float32

    def by_jacobi(self) -> None:
        """Set the decomposition by Jacobi SVDs, in fp32 or fp64."""
        m, n = self.X.shape[1:]
        self.X, self.rows = self.X.to(self.dtype_for(COARSE)), m >= n
        U, s, V = torch.ops.compaware.small_svd(self.X, False)
        self.s, self.Q = s.double(), U if self.rows else V
        self.moved = (LOSS + m + n) * unit_roundoff(self.X.dtype) * self.size
        self.method = f"jacobi, fp{torch.finfo(self.X.dtype).bits}"

    def apply(self, ball: bool) -> None:
        """Set the results of the groups from the decomposition."""
        s, Q, X, groups = self.s, self.Q, self.X, self.groups
        new = batched(self.functions, self.repeats)(s)
        gain = (new / s.clamp_min(NOT_ZERO))[:, : Q.shape[2]].to(X.dtype)
        L, R = (Q, Q.mT @ X) if self.rows else (X @ Q, Q.mT)
        P = X.baddbmm_(L * gain[:, None, :], R, beta=float(ball), alpha=-1 if ball else 1)
        error = self.moved * self._lipschitz_constants(s)
        if self.exponents:
            back = [-e for e in self.exponents]
            P, new, error = rescale(P.double(), back), rescale(new, back), rescale(error, back)
        if groups[0].center is not None:
            P = P + torch.cat([entry.center.reshape(-1, *P.shape[1:]).to(X.dtype) for entry in groups])
        half = 2 * storage(groups[0].W.dtype, 1.0, 0)  # two roundings: adding the center, storing the result
        stored = norms(P)
        narrow = groups[0].stored_as or groups[0].W.dtype
        if bool((stored > torch.finfo(narrow).max).any()):
            self.check(P.to(narrow).isfinite().all(-1).all(-1), f"a result that fits {narrow}")
        error = error + half * stored + storage(groups[0].W.dtype, 0.0, P.shape[1:].numel())
        new = new.cpu()
        parts = (self._per_weight(each) for each in (P, new, (new > 0).sum(-1), error))
        for entry, entry.P, entry.s, entry.rank, entry.error in zip(groups, *parts, strict=True):
            entry.method = self.method

    def _per_weight(self, results: Tensor) -> Sequence[Tensor]:
        """Split ``[B, ...]`` of all matrices into one tensor per weight, with the batch shape of the weight."""
        if all(entry.W.ndim == 2 for entry in self.groups):
            return results.unbind()
        parts = zip(results.split(self.counts), self.groups, strict=True)
        return [part.view(entry.W.shape[:-2] + part.shape[1:]) for part, entry in parts]

    def _lipschitz_constants(self, s: Tensor) -> Tensor:
        """Lipschitz constant of the function of each matrix, near it: fp64 ``[B]``, or ``[1]``."""
        slopes = [function.slope for function in self.functions]
        if None not in slopes:
            return self._each(slopes)
        parts = zip(self.functions, s.split(self.repeats), self.moved.split(self.repeats), strict=True)
        rows = ((f, row, float(by)) for f, part, bys in parts for row, by in zip(part, bys, strict=True))
        return torch.tensor([f.lipschitz(row, 0.0, by) for f, row, by in rows], dtype=torch.float64)


def _by_gram(batches: Sequence[Batch]) -> None:
    """Set the decompositions of all matrices of all batches, by eigenvectors of their Gram matrices."""
    if not batches:
        return
    u, X = unit_roundoff(torch.float64), [M for batch in batches for M in batch.X]
    X = [M if M.dtype == torch.float64 else M.float() for M in X]
    floor = torch.cat([batch.floor.expand(len(batch.X)) for batch in batches]).square()
    size = torch.cat([batch.size for batch in batches])
    w, V, residual = torch.ops.compaware.gram_eigh(X, floor)
    found = list(zip(w, V.split([min(M.shape) ** 2 for M in X]), strict=True))
    for i in (~(residual <= EIGH_LOSS * u * size.square())).nonzero().flatten().tolist():
        w, V, _ = gram_eigh._init_fn(X[i : i + 1], floor[i : i + 1])  # by LAPACK
        found[i] = w[0], V
    for batch in batches:
        mine, found = found[: len(batch.X)], found[len(batch.X) :]
        m, n = batch.X.shape[1:]
        k, dtype = min(m, n), batch.dtype_for(PRODUCTS)
        batch.s = torch.stack([w[:k] for w, _ in mine]).sqrt()
        rank = int((batch.s > 0).sum(-1).max())
        batch.X, batch.rows = batch.X.to(dtype), m < n
        batch.Q = torch.stack([V.view(k, k)[:rank] for _, V in mine]).to(dtype).mT
        rounding = (k + rank + 1) * unit_roundoff(dtype) * batch.size
        slope = batch.groups[0].function.slope
        error = (max(m, n) + EIGH_LOSS) * u * batch.size.square() / batch.floor
        batch.moved = error + rounding / slope
        batch.method = "gram, fp64"


def write(groups: Sequence[Group]) -> None:
    """Write the results to the weights."""
    torch._foreach_copy_([entry.W for entry in groups], [entry.P for entry in groups])
