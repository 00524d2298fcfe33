"""Low-rank linear layer: [..., in_features] -> [..., out_features] through rank r."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..folds import row_axes
from .factorization import check_rank
from .lowrank import LowRank

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

__all__ = ["LowRankLinear"]


class LowRankLinear(LowRank):
    """Low-rank linear layer, ``y = U (V x) + b``: ``[..., in_features]`` -> ``[..., out_features]``.

    V ``[r, in_features]`` is the weight of ``first``, U ``[out_features, r]`` and b those of ``second``; both factors
    are ``nn.Linear``.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        rank: 1 to min(in_features, out_features).
        bias: whether to add a bias ``[out_features]``.

    Raises:
        ValueError: rank out of range.
    """

    dense = nn.Linear
    op, fold = "lowrank_linear", "paper"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Linear, rank: int, fold: str = "paper") -> Self:
        """A newly initialized low-rank layer with the sizes, device and dtype of ``layer``, and a bias if it has one.

        Raises:
            ValueError: rank out of range, or a fold that does not exist; every fold of a Linear is the same.
        """
        row_axes(fold, 0)
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return cls(layer.in_features, layer.out_features, rank, layer.bias is not None, **place)

    def _unfolded(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        return V[0], U[0]

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def product(self) -> Tensor:
        return (self.second.weight @ self.first.weight).to(self.first.weight.dtype)  # autocast would change it

    def _dense(self, x: Tensor) -> Tensor:
        return F.linear(x, self.product(), self.bias)

    def to_dense(self) -> nn.Linear:
        """``nn.Linear`` with the weight ``U V`` and the bias of this layer."""
        place = {"device": self.first.weight.device, "dtype": self.first.weight.dtype}
        layer = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **place)
        return self._copy_to(layer)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._extra()}"
