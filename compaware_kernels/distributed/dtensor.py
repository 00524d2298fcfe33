"""How a weight that torch distributes (DTensor: FSDP2, tensor parallel) lies over the processes, as a matrix.

``Shard(0)`` divides the outputs, that is the rows of every fold; ``Shard(1)`` divides the inputs, its columns. The
engine wants the longer side divided and the shorter one whole. Where it is not so, one all-to-all turns what lies here,
before and after: of an m x n matrix over p processes each sends ``m n (p - 1) / p^2`` numbers; none ever has it whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .._utils.dtypes import compute_dtype
from ..folds import to_matrix
from .collectives import columns_from_rows, rows_from_columns
from .row_sharded import Rows


@dataclass(frozen=True)
class Shards:
    """The groups of processes among which one matrix is divided, or repeated."""

    shape: tuple[int, int]  # of the whole
    rows: tuple[dist.ProcessGroup, ...] = ()
    columns: tuple[dist.ProcessGroup, ...] = ()

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        return (*self.rows, *self.columns)

    @property
    def tall(self) -> bool:
        return self.shape[0] >= self.shape[1]

    def turn(self, M: Tensor) -> tuple[Tensor, list[torch.Size]]:
        """``[m_i, n_j]`` here -> rows of the longer side ``[., min(m, n)]``, a view where nothing has to move; and the
        shapes on the way, for the way back."""
        X, shapes = M if self.tall else M.mT, []
        for group in self._across:
            shapes.append(X.shape)
            X = rows_from_columns(X, group)
        return X, shapes

    def turn_back(self, X: Tensor, M: Tensor, shapes: Sequence[torch.Size]) -> None:
        """Write what was turned into M."""
        for group, shape in zip(reversed(self._across), reversed(shapes), strict=True):
            X = columns_from_rows(X, shape, group)
        if shapes:
            M.copy_(X if self.tall else X.mT)

    def singular_values(self, M: Tensor) -> Tensor:
        """Of the whole, fp64 ``[min(m, n)]``: from the Gram matrix, or for fp64 from QR factorisations."""
        X = Rows(self.turn(M)[0].to(compute_dtype(M.dtype)), max(self.shape), self.groups)
        if M.dtype == torch.float64:
            return torch.linalg.svdvals(X.triangle())
        return torch.linalg.eigvalsh(X.gram(torch.float64)).clamp_min(0).sqrt().flip(0)

    def count_rows(self, flags: Tensor) -> float:
        """How many neurons have a flag in some column; flags are of those that lie here."""
        for group in self.columns:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group)
        total = flags.sum()
        for group in self.rows:
            dist.all_reduce(total, group=group)
        return float(total)

    @property
    def _across(self) -> tuple[dist.ProcessGroup, ...]:
        """Those that divide the shorter side."""
        return self.columns if self.tall else self.rows


def is_dtensor(W: Tensor) -> bool:
    """Without importing what nobody here uses."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(W, module.DTensor)


def local(W: Tensor) -> Tensor:
    """What lies here; in place for in-place operations."""
    return W.to_local() if is_dtensor(W) else W


def device_of(weights: Sequence[Tensor]) -> torch.device | None:
    """Where the messages about these weights travel."""
    return next((local(W).device for W in weights if is_dtensor(W)), None)


def shards_of(W: Tensor, fold: str | None, name: str) -> Shards | None:
    """How the matrix of a weight ``[O, C, *K]`` lies; None where this process holds all of it.

    Raises:
        ValueError: divided along a kernel axis, or a batch of matrices.
    """
    along: dict[int, list[dist.ProcessGroup]] = {0: [], 1: []}
    for placement, group in _dims(W):
        if placement.is_replicate():
            continue
        if getattr(placement, "dim", None) not in along or (fold is None and W.ndim > 2):
            raise ValueError(f"{name}: wanted a weight sharded along its outputs or inputs; got {W.placements}")
        along[placement.dim].append(group)
    if not any(along.values()):
        return None
    m, n = to_matrix(torch.empty(W.shape, device="meta"), fold or "paper").shape[1:]
    return Shards((m, n), tuple(along[0]), tuple(along[1]))


def replicas_of(W: Tensor) -> list[dist.ProcessGroup]:
    """The groups of processes that hold the same of the weight as this one."""
    return [group for placement, group in _dims(W) if placement.is_replicate()]


def groups_of(weights: Sequence[Tensor], replicas: bool = True) -> list[dist.ProcessGroup]:
    """All groups that the weights are distributed over, each once, in the same order on every process.

    replicas: also those that hold the same of a weight, who may be doing something else.
    """
    return list(dict.fromkeys(g for W in weights for p, g in _dims(W) if replicas or not p.is_replicate()))


def _dims(W: Tensor) -> list[tuple]:
    """Placement and group of every axis of the mesh with more than one process."""
    if not is_dtensor(W):
        return []
    mesh = W.device_mesh
    return [(p, mesh.get_group(i)) for i, p in enumerate(W.placements) if mesh.size(i) > 1]


def placed(t: Tensor, like: Tensor, placements: Sequence | None = None) -> Tensor:
    """A tensor, if need be one that every process holds, over the mesh of the DTensor ``like``, placed as that is."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements if placements is None else tuple(placements)
    if not is_dtensor(t):
        t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return t if t.placements == placements else t.redistribute(mesh, placements)


def by_rows(bias: Tensor, W: Tensor) -> Tensor:
    """A bias as its neurons lie in W: divided as the rows are, whole where the columns are divided."""
    from torch.distributed.tensor import Replicate

    if not is_dtensor(W):
        return bias
    return placed(bias, W, [p if getattr(p, "dim", None) == 0 else Replicate() for p in W.placements])


def as_before(t: Tensor, like: Tensor) -> Tensor:
    """The values of t, placed as ``like`` is, which may be a plain tensor."""
    if is_dtensor(like):
        return placed(t, like)
    return t.full_tensor() if is_dtensor(t) else t


def column_groups(W: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups that the inputs are divided among."""
    shards = shards_of(W, "paper", "W")
    return shards.columns if shards else ()
