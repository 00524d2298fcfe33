"""Layout of a DTensor weight (FSDP2, tensor parallel) as a matrix: its shards, and resharding for the solver.

``Shard(0)`` shards the outputs, which are rows under every fold; ``Shard(1)`` shards the inputs, which are columns. The
solver needs the longer side sharded and the shorter one whole. Where the shorter side is sharded, one all-to-all
reshards the matrix before and one after: of an m x n matrix over p ranks each rank sends ``m n (p - 1) / p^2``
elements. No rank ever holds the whole matrix.
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
from .collectives import columns_to_rows, rows_to_columns
from .row_sharded import RowSharded

__all__ = ["MatrixSharding", "column_groups", "communication_device", "distribute_bias", "is_dtensor", "local",
           "placed", "process_groups", "redistribute_like", "replica_groups", "sharding_of"]  # fmt: skip


@dataclass(frozen=True)
class MatrixSharding:
    """Process groups over which the rows and the columns of one matrix [m, n] are sharded."""

    shape: tuple[int, int]  # of the whole matrix
    row_groups: tuple[dist.ProcessGroup, ...] = ()
    column_groups: tuple[dist.ProcessGroup, ...] = ()

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """All groups that the matrix is sharded over."""
        return (*self.row_groups, *self.column_groups)

    @property
    def tall(self) -> bool:
        """m >= n."""
        return self.shape[0] >= self.shape[1]

    def to_row_shards(self, M: Tensor) -> tuple[Tensor, list[torch.Size]]:
        """This rank's row shard of the tall matrix (M or M^T); local shapes before each all-to-all, to undo it.

        Args:
            M: local shard ``[m_i, n_j]``.

        Returns:
            ``[., min(m, n)]``, a view of M where nothing has to be communicated, and the shapes for
            :meth:`from_row_shards`.
        """
        X, shapes = M if self.tall else M.mT, []
        for group in self._shorter_side_groups:
            shapes.append(X.shape)
            X = columns_to_rows(X, group)
        return X, shapes

    def from_row_shards(self, X: Tensor, M: Tensor, shapes: Sequence[torch.Size]) -> None:
        """Inverse of :meth:`to_row_shards`: write the row shard ``X`` into the local shard ``M``, in place.

        Without shapes X is a view of M, and there is nothing to write.
        """
        for group, shape in zip(reversed(self._shorter_side_groups), reversed(shapes), strict=True):
            X = rows_to_columns(X, shape, group)
        if shapes:
            M.copy_(X if self.tall else X.mT)

    def singular_values(self, M: Tensor) -> Tensor:
        """Singular values of the whole matrix, descending, fp64 ``[min(m, n)]``, from the local shard ``[m_i, n_j]``.

        Square roots of the eigenvalues of the fp64 Gram matrix; for fp64 weights, which need more than half of the
        digits, the singular values of R of a QR factorization.
        """
        X = RowSharded(self.to_row_shards(M)[0].to(compute_dtype(M.dtype)), max(self.shape), self.groups)
        if M.dtype == torch.float64:
            return torch.linalg.svdvals(X.r_factor())
        return torch.linalg.eigvalsh(X.gram(torch.float64)).clamp_min(0).sqrt().flip(0)

    def count_flagged_rows(self, flags: Tensor) -> float:
        """Number of rows of the whole matrix that are flagged in some column shard.

        Args:
            flags: 0 or 1 ``[m_i]``, one per local row; overwritten.
        """
        for group in self.column_groups:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group)
        total = flags.sum()
        for group in self.row_groups:
            dist.all_reduce(total, group=group)
        return float(total)

    @property
    def _shorter_side_groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Groups over which the shorter side is sharded."""
        return self.column_groups if self.tall else self.row_groups


def is_dtensor(W: Tensor) -> bool:
    """Whether W is a DTensor; does not import ``torch.distributed.tensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(W, module.DTensor)


def local(W: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor itself."""
    return W.to_local() if is_dtensor(W) else W


def communication_device(weights: Sequence[Tensor]) -> torch.device | None:
    """Device for collective calls about these weights: that of the first DTensor's shard; None without DTensors."""
    return next((local(W).device for W in weights if is_dtensor(W)), None)


def sharding_of(W: Tensor, fold: str | None, name: str) -> MatrixSharding | None:
    """Sharding of the folded matrix of a weight ``[O, C, *K]``; None where this rank holds the whole weight.

    Args:
        fold: name of the fold; None for a matrix ``[m, n]`` or a batch of them.

    Raises:
        ValueError: the weight is sharded along a kernel axis, or it is a sharded batch of matrices.
    """
    along: dict[int, list[dist.ProcessGroup]] = {0: [], 1: []}
    for placement, group in _mesh_axes(W):
        if placement.is_replicate():
            continue
        if getattr(placement, "dim", None) not in along or (fold is None and W.ndim > 2):
            raise ValueError(f"{name}: wanted a weight sharded along its outputs or inputs; got {W.placements}")
        along[placement.dim].append(group)
    if not any(along.values()):
        return None
    m, n = to_matrix(torch.empty(W.shape, device="meta"), fold or "paper").shape[1:]
    return MatrixSharding((m, n), tuple(along[0]), tuple(along[1]))


def replica_groups(W: Tensor) -> list[dist.ProcessGroup]:
    """Process groups over which the weight is replicated."""
    return [group for placement, group in _mesh_axes(W) if placement.is_replicate()]


def process_groups(weights: Sequence[Tensor], replicas: bool = True) -> list[dist.ProcessGroup]:
    """Process groups that the weights are distributed over, each once, in the same order on every rank.

    Args:
        replicas: include the groups over which a weight is only replicated; its replicas need not run in lockstep.
    """
    return list(dict.fromkeys(g for W in weights for p, g in _mesh_axes(W) if replicas or not p.is_replicate()))


def _mesh_axes(W: Tensor) -> list[tuple]:
    """(placement, process group) of every mesh axis with more than one rank."""
    if not is_dtensor(W):
        return []
    mesh = W.device_mesh
    return [(p, mesh.get_group(i)) for i, p in enumerate(W.placements) if mesh.size(i) > 1]


def placed(t: Tensor, like: Tensor, placements: Sequence | None = None) -> Tensor:
    """``t`` as a DTensor on the mesh of the DTensor ``like``.

    Args:
        t: a DTensor on that mesh, or a plain tensor that every rank holds whole.
        placements: default: those of ``like``.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements if placements is None else tuple(placements)
    if not is_dtensor(t):
        t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return t if t.placements == placements else t.redistribute(mesh, placements)


def distribute_bias(bias: Tensor, W: Tensor) -> Tensor:
    """Bias ``[O]``, sharded where the rows of W ``[O, ...]`` are, replicated where its columns are."""
    from torch.distributed.tensor import Replicate

    if not is_dtensor(W):
        return bias
    return placed(bias, W, [p if getattr(p, "dim", None) == 0 else Replicate() for p in W.placements])


def redistribute_like(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the placements of ``like``; gathered into a plain tensor where ``like`` is one."""
    if is_dtensor(like):
        return placed(t, like)
    return t.full_tensor() if is_dtensor(t) else t


def column_groups(W: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Process groups over which the inputs of a weight ``[O, C, *K]`` are sharded."""
    sharding = sharding_of(W, "paper", "W")
    return sharding.column_groups if sharding else ()
