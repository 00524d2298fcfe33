"""Record of one weight in a proximal step: unfolds it to matrices ``[..., m, n]`` and writes the result back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import folds
from ..distributed.dtensor import MatrixSharding, local, placed, sharding_of

__all__ = ["Record", "unfold_all"]


@dataclass(eq=False)
class Record:
    """One weight with its bias, center and layout, and the matrices ``[..., m, n]`` it folds to.

    :meth:`unfold` makes the matrices, an operator updates :attr:`target` in place, :meth:`fold_back` writes the weight.
    """

    weight: Tensor  # [O, C/G, *K], or [..., m, n] if fold is None; a DTensor if sharded
    name: str | None = None  # of the layer
    index: int = 0  # position in the caller's list; identifies a weight without a name
    bias: Tensor | None = None  # [O]
    center: Tensor | None = None  # shape and placement of weight
    groups: int = 1
    fold: str | None = "paper"
    stored_as: torch.dtype | None = field(default=None, init=False)  # if the result is rounded to another dtype later
    shards: MatrixSharding | None = field(default=None, init=False)  # sharding of the matrix over ranks
    target: Tensor = field(init=False)  # [..., m, n], contiguous; updated in place by the operator
    target_center: Tensor | None = field(default=None, init=False)  # [..., m, n], the center of target
    _local_weight: Tensor = field(init=False)  # this rank's shard, or the gathered weight
    _gathered: bool = field(default=False, init=False)
    _tied_to: Record | None = field(default=None, init=False)  # an earlier record of the same weight
    _is_view: bool = field(default=True, init=False)  # whether target shares the memory of the weight

    @property
    def key(self) -> str:
        """Key of the weight in the warm state; its matrix j has the key ``key.j``.

        Tied weights share one key, so that they draw the same probes and get the same bits.
        """
        if self._tied_to is not None:
            return self._tied_to.key
        return str(self.index) if self.name is None else self.name

    @property
    def label(self) -> str:
        """Name of the weight in error messages."""
        return f"weights[{self.index}]" if self.name is None else self.name

    def unfold(self) -> None:
        """Make :attr:`target` ``[..., m, n]``: a view of the weight if possible, otherwise a copy.

        A sharded grouped convolution (many small matrices) is gathered; each rank writes back its own shard.

        Raises:
            ValueError: the weight is sharded along a kernel axis, or is a batch of matrices.
        """
        shards = sharding_of(self.weight, self.fold, self.label)
        self._gathered = shards is not None and self.groups > 1
        self.shards = None if self._gathered else shards
        self._local_weight = self._local(self.weight)
        self.target = self.matrices(self._local_weight)
        self.target_center = None if self.center is None else self.matrices(self._local(self.center))
        self._is_view = self.target.data_ptr() == self._local_weight.data_ptr()
        if not self.target.is_contiguous() or self.target.is_neg():
            self.own_target()

    def own_target(self) -> None:
        """Replace :attr:`target` by a contiguous copy, so that it no longer shares the memory of the weight."""
        self.target, self._is_view = self.target.clone(memory_format=torch.contiguous_format), False

    def fold_back(self) -> None:
        """Write :attr:`target` to the weight, unless it is a view of it."""
        W, M = self._local_weight, self.target
        if not self._is_view:
            W.copy_(M.reshape(W.shape) if self.fold is None else folds.from_matrix(M, W.shape, self.fold))
        if self._gathered:
            local(self.weight).copy_(placed(W, self.weight).to_local())

    @property
    def address(self) -> int:
        """Data pointer of the local weight: equal for tied weights."""
        return self._local_weight.data_ptr()

    def _local(self, t: Tensor) -> Tensor:
        return (t.full_tensor() if self._gathered else local(t)).detach()  # autograd forbids to write to some views

    def matrices(self, t: Tensor | None = None) -> Tensor:
        """The weight, or a tensor of its shape, folded to matrices ``[..., m, n]``."""
        t = self.weight if t is None else t
        M = t.detach() if self.fold is None else folds.to_matrix(t.detach(), self.fold, self.groups)
        return M[None] if self.shards and M.ndim == 2 else M


def unfold_all(records: Sequence[Record]) -> None:
    """:meth:`Record.unfold` of every record; tied weights after the first get a copy as their target."""
    seen: dict[int, Record] = {}
    for record in records:
        record.unfold()
        first = seen.setdefault(record.address, record)
        if record.target.numel() and first is not record:
            record.own_target()
            record._tied_to = first
