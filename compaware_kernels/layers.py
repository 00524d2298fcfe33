"""Drop-in low-rank layers: one dense layer as two smaller ones, ``first`` then ``second``.

The factors are ordinary torch layers, so hooks, quantisation, export and optimizers see what they know. ``rank`` is
per group: a grouped convolution has one factorisation per group, all of the same rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .factorize import check_rank, factors
from .folds import row_axes
from .low_rank import LowRank
from .low_rank_conv import LowRankConv
from .transposed import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d


class LowRankLinear(LowRank):
    """``y = U (V x) + b``:  V ``[r, in_features]`` (``first``), U ``[out_features, r]`` (``second``).

    Args:
        in_features, out_features: as in ``nn.Linear``.
        rank: 1 to min(in_features, out_features).
        bias: whether to add a bias ``[out_features]``.

    Raises:
        ValueError: rank out of range.
    """

    dense = nn.Linear
    fold = "paper"

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def like(cls, layer: nn.Linear, rank: int, fold: str = "paper") -> LowRankLinear:
        """An untrained low-rank layer with the sizes, bias, device and dtype of ``layer`` (every fold is the same)."""
        row_axes(fold, 0)
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return cls(layer.in_features, layer.out_features, rank, layer.bias is not None, **place)

    @classmethod
    def from_dense(cls, layer: nn.Linear, rank: int, fold: str = "paper") -> LowRankLinear:
        """The best rank-r approximation of ``layer`` (truncated SVD of its weight)."""
        self = cls.like(layer, rank, fold)
        V, U = self._weights(layer.weight)
        self._copy_from(layer, U, V)
        return self

    def _weights(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        return factors(dense, self.rank)[::-1]

    def _dense_numel(self) -> int:
        return self.in_features * self.out_features

    def _in_one(self, x, V, U, bias, residual, in_place) -> Tensor:
        return torch.ops.compaware.lowrank_linear(x, V, U, bias, residual, self._packed_now(V, U), self.activation)

    def to_dense(self) -> nn.Linear:
        """One ``nn.Linear`` with weight ``U V``."""
        place = {"device": self.first.weight.device, "dtype": self.first.weight.dtype}
        layer = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **place)
        return self._copy_to(layer, self.second.weight @ self.first.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._extra()}"


class LowRankConv1d(LowRankConv):
    __doc__ = LowRankConv.__doc__
    dense, axes = nn.Conv1d, 1


class LowRankConv2d(LowRankConv):
    __doc__ = LowRankConv.__doc__
    dense, axes = nn.Conv2d, 2

    def _why_not_geometry(self) -> str:
        if self.padding_mode != "zeros":
            return f"padding mode {self.padding_mode}"
        return "" if self._padding() else f"padding {self.padding!r}, more on one side than on the other"

    def _padding(self) -> list[int] | None:
        """Padding in pixels; None where it is not symmetric."""
        if not isinstance(self.padding, str):
            return list(self.padding)
        if self.padding == "valid":
            return [0, 0]
        both = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return None if any(p % 2 for p in both) else [p // 2 for p in both]

    def _in_one(self, x, V, U, bias, residual, in_place) -> Tensor:
        args = (x, V, U, bias, residual, self._packed_now(V, U), self.stride, self._padding(), self.dilation,
                self.groups, self.fold, self.activation)  # fmt: skip
        if residual is None or not in_place or torch.is_grad_enabled():
            return torch.ops.compaware.lowrank_conv2d(*args)
        torch.ops.compaware.lowrank_conv2d_(*args)
        return residual


class LowRankConv3d(LowRankConv):
    __doc__ = LowRankConv.__doc__
    dense, axes = nn.Conv3d, 3


_CLASSES = (LowRankLinear, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankConvTranspose1d, LowRankConvTranspose2d,
            LowRankConvTranspose3d)  # fmt: skip
LOW_RANK = {low_rank.dense: low_rank for low_rank in _CLASSES}


def why_dense(model: nn.Module, name: str) -> str:
    """Why the layer of that name cannot become two factors; "" where it can."""
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if type(layer) not in LOW_RANK:
        return f"a {type(layer).__name__} may use its weight in ways of its own"
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"nn.{type(parent).__name__} reads its weight directly"
    if isinstance(parent, LowRank):
        return "a factor of a low-rank layer; ck.to_dense(model) first, to cut its rank further"
    return ""


def low_rank_type(layer: nn.Module) -> type[LowRank]:
    """The low-rank class that stands in for a dense layer.  Raises TypeError where there is none."""
    for dense, low_rank in LOW_RANK.items():
        if isinstance(layer, dense):
            return low_rank
    raise TypeError(f"wanted {', '.join(dense.__name__ for dense in LOW_RANK)}; got {type(layer).__name__}")
