"""Jacobi route of the solver: spectral functions of batches of small matrices, by a one-sided Jacobi SVD."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.constants import constant
from .error_bounds import norms, storage, unit_roundoff
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
    "small_shapes",
    "write",
]

SHORT, LONG = 64, 256  # limits of min(m, n) and max(m, n): beyond, the Gram route is faster
ALONE, MANY = 16, 16  # min(m, n) up to ALONE pays for any number of matrices; up to SHORT, for MANY of one shape
LOSS = constant("kLoss")  # error of U f(s) V^T before the last product, in units of u ||W||_F
COARSE = constant("kCoarse")  # the same error, as assumed when choosing between fp32 and fp64


@dataclass
class Group:
    """All matrices of one weight ``[..., m, n]``, and their results."""

    W: Tensor
    function: Spectral
    center: Tensor | None
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


def small_shapes(weights: Sequence[Tensor]) -> set[tuple[int, int]]:
    """Matrix shapes (m, n) for which a batched Jacobi SVD is the fastest route."""
    counts = defaultdict(int)
    for W in weights:
        counts[tuple(W.shape[-2:])] += W.shape[:-2].numel()
    return {
        (m, n)
        for (m, n), count in counts.items()
        if 0 < min(m, n) <= (SHORT if count >= MANY else ALONE) and max(m, n) <= LONG
    }


def compute(groups: Sequence[Group], tol: float, ball: bool) -> None:
    """Compute the results of all groups, one batched SVD per shape, dtype and device; weights stay unchanged."""
    alike = defaultdict(list)
    for entry in groups:
        alike[entry.W.shape[-2:], entry.W.dtype, entry.W.device, entry.center is None].append(entry)
    for members in alike.values():
        _compute_alike(members, tol, ball)


def _compute_alike(groups: Sequence[Group], tol: float, ball: bool) -> None:
    counts = [entry.W.shape[:-2].numel() for entry in groups]
    X = torch.cat([entry.matrices() for entry in groups])
    floor = torch.tensor([entry.function.floor for entry in groups], dtype=torch.float64)
    tols = torch.tensor([entry.function.tolerance(tol) for entry in groups], dtype=torch.float64)
    exact = torch.tensor([entry.function.count is not None for entry in groups])  # a rank: no threshold to resolve
    of = torch.arange(len(groups)).repeat_interleave(torch.tensor(counts))  # group index of each matrix
    size = norms(X)
    coarse = (COARSE * unit_roundoff(torch.float32) * size > (tols * floor)[of]) & ~exact[of]
    double = bool(coarse.any()) or groups[0].W.dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    X = X.to(dtype)
    U, s, V = torch.ops.compaware.small_svd(X)
    s = s.double()
    new = batched([entry.function for entry in groups], counts)(s)
    P = X.baddbmm_(U.mul_(new.to(dtype)[:, None, :]), V.mT, beta=float(ball), alpha=-1 if ball else 1)
    moved = (LOSS + s.shape[1]) * unit_roundoff(dtype) * size
    error = moved * _lipschitz_constants(groups, s, moved, counts)
    if groups[0].center is not None:
        P = P + torch.cat([entry.center.reshape(-1, *P.shape[1:]).to(dtype) for entry in groups])
    half = 2 * storage(groups[0].W.dtype, 1.0, 0)  # two roundings: adding the center, storing the result
    error += half * norms(P) + storage(groups[0].W.dtype, 0.0, P[0].numel())
    new, method = new.cpu(), f"jacobi, fp{torch.finfo(dtype).bits}"
    parts = (_per_weight(each, groups, counts) for each in (P, new, (new > 0).sum(-1), error))
    for entry, entry.P, entry.s, entry.rank, entry.error in zip(groups, *parts, strict=True):
        entry.method = method


def _per_weight(results: Tensor, groups: Sequence[Group], counts: Sequence[int]) -> Sequence[Tensor]:
    """Split ``[B, ...]`` of all matrices into one tensor per weight, with the batch shape of the weight."""
    if all(entry.W.ndim == 2 for entry in groups):
        return results.unbind()
    parts = zip(results.split(counts), groups, strict=True)
    return [part.view(entry.W.shape[:-2] + part.shape[1:]) for part, entry in parts]


def _lipschitz_constants(groups: Sequence[Group], s: Tensor, moved: Tensor, counts: Sequence[int]) -> Tensor:
    """Lipschitz constants ``[B]`` of the spectral functions; ``moved`` ``[B]``: backward errors of the SVDs."""
    slopes = [entry.function.slope for entry in groups]
    if None not in slopes:
        return torch.tensor(slopes, dtype=torch.float64).repeat_interleave(torch.tensor(counts))
    parts = zip(groups, s.split(counts), moved.split(counts), strict=True)
    rows = ((entry.function, row, float(by)) for entry, part, bys in parts for row, by in zip(part, bys, strict=True))
    return torch.tensor([function.lipschitz(row, 0.0, by) for function, row, by in rows], dtype=torch.float64)


def write(groups: Sequence[Group]) -> None:
    """Write the results to the weights."""
    torch._foreach_copy_([entry.W for entry in groups], [entry.P for entry in groups])
