"""Spectral shrinkage of many small matrices at a time, by Jacobi rotations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .certificate import unit_roundoff
from .spectral import SoftThreshold, Spectral

SHORT, LONG = 64, 256  # up to here Jacobi is faster than a Gram matrix and its eigenvectors,
TINY, MANY = 16, 16  # of a single matrix up to TINY, of larger ones where there are MANY of one shape
LOSS = 40  # error of U f(s) V^T before the last product, in units of u ||W||_F; measured: below 20
TYPICAL = 10  # the same, usually


@dataclass
class Group:
    """All matrices of one weight ``[..., m, n]``."""

    W: Tensor
    function: Spectral
    center: Tensor | None
    norms: Tensor  # fp64 [...]
    dtype: torch.dtype  # to compute in
    # what comes out
    s: Tensor | None = None  # [B, k] of the result
    error: Tensor | None = None  # [B]
    P: Tensor | None = None  # [B, m, n]

    @property
    def method(self) -> str:
        return f"jacobi, fp{torch.finfo(self.dtype).bits}"

    def matrices(self) -> Tensor:
        X = self.W if self.center is None else self.W.double() - self.center.double()
        return X.to(self.dtype).reshape(-1, *self.W.shape[-2:])


def small_shapes(weights: Sequence[Tensor]) -> set[tuple[int, int]]:
    """The shapes of matrices that are worth doing many at a time."""
    counts = defaultdict(int)
    for W in weights:
        counts[tuple(W.shape[-2:])] += W.shape[:-2].numel()
    return {
        (m, n)
        for (m, n), count in counts.items()
        if min(m, n) <= (SHORT if count >= MANY else TINY) and max(m, n) <= LONG
    }


def group(W: Tensor, function: Spectral, center: Tensor | None, norms: Tensor, tol: float) -> Group:
    """The work of one weight, in fp32 where that is accurate enough."""
    coarse = TYPICAL * unit_roundoff(torch.float32) * float(norms.max()) > tol * function.floor
    double = W.dtype == torch.float64 or (coarse and function.count is None)
    return Group(W, function, center, norms, torch.float64 if double else torch.float32)


def compute(groups: Sequence[Group], ball: bool) -> None:
    """Find the results, in one call for all matrices of the same shape and dtype; write nothing."""
    alike = defaultdict(list)
    for entry in groups:
        alike[entry.W.shape[-2:], entry.dtype, entry.W.device].append(entry)
    for members in alike.values():
        counts = [entry.norms.numel() for entry in members]
        X = torch.cat([entry.matrices() for entry in members])
        U, s, V = torch.ops.compaware.small_svd(X)
        new = _new_spectra(s.double(), members, counts)
        P = torch.bmm(U * new.to(U.dtype)[:, None, :], V.mT)
        P = X - P if ball else P
        norms = torch.cat([entry.norms.flatten().to(X.device) for entry in members])
        error = (LOSS + min(X.shape[1:])) * unit_roundoff(X.dtype) * norms
        parts = (P.split(counts), s.double().split(counts), new.split(counts), error.split(counts))
        for entry, P_, s_, new_, error_ in zip(members, *parts, strict=True):
            entry.P, entry.s, entry.error = P_, new_, error_ * _gain(entry.function, s_, error_)


def _new_spectra(s: Tensor, groups: Sequence[Group], counts: Sequence[int]) -> Tensor:
    if all(isinstance(entry.function, SoftThreshold) for entry in groups):
        tau = torch.tensor([entry.function.tau for entry in groups], dtype=s.dtype, device=s.device)
        return (s - tau.repeat_interleave(torch.tensor(counts, device=s.device))[:, None]).clamp_min(0)
    return torch.cat([entry.function(part) for entry, part in zip(groups, s.split(counts), strict=True)])


def _gain(function: Spectral, s: Tensor, error: Tensor) -> float | Tensor:
    if isinstance(function, SoftThreshold):
        return 1.0
    gains = [function.lipschitz(row, 0.0, float(moved)) for row, moved in zip(s, error, strict=True)]
    return torch.tensor(gains, dtype=error.dtype, device=error.device)


def write(groups: Sequence[Group]) -> None:
    """Put the results in their places."""
    for entry in groups:
        entry.P = entry.P.reshape(entry.W.shape)
        if entry.center is not None:
            entry.P = entry.P + entry.center.to(entry.P.dtype)
    if groups:
        torch._foreach_copy_([entry.W for entry in groups], [entry.P for entry in groups])
