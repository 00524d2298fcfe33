"""Low-rank convolutions in 1, 2 and 3 dimensions, and the base class that transposed ones share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..folds import TRANSPOSED, from_matrix, oriented, row_axes, to_matrix
from ..ops.lowrank import Geometry
from .factorization import check_rank
from .lowrank import LowRank
from .module_surgery import plain_attributes

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


__all__ = ["LowRankConv", "LowRankConv1d", "LowRankConv2d", "LowRankConv3d"]


class LowRankConv(LowRank):
    """Low-rank convolution, ``[N, C, *S]`` -> ``[N, O, *S']``: two convolutions with G r channels in between.

    ``first`` has the fold's column axes of the kernel, ``second`` its row axes. Stride, padding, dilation and padding
    mode apply to the factor with the kernel axis in question; both factors are grouped.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            ``nn.Conv1d/2d/3d``.
        rank: 1 to min(m, n) of the folded matrix of one group.
        fold: ``paper`` | ``spatial`` | ``input``, see :mod:`compaware_kernels.folds`.

    Raises:
        ValueError: rank out of range, unknown fold.
    """

    axes: int
    # Geometry arguments, with the value that a factor has along the kernel axes of the other factor.
    geometry: ClassVar = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}

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
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        whole = self.dense(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                           padding_mode, device="meta")  # fmt: skip
        self._build(whole, rank, fold, device, dtype)

    def _build(self, whole: nn.Module, rank: int, fold: str, device, dtype) -> None:
        """Create both factors, with the sizes and the geometry of the dense layer ``whole``."""
        vars(self).update(plain_attributes(whole))
        self.rank, self.fold = rank, fold
        k, middle, place = row_axes(fold, self.axes), self.groups * rank, {"device": device, "dtype": dtype}
        check_rank(rank, *to_matrix(oriented(whole.weight, self.dense, self.groups), fold, self.groups).shape[-2:])
        self.first = self._factor(self.in_channels, middle, range(k, self.axes), bias=False, **place)
        self.second = self._factor(middle, self.out_channels, range(k), bias=whole.bias is not None, **place)

    def _factor(self, inputs: int, outputs: int, axes: range, **more: object) -> nn.Module:
        """Factor with these axes of the kernel."""
        geometry = {name: self._on_axes(name, axes) for name in self.geometry}
        return self.dense(inputs, outputs, groups=self.groups, padding_mode=self.padding_mode, **geometry, **more)

    def _on_axes(self, name: str, axes: range) -> tuple[int, ...] | str:
        """Geometry argument of the factor with these kernel axes."""
        values = getattr(self, name)
        if isinstance(values, str):  # padding "same" or "valid"
            return values
        return tuple(v if i in axes else self.geometry[name] for i, v in enumerate(values))

    def _why_not_geometry(self) -> str:
        return "only 2-D convolutions have a kernel"

    @classmethod
    def like(cls, layer: nn.Module, rank: int, fold: str = "paper") -> Self:
        """New low-rank layer, untrained, with the geometry, bias, device and dtype of the convolution ``layer``."""
        if not isinstance(layer, cls.dense):
            raise TypeError(f"{cls.__name__} wants a {cls.dense.__name__}; got {type(layer).__name__}")
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return cls(rank=rank, fold=fold, **cls._sizes_of(layer), **place)

    def to_dense(self) -> nn.Module:
        """Dense layer whose folded weight is ``U V``."""
        place = {"device": self.first.weight.device, "dtype": self.first.weight.dtype}
        layer = nn.utils.skip_init(self.dense, **self._sizes_of(self), **place)
        return self._copy_to(layer)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        inputs, outputs = self.in_channels, self.out_channels
        outer, inner = (inputs, outputs) if issubclass(self.dense, TRANSPOSED) else (outputs, inputs)
        return outer, inner // self.groups, *self.kernel_size

    def product(self) -> Tensor:
        k = row_axes(self.fold, self.axes)
        V = oriented(self.first.weight, type(self.first), self.groups).reshape(self.groups, self.rank, -1)
        U = oriented(self.second.weight, type(self.second), self.groups)
        U = U.reshape(self.groups, -1, self.rank, math.prod(self.kernel_size[:k])).movedim(2, -1)
        M = (U.reshape(self.groups, -1, self.rank) @ V).to(V.dtype)  # autocast would change it
        W = from_matrix(M, (self.out_channels, self.in_channels // self.groups, *self.kernel_size), self.fold)
        return oriented(W, self.dense, self.groups)

    @classmethod
    def _sizes_of(cls, layer: nn.Module) -> dict[str, object]:
        """Constructor arguments of a dense layer with the sizes and geometry of ``layer``, dense or low-rank."""
        names = ("in_channels", "out_channels", *cls.geometry, "groups", "padding_mode")
        return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}

    def _unfolded(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        k = row_axes(self.fold, self.axes)
        V = V.reshape(self.groups * self.rank, -1, *self._on_axes("kernel_size", range(k, self.axes)))
        U = U.reshape(self.groups, -1, *self.kernel_size[:k], self.rank).movedim(-1, 2)
        U = U.reshape(self.out_channels, self.rank, *self._on_axes("kernel_size", range(k)))
        return oriented(V, type(self.first), self.groups), oriented(U, type(self.second), self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, fold={self.fold}, "
            f"groups={self.groups}, {self._extra()}"
        )


class LowRankConv1d(LowRankConv):
    __doc__ = LowRankConv.__doc__
    dense, axes = nn.Conv1d, 1


class LowRankConv2d(LowRankConv):
    __doc__ = LowRankConv.__doc__
    dense, axes, op = nn.Conv2d, 2, "lowrank_conv2d"

    def _why_not_geometry(self) -> str:
        if self.padding_mode != "zeros":
            return f"padding mode {self.padding_mode}"
        return "" if self._padding() else f"padding {self.padding!r}, more on one side than on the other"

    def _padding(self) -> tuple[int, ...] | None:
        """Padding in pixels; None if it is not symmetric."""
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "valid":
            return 0, 0
        both = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return None if any(p % 2 for p in both) else tuple(p // 2 for p in both)

    def _geometry(self) -> Geometry:
        return Geometry(self.stride, self._padding(), self.dilation, self.groups, self.fold, self.activation)

    def _dense(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.product(), self.bias, self.stride, self._padding(), self.dilation, self.groups)


class LowRankConv3d(LowRankConv):
    __doc__ = LowRankConv.__doc__
    dense, axes = nn.Conv3d, 3
