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


class _LowRank(nn.Module):
    """What all low-rank layers share: two factors applied in turn."""

    first: nn.Module
    second: nn.Module
    rank: int

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def to_sequential(self) -> nn.Sequential:
        """The same layer in plain torch: ``nn.Sequential(first, second)``, sharing the parameters."""
        return nn.Sequential(self.first, self.second)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    def _copy_from(self, layer: nn.Module, U: Tensor, V: Tensor) -> None:
        with torch.no_grad():
            self.first.weight.copy_(V)
            self.second.weight.copy_(U)
            if layer.bias is not None:
                self.second.bias.copy_(layer.bias)
        self.requires_grad_(layer.weight.requires_grad)
        self.train(layer.training)

    def _copy_to(self, layer: nn.Module, weight: Tensor) -> nn.Module:
        with torch.no_grad():
            layer.weight.copy_(weight)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        layer.requires_grad_(self.first.weight.requires_grad)
        return layer.train(self.training)


class LowRankLinear(_LowRank):
    """``y = U (V x) + b``:  V ``[r, in_features]`` (``first``), U ``[out_features, r]`` (``second``).

    Args:
        in_features, out_features: as in ``nn.Linear``.
        rank: 1 to min(in_features, out_features).
        bias: whether to add a bias ``[out_features]``.

    Raises:
        ValueError: rank out of range.
    """

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
        U, V = factors(layer.weight, rank)
        self._copy_from(layer, U, V)
        return self

    def to_dense(self) -> nn.Linear:
        """One ``nn.Linear`` with weight ``U V``."""
        place = {"device": self.first.weight.device, "dtype": self.first.weight.dtype}
        layer = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **place)
        return self._copy_to(layer, self.second.weight @ self.first.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class _LowRankConv(_LowRank):
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

    conv: type[nn.Module]
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
        whole = self.conv(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                          padding_mode, device="meta")  # fmt: skip
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = whole.kernel_size, whole.stride, whole.dilation
        self.padding, self.padding_mode = whole.padding, padding_mode
        self.rank, self.fold = rank, fold
        k = row_axes(fold, self.axes)
        check_rank(rank, *to_matrix(whole.weight, fold, groups).shape[-2:])
        shared = {"groups": groups, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        self.first = self.conv(in_channels, groups * rank, **self._part(k, self.axes), bias=False, **shared)
        self.second = self.conv(groups * rank, out_channels, **self._part(0, k), bias=bias, **shared)

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
        if not isinstance(layer, cls.conv):
            raise TypeError(f"{cls.__name__} wants a {cls.conv.__name__}; got {type(layer).__name__}")
        return cls(layer.in_channels, layer.out_channels, layer.kernel_size, rank, layer.stride, layer.padding,
                   layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, fold,
                   device=layer.weight.device, dtype=layer.weight.dtype)  # fmt: skip

    @classmethod
    def from_dense(cls, layer: nn.Module, rank: int, fold: str = "paper"):
        """The best rank-r approximation of ``layer`` under the fold (truncated SVD per group)."""
        self = cls.like(layer, rank, fold)
        U, V = factors(to_matrix(layer.weight, fold, layer.groups), rank)
        k = row_axes(fold, self.axes)
        K = self.kernel_size[:k]
        U = U.reshape(self.groups, -1, *K, rank).movedim(-1, 2).reshape(self.second.weight.shape)
        self._copy_from(layer, U, V.reshape(self.first.weight.shape))
        return self

    def to_dense(self) -> nn.Module:
        """One ordinary convolution whose folded weight is ``U V``."""
        layer = nn.utils.skip_init(
            self.conv, self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
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
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"fold={self.fold}, groups={self.groups}"
        )


class LowRankConv1d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    conv, axes = nn.Conv1d, 1


class LowRankConv2d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    conv, axes = nn.Conv2d, 2


class LowRankConv3d(_LowRankConv):
    __doc__ = _LowRankConv.__doc__
    conv, axes = nn.Conv3d, 3


LOW_RANK = {nn.Linear: LowRankLinear, nn.Conv1d: LowRankConv1d, nn.Conv2d: LowRankConv2d, nn.Conv3d: LowRankConv3d}


def low_rank_type(layer: nn.Module) -> type[_LowRank]:
    """The low-rank class that stands in for a dense layer.  Raises TypeError where there is none."""
    for dense, low_rank in LOW_RANK.items():
        if isinstance(layer, dense):
            return low_rank
    raise TypeError(f"wanted Linear, Conv1d, Conv2d or Conv3d; got {type(layer).__name__}")
