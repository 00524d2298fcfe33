"""Drop-in low-rank layers: one dense layer as two smaller ones, ``first`` then ``second``.

The factors are ordinary torch layers, so hooks, quantisation, export and optimizers see what they know. ``rank`` is
per group: a grouped convolution has one factorisation per group, all of the same rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .factorize import check_rank, factors
from .folds import from_matrix, row_axes, to_matrix
from .low_rank import LowRank


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

    def _in_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return torch.ops.compaware.lowrank_linear(
            x, self.first.weight, self.second.weight, self.bias, residual, self._packed_now(), self.activation
        )

    def to_dense(self) -> nn.Linear:
        """One ``nn.Linear`` with weight ``U V``."""
        place = {"device": self.first.weight.device, "dtype": self.first.weight.dtype}
        layer = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **place)
        return self._copy_to(layer, self.second.weight @ self.first.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._extra()}"


class _LowRankConv(LowRank):
    """A convolution as two: ``first`` with the fold's column axes of the kernel, ``second`` with its row axes.

    Stride, padding, dilation and padding mode go with the kernel axes they belong to; groups are kept in both.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            ``nn.Conv1d/2d/3d``.
        rank: 1 to min(m, n) of the folded matrix of one group.
        fold: ``paper`` | ``spatial`` | ``input``, see :mod:`compaware_kernels.folds`.

    Raises:
        ValueError: rank out of range, unknown fold.
    """

    dense: type[nn.Module]
    axes: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        fold: str = "paper",
        device=None,
        dtype=None,
    ):
        super().__init__()
        whole = self.dense(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                          padding_mode, device="meta")  # fmt: skip
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = whole.kernel_size, whole.stride, whole.dilation
        self.padding, self.padding_mode = whole.padding, padding_mode
        self.rank, self.fold = rank, fold
        k = row_axes(fold, self.axes)
        check_rank(rank, *to_matrix(whole.weight, fold, groups).shape[-2:])
        shared = {"groups": groups, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        self.first = self.dense(in_channels, groups * rank, **self._part(k, self.axes), bias=False, **shared)
        self.second = self.dense(groups * rank, out_channels, **self._part(0, k), bias=bias, **shared)

    def _dense_numel(self) -> int:
        return self.out_channels * self.in_channels // self.groups * math.prod(self.kernel_size)

    def _why_not_geometry(self) -> str:
        return "only 2-D convolutions have a kernel"

    def _part(self, start: int, stop: int) -> dict[str, object]:
        """Kernel, stride, padding and dilation on the axes start:stop, and 1, 1, 0, 1 on the others."""

        def on_axes(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(v if start <= i < stop else other for i, v in enumerate(values))

        padding = self.padding if isinstance(self.padding, str) else on_axes(self.padding, 0)
        stride, dilation = on_axes(self.stride, 1), on_axes(self.dilation, 1)
        return {"kernel_size": on_axes(self.kernel_size, 1), "stride": stride, "padding": padding, "dilation": dilation}

    @classmethod
    def like(cls, layer: nn.Module, rank: int, fold: str = "paper"):
        """An untrained low-rank layer with the geometry, bias, device and dtype of the convolution ``layer``."""
        if not isinstance(layer, cls.dense):
            raise TypeError(f"{cls.__name__} wants a {cls.dense.__name__}; got {type(layer).__name__}")
        return cls(layer.in_channels, layer.out_channels, layer.kernel_size, rank, layer.stride, layer.padding,
                   layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, fold,
                   device=layer.weight.device, dtype=layer.weight.dtype)  # fmt: skip

    @classmethod
    def from_dense(cls, layer: nn.Module, rank: int, fold: str = "paper"):
        """The best rank-r approximation of ``layer`` under the fold (truncated SVD per group)."""
        self = cls.like(layer, rank, fold)
        V, U = self._weights(layer.weight)
        self._copy_from(layer, U, V)
        return self

    def _weights(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        U, V = factors(to_matrix(dense, self.fold, self.groups), self.rank)
        K = self.kernel_size[: row_axes(self.fold, self.axes)]
        U = U.reshape(self.groups, -1, *K, self.rank).movedim(-1, 2).reshape(self.second.weight.shape)
        return V.reshape(self.first.weight.shape), U

    def to_dense(self) -> nn.Module:
        """One ordinary convolution whose folded weight is ``U V``."""
        layer = nn.utils.skip_init(
            self.dense, self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode,
            device=self.first.weight.device, dtype=self.first.weight.dtype,
        )  # fmt: skip
        k = row_axes(self.fold, self.axes)
        V = self.first.weight.reshape(self.groups, self.rank, -1)
        U = self.second.weight.reshape(self.groups, -1, self.rank, math.prod(self.kernel_size[:k]))
        U = U.movedim(2, -1).reshape(self.groups, -1, self.rank)
        return self._copy_to(layer, from_matrix(U @ V, layer.weight.shape, self.fold))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, fold={self.fold}, "
            f"groups={self.groups}, {self._extra()}"
        )


class LowRankConv1d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    dense, axes = nn.Conv1d, 1


class LowRankConv2d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    dense, axes = nn.Conv2d, 2

    def _why_not_geometry(self) -> str:
        if self.padding_mode != "zeros":
            return f"padding mode {self.padding_mode}"
        return "" if self._padding() else f"padding {self.padding!r}, more on one side than on the other"

    def _padding(self) -> list[int] | None:
        """Padding in pixels; None where it is not symmetric."""
        if not isinstance(self.padding, str):
            return list(self.padding)
        both = [
            0 if self.padding == "valid" else d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)
        ]
        return None if any(p % 2 for p in both) else [p // 2 for p in both]

    def _in_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return torch.ops.compaware.lowrank_conv2d(
            x, self.first.weight, self.second.weight, self.bias, residual, self._packed_now(), list(self.stride),
            self._padding(), list(self.dilation), self.groups, self.fold, self.activation,
        )  # fmt: skip


class LowRankConv3d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    dense, axes = nn.Conv3d, 3


LOW_RANK = {nn.Linear: LowRankLinear, nn.Conv1d: LowRankConv1d, nn.Conv2d: LowRankConv2d, nn.Conv3d: LowRankConv3d}


def low_rank_type(layer: nn.Module) -> type[LowRank]:
    """The low-rank class that stands in for a dense layer.  Raises TypeError where there is none."""
    for dense, low_rank in LOW_RANK.items():
        if isinstance(layer, dense):
            return low_rank
    raise TypeError(f"wanted Linear, Conv1d, Conv2d or Conv3d; got {type(layer).__name__}")
