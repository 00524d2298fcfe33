"""Jacobi route of the solver: spectral functions of batches of small matrices, by a one-sided Jacobi SVD.

For X ``[m, n]`` with m >= n, else its transpose: ``f(X) = U diag(g(s)) U^T X``, ``g(s) = f(s) / s``, with the singular
vectors of the longer side. Those of the shorter side take no rotations of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.constants import constant
from .error_bounds import NOT_ZERO, ORDINARY, UNCHANGED, norms, rescale, storage, unit_exponent, unit_roundoff
from .spectral_functions import Spectral, batched

__all__ = [
    "ALONE",
    "COARSE",
    "LONG",
    "LOSS",
    "MANY",
    "SHORT",
    "Group",
    "check_each",
    "compute",
    "difference",
    "small_shapes",
    "write",
]

SHORT, LONG = 64, 256  # limits of min(m, n) and max(m, n): beyond, the Gram route is faster
ALONE, MANY = 16, 16  # min(m, n) up to ALONE pays for any number of matrices; up to SHORT, for MANY of one shape
LOSS = constant("kLoss")  # error of U g(s) U^T before the last two products, in units of u ||W||_F
COARSE = 40  # the same error, as assumed when choosing between fp32 and fp64; measured: up to 33 (256 x 43)


@dataclass
class Group:
    """All matrices of one weight ``[..., m, n]``, and their results."""

    W: Tensor
    function: Spectral
    center: Tensor | None
    label: str  # name of the weight in error messages
    stored_as: torch.dtype | None = None  # if the result is rounded to a narrower dtype later
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


def small_shapes(weights: Sequence[Tensor], alone: int = ALONE) -> set[tuple[int, int]]:
    """Matrix shapes (m, n) for which a batched Jacobi SVD is fast; with alone = 0, only those of MANY matrices."""
    counts = defaultdict(int)
    for W in weights:
        counts[W.shape[-2:]] += W.shape[:-2].numel()
    return {
        (m, n)
        for (m, n), count in counts.items()
        if 0 < min(m, n) <= (SHORT if count >= MANY else alone) and max(m, n) <= LONG
    }


def compute(groups: Sequence[Group], tol: float, ball: bool) -> None:
    """Compute the results of all groups, one batched SVD per shape, dtype and device; weights stay unchanged."""
    alike = defaultdict(list)
    for entry in groups:
        key = entry.W.shape[-2:], entry.W.dtype, entry.stored_as, entry.W.device, entry.center is None
        alike[key].append(entry)
    for members in alike.values():
        _compute_alike(members, tol, ball)


def _compute_alike(groups: Sequence[Group], tol: float, ball: bool) -> None:
    counts, functions = [entry.W.shape[:-2].numel() for entry in groups], [entry.function for entry in groups]
    matrices = groups[0].center is None and all(entry.W.ndim == 2 for entry in groups)
    X = torch.stack([e.W for e in groups]) if matrices else torch.cat([e.matrices() for e in groups])
    size, repeats, exponents = norms(X), counts, None
    if all(function == functions[0] for function in functions):
        functions, repeats = functions[:1], [len(X)]
    if ((size > 0) & ((size < 2.0**-ORDINARY) | (size > 2.0**ORDINARY))).any():  # each matrix to a norm near 1
        check_each(groups, counts, size.isfinite(), "singular values that fp64 can hold")
        exponents = [unit_exponent(norm) for norm in size.tolist()]
        owners = (function for function, count in zip(functions, repeats, strict=True) for _ in range(count))
        functions = [function.scaled(e) for function, e in zip(owners, exponents, strict=True)]
        repeats = [1] * len(X)
        X = rescale(X.double(), exponents)
        size = norms(X)
    floor = torch.tensor([function.floor for function in functions], dtype=torch.float64)
    tols = torch.tensor([function.tolerance(tol) for function in functions], dtype=torch.float64)
    exact = torch.tensor([function.count is not None for function in functions])  # a rank: no threshold to resolve
    of = torch.arange(len(functions)).repeat_interleave(torch.tensor(repeats))  # function of each matrix
    coarse = (COARSE * unit_roundoff(torch.float32) * size > (tols * floor)[of]) & ~exact[of]
    double = bool(coarse.any()) or groups[0].W.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    X = X.to(dtype)
    U, s, V = torch.ops.compaware.small_svd(X, True)
    s = s.double()
    new = batched(functions, repeats)(s)
    gain = (new / s.clamp_min(NOT_ZERO)).to(dtype)
    P = X.baddbmm_(U.mul_(gain[:, None, :]), V.mT, beta=float(ball), alpha=-1 if ball else 1)
    moved = (LOSS + sum(X.shape[1:])) * unit_roundoff(dtype) * size
    error = moved * _lipschitz_constants(functions, s, moved, repeats)
    if exponents:
        back = [-e for e in exponents]
        P, new, error = rescale(P.double(), back), rescale(new, back), rescale(error, back)
    if groups[0].center is not None:
        P = P + torch.cat([entry.center.reshape(-1, *P.shape[1:]).to(dtype) for entry in groups])
    half = 2 * storage(groups[0].W.dtype, 1.0, 0)  # two roundings: adding the center, storing the result
    stored = norms(P)
    narrow = groups[0].stored_as or groups[0].W.dtype
    if bool((stored > torch.finfo(narrow).max).any()):
        check_each(groups, counts, P.to(narrow).isfinite().all(-1).all(-1), f"a result that fits {narrow}")
    error += half * stored + storage(groups[0].W.dtype, 0.0, P.shape[1:].numel())
    new, method = new.cpu(), f"jacobi, fp{torch.finfo(dtype).bits}"
    parts = (_per_weight(each, groups, counts) for each in (P, new, (new > 0).sum(-1), error))
    for entry, entry.P, entry.s, entry.rank, entry.error in zip(groups, *parts, strict=True):
        entry.method = method


def check_each(groups: Sequence[Group], counts: Sequence[int], holds: Tensor, wanted: str) -> None:
    """Raise ValueError with the name of the first weight for one of whose matrices ``holds`` ``[B]`` is false."""
    for entry, part in zip(groups, holds.split(counts), strict=True):
        if not part.all():
            raise ValueError(f"{entry.label}: wanted {wanted}; got larger numbers; {UNCHANGED}")


def _per_weight(results: Tensor, groups: Sequence[Group], counts: Sequence[int]) -> Sequence[Tensor]:
    """Split ``[B, ...]`` of all matrices into one tensor per weight, with the batch shape of the weight."""
    if all(entry.W.ndim == 2 for entry in groups):
        return results.unbind()
    parts = zip(results.split(counts), groups, strict=True)
    return [part.view(entry.W.shape[:-2] + part.shape[1:]) for part, entry in parts]


def _lipschitz_constants(functions: Sequence[Spectral], s: Tensor, moved: Tensor, counts: Sequence[int]) -> Tensor:
    """Lipschitz constants ``[B]``, functions[i] for counts[i] matrices; ``moved`` ``[B]``: backward errors of SVDs."""
    slopes = [function.slope for function in functions]
    if None not in slopes:
        return torch.tensor(slopes, dtype=torch.float64).repeat_interleave(torch.tensor(counts))
    parts = zip(functions, s.split(counts), moved.split(counts), strict=True)
    rows = ((f, row, float(by)) for f, part, bys in parts for row, by in zip(part, bys, strict=True))
    return torch.tensor([f.lipschitz(row, 0.0, by) for f, row, by in rows], dtype=torch.float64)


def write(groups: Sequence[Group]) -> None:
    """Write the results to the weights."""
    torch._foreach_copy_([entry.W for entry in groups], [entry.P for entry in groups])
