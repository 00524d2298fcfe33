"""One matrix of a spectral step: what the solver computes it from, its normalization, and how its result is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._utils.dtypes import compute_dtype
from ..distributed.dtensor import MatrixSharding
from ..distributed.row_sharded import RowSharded
from ..ops.linalg import ROWS, product
from .error_bounds import UNCHANGED, norms, rescale, unit_exponent, unit_roundoff
from .gram import Dense
from .jacobi import difference
from .spectral_functions import Spectral

__all__ = ["Task", "check_fits", "product_dtype", "write"]


@dataclass
class Task:
    """One matrix (or the local row shard of a sharded one), its spectral function, and the result."""

    W: Tensor  # [m, n] in any orientation; overwritten by :func:`write`
    function: Spectral
    center: Tensor | None
    key: str  # key in the warm state
    label: str  # name of the weight in error messages
    stored_as: torch.dtype  # dtype whose range the result must fit: that of W, or a narrower one
    tol: float  # tolerance of the matrix; that of f(W) is up to ``slope`` times as large
    basis: Tensor | None = None  # [n, k] from the warm state; after :func:`.solver.compute`, the new one
    seed: int = 0
    shards: MatrixSharding | None = None  # if given, W is this rank's row shard of the tall matrix
    local_shapes: Sequence[torch.Size] = ()  # local shapes before each all-to-all, to undo it
    exponent: int = 0  # what follows, and the function, are those of 2^exponent (W - center)
    norm: float = 0.0  # >= ||X||_F
    too_wide: bool = False  # the subspace would need too many columns, in any precision
    # results
    method: str = ""
    reason: str = ""
    s: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))  # [rank], of the result
    error: float = 0.0  # >= the Frobenius norm of the error, storage rounding excluded
    stored: float = 0.0  # >= the Frobenius norm of the values rounded to the dtype of W; not scaled
    left: Tensor | None = None  # [m, r]: the result is left right^T
    right: Tensor | None = None  # [n, r]
    dense: Dense | None = None

    @property
    def tall(self) -> bool:
        return self.shards is not None or self.W.shape[0] >= self.W.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the global matrix, m >= n."""
        m, n = sorted(self.W.shape if self.shards is None else self.shards.shape, reverse=True)
        return m, n

    def matrix(self) -> RowSharded:
        """X = 2^exponent (W - center) ``[m, n]``, m >= n; fp32, or fp64 if the weight is or the difference needs it."""
        dtype = compute_dtype(self.W.dtype)
        X = self.scaled_difference()
        X = X.to(dtype if self.center is None else product_dtype(self, dtype))
        return RowSharded(X if self.tall else X.mT, self.shape[0], () if self.shards is None else self.shards.groups)

    def scaled_difference(self) -> Tensor:
        """``2^exponent (W - center)``: W itself, or in fp64."""
        X = difference(self.W, self.center)
        return rescale(X.double(), self.exponent) if self.exponent else X

    def normalize(self) -> None:
        """Set the norm and, if it is extreme, the exponent that brings it near 1, and scale the function.

        Raises:
            ValueError: singular values beyond the largest fp64 number.
        """
        self.norm = self.norm_of(difference(self.W, self.center))
        if not math.isfinite(self.norm):
            wanted = "singular values that fp64 can hold"
            raise ValueError(f"{self.label}: wanted {wanted}; got larger numbers; {UNCHANGED}")
        self.exponent = unit_exponent(self.norm)
        if self.exponent:
            self.function, self.norm = self.function.scaled(self.exponent), self.norm_of(self.scaled_difference())

    def norm_of(self, W: Tensor) -> float:
        """Upper bound of the Frobenius norm of the global matrix; W is the local shard."""
        norm = float(norms(W))
        return norm if self.shards is None else RowSharded(W, 0, self.shards.groups).global_norm(norm)

    @property
    def generator(self) -> torch.Generator:
        """A new generator for the probes, seeded by the task: the same probes on every rank."""
        return torch.Generator(self.W.device).manual_seed(self.seed)


def check_fits(task: Task, ball: bool) -> None:
    """Raise ValueError if a number of the result is beyond the range of the dtype that it is stored in."""
    largest = task.function.floor if ball else float(task.s[0]) if len(task.s) else 0.0  # singular value
    bound = 1.01 * rescale(largest, -task.exponent) + (0.0 if task.center is None else task.norm_of(task.center))
    if bound <= torch.finfo(task.stored_as).max:
        return
    trial = replace(task, W=task.W.clone())
    _store(trial, ball)
    beyond = torch.tensor(float(not trial.W.to(task.stored_as).isfinite().all()), device=task.W.device)
    if task.shards is not None:
        RowSharded(task.W, 0, task.shards.groups).all_reduce(beyond)
    if beyond:
        raise ValueError(f"{task.label}: wanted a result that fits {task.stored_as}; got larger numbers; {UNCHANGED}")


def write(task: Task, ball: bool) -> None:
    """Write f(W), plus its center, to W; if ``ball``, write W - f(W)."""
    _store(task, ball)
    # with a center or a difference there are two roundings: adding, then storing
    two = ball or task.center is not None
    task.stored = 2.02 * task.norm_of(task.W) if two else rescale(float(task.s.norm()), -task.exponent)


def _store(task: Task, ball: bool) -> None:
    """:func:`write` without the norm of what is stored."""
    W, center = task.W, task.center
    if task.left is not None:
        left, right = (task.left, task.right) if task.tall else (task.right, task.left)
        right = right.mT.contiguous().mT
        for part in _row_ranges(W):
            P = _unscaled(task, product(left[part], right.mT))
            W[part] = W[part] - P if ball else P if center is None else P + center[part].to(P.dtype)
    elif task.dense is not None:
        dtype = product_dtype(task, torch.float64 if W.dtype == torch.float64 else torch.float32)
        X = task.matrix().X
        dtype = torch.promote_types(dtype, X.dtype)
        X = X.to(dtype)
        X = X if task.tall else X.mT
        L, R = task.dense.L.to(dtype), None if task.dense.R is None else task.dense.R.to(dtype)
        for part in _row_ranges(W) if task.tall else [slice(None)]:
            P = _times_factors(X[part], L, R, task.tall)
            if ball != task.dense.residual:  # the result is X - X K
                P = torch.sub(X[part], P, out=P)
            P = _unscaled(task, P)
            W[part] = P if center is None else P + center[part].to(dtype)
    elif not ball:
        W.zero_() if center is None else W.copy_(center)


def _unscaled(task: Task, P: Tensor) -> Tensor:
    """``2^-exponent P``: P itself, or in fp64."""
    return rescale(P.double(), -task.exponent) if task.exponent else P


def _times_factors(X: Tensor, L: Tensor, R: Tensor | None, tall: bool) -> Tensor:
    """``X K`` of rows of X, or ``K^T X`` if X is wide; ``K = L R^T``, or L if R is None."""
    if tall:
        return product(X, L) if R is None else product(product(X, L), R.mT)
    return product(L.mT, X) if R is None else product(R, product(L.mT, X))


def _row_ranges(W: Tensor) -> list[slice]:
    """Row blocks of W ``[m, n]`` that bound the size of temporaries."""
    rows = max(1, ROWS // W.shape[1])
    return [slice(start, start + rows) for start in range(0, W.shape[0], rows)]


def product_dtype(task: Task, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the products of the dense routes: fp64 if fp32 cannot meet the tolerance."""
    coarse = 32 * unit_roundoff(dtype) * task.norm > task.tol * task.function.floor
    return torch.float64 if coarse and task.function.count is None else dtype
