"""One weight on its way through a proximal step, from the caller to the write-back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import folds
from ..distributed.dtensor import MatrixSharding, local, placed, sharding_of


@dataclass(eq=False)
class Record:
    """One weight, what belongs to it, and the matrices it folds to.

    :meth:`unfold` makes the matrices, an operator changes :attr:`target` in place, :meth:`fold_back` writes the weight.
    """

    weight: Tensor  # [O, C/G, *K], or [..., m, n] where fold is None; a DTensor where it is sharded
    name: str | None = None  # of the layer
    index: int = 0  # in the caller's list, by which a weight without a name goes
    bias: Tensor | None = None  # [O]
    center: Tensor | None = None  # like weight
    groups: int = 1
    fold: str | None = "paper"
    shards: MatrixSharding | None = field(default=None, init=False)  # how the matrix lies over processes
    target: Tensor = field(init=False)  # [..., m, n], contiguous unless a single matrix; what the solver writes
    target_center: Tensor | None = field(default=None, init=False)  # like target
    _here: Tensor = field(init=False)  # this rank's shard, or the gathered weight
    _gathered: bool = field(default=False, init=False)
    _is_view: bool = field(default=True, init=False)  # target, of the weight

    @property
    def key(self) -> str:
        """Under which the warm state remembers it: matrix j is ``key.j``."""
        return str(self.index) if self.name is None else self.name

    @property
    def label(self) -> str:
        """In error messages."""
        return f"weights[{self.index}]" if self.name is None else self.name

    def unfold(self) -> None:
        """Make :attr:`target`: a view of the weight where that can be, otherwise a copy.

        A grouped convolution has many small matrices: a sharded one is gathered, and each rank keeps its shard.

        Raises:
            ValueError: the weight is sharded along a kernel axis, or is a batch of matrices.
        """
        shards = sharding_of(self.weight, self.fold, self.label)
        self._gathered = shards is not None and self.groups > 1
        self.shards = None if self._gathered else shards
        self._here = self._local(self.weight)
        self.target = self.matrices(self._here)
        self.target_center = None if self.center is None else self.matrices(self._local(self.center))
        self._is_view = self.target.data_ptr() == self._here.data_ptr()
        if not self.target.is_contiguous():
            self.own_target()

    def own_target(self) -> None:
        """Work on a copy, also where the matrices are a view of the weight."""
        self.target, self._is_view = self.target.clone(memory_format=torch.contiguous_format), False

    def fold_back(self) -> None:
        """Write the matrices to the weight, where they are no view of it."""
        W, M = self._here, self.target
        if not self._is_view:
            W.copy_(M.reshape(W.shape) if self.fold is None else folds.from_matrix(M, W.shape, self.fold))
        if self._gathered:
            local(self.weight).copy_(placed(W, self.weight).to_local())

    @property
    def address(self) -> int:
        """The same for weights that share their memory."""
        return self._here.data_ptr()

    def _local(self, t: Tensor) -> Tensor:
        return t.full_tensor() if self._gathered else local(t)

    def matrices(self, t: Tensor | None = None) -> Tensor:
        """The weight, or another tensor like it, as matrices ``[..., m, n]``."""
        t = self.weight if t is None else t
        M = t.detach() if self.fold is None else folds.to_matrix(t.detach(), self.fold, self.groups)
        return M[None] if self.shards and M.ndim == 2 else M


def unfold_all(records: Sequence[Record]) -> None:
    """:meth:`Record.unfold` every weight; one that shares its memory with an earlier one is worked on as a copy."""
    seen: set[int] = set()
    for record in records:
        record.unfold()
        if record.target.numel() and record.address in seen:
            record.own_target()
        seen.add(record.address)
