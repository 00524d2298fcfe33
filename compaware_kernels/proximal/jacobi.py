"""Spectral shrinkage of many small matrices at a time, by Jacobi rotations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.constants import constant
from .error_bounds import norms, storage, unit_roundoff
from .spectral_functions import Spectral, batched

SHORT, LONG = 64, 256  # up to here Jacobi is faster than a Gram matrix and its eigenvectors,
ALONE, MANY = 16, 16  # of a single matrix up to ALONE, of larger ones where there are MANY of one shape
LOSS = constant("kLoss")  # error of U f(s) V^T before the last product, in units of u ||W||_F
COARSE = constant("kCoarse")  # the same, in the choice of fp32


@dataclass
class Group:
    """All matrices of one weight ``[..., m, n]``."""

    W: Tensor
    function: Spectral
    center: Tensor | None
    # what comes out
    s: Tensor | None = None  # fp64 [..., k] of the result
    rank: Tensor | None = None  # int64 [...]
    error: Tensor | None = None  # fp64 [...], storage included
    P: Tensor | None = None  # [..., m, n]
    method: str = ""

    def matrices(self) -> Tensor:
        return difference(self.W, self.center).reshape(-1, *self.W.shape[-2:])


def difference(W: Tensor, center: Tensor | None) -> Tensor:
    """W less its center, in fp64 where there is one."""
    return W if center is None else W.double() - center.double()


def small_shapes(weights: Sequence[Tensor]) -> set[tuple[int, int]]:
    """The shapes of matrices that are worth doing many at a time."""
    counts = defaultdict(int)
    for W in weights:
        counts[tuple(W.shape[-2:])] += W.shape[:-2].numel()
    return {
        (m, n)
        for (m, n), count in counts.items()
        if 0 < min(m, n) <= (SHORT if count >= MANY else ALONE) and max(m, n) <= LONG
    }


def compute(groups: Sequence[Group], tol: float, ball: bool) -> None:
    """Find the results, in one call for all matrices of the same shape and dtype; write nothing."""
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
    exact = torch.tensor([entry.function.count is not None for entry in groups])  # no threshold to be coarse for
    of = torch.arange(len(groups)).repeat_interleave(torch.tensor(counts))  # the group of each matrix
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
    error = moved * _gains(groups, s, moved, counts)
    if groups[0].center is not None:
        P = P + torch.cat([entry.center.reshape(-1, *P.shape[1:]).to(dtype) for entry in groups])
    half = 2 * storage(groups[0].W.dtype, 1.0, 0)  # of the result, and of adding the center
    error += half * norms(P) + storage(groups[0].W.dtype, 0.0, P[0].numel())
    new, method = new.cpu(), f"jacobi, fp{torch.finfo(dtype).bits}"
    parts = (_per_weight(each, groups, counts) for each in (P, new, (new > 0).sum(-1), error))
    for entry, entry.P, entry.s, entry.rank, entry.error in zip(groups, *parts, strict=True):
        entry.method = method


def _per_weight(results: Tensor, groups: Sequence[Group], counts: Sequence[int]) -> Sequence[Tensor]:
    """``[B, ...]`` of all matrices, in the shapes of the weights' batches."""
    if all(entry.W.ndim == 2 for entry in groups):
        return results.unbind()
    parts = zip(results.split(counts), groups, strict=True)
    return [part.view(entry.W.shape[:-2] + part.shape[1:]) for part, entry in parts]


def _gains(groups: Sequence[Group], s: Tensor, moved: Tensor, counts: Sequence[int]) -> Tensor:
    slopes = [entry.function.slope for entry in groups]
    if None not in slopes:
        return torch.tensor(slopes, dtype=torch.float64).repeat_interleave(torch.tensor(counts))
    parts = zip(groups, s.split(counts), moved.split(counts), strict=True)
    rows = ((entry.function, row, float(by)) for entry, part, bys in parts for row, by in zip(part, bys, strict=True))
    return torch.tensor([function.lipschitz(row, 0.0, by) for function, row, by in rows], dtype=torch.float64)


def write(groups: Sequence[Group]) -> None:
    """Put the results in their places."""
    torch._foreach_copy_([entry.W for entry in groups], [entry.P for entry in groups])
