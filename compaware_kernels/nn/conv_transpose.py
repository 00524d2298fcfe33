"""Low-rank transposed convolutions, 1-D to 3-D: [N, C, *size] -> [N, O, *size'] through rank r per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..folds import row_axes
from ..ops.lowrank import ACTIVATIONS
from .conv import LowRankConv

__all__ = ["LowRankConvTranspose1d", "LowRankConvTranspose2d", "LowRankConvTranspose3d"]


class _LowRankConvTranspose(LowRankConv):
    """Low-rank transposed convolution: two layers, ``[N, C, *size]`` -> ``[N, O, *size']`` through rank r per group.

    Its kernel ``[C, O/G, *K]`` is folded as that of a convolution, ``[O, C/G, *K]``::

        fold      first, then second                              multiply-adds, n pixels in and s n out
        paper     transposed K: C -> r,  then 1 x 1: r -> O       n r (C prod(K) + s O)
        input     1 x 1: C -> r,  then transposed K: r -> O       n r (C + O prod(K))
        spatial   transposed 1 x kw: C -> r,  then transposed kh x 1: r -> O

    At equal rank ``input`` needs fewer multiply-adds than ``paper`` if ``O (prod(K) - s) < C (prod(K) - 1)``, so
    whenever ``O <= C``: its 1 x 1 runs on the small input, the paper's on the large output. The 1 x 1 factor is an
    ordinary convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation: as in
            ``nn.ConvTranspose1d/2d/3d``.
        rank: 1 to min(m, n) of the folded matrix of one group.
        fold: ``paper`` | ``spatial`` | ``input``, see :mod:`compaware_kernels.folds`.

    ``forward(input, output_size=None)`` has the dense layer's arguments; that of ``to_sequential()`` has no
    ``output_size``.

    Raises:
        ValueError: rank out of range, unknown fold, padding mode other than zeros.
    """

    pointwise: type[nn.Module]
    geometry: ClassVar = LowRankConv.geometry | {"output_padding": 0}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        fold: str = "paper",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super(LowRankConv, self).__init__()
        dense = self.dense(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
                           dilation, padding_mode, device="meta")  # fmt: skip
        self._build(dense, rank, fold, device, dtype)

    def _factor(self, inputs: int, outputs: int, axes: range, **more: object) -> nn.Module:
        if axes:
            return super()._factor(inputs, outputs, axes, **more)
        return self.pointwise(inputs, outputs, 1, groups=self.groups, **more)  # 1.5 times as fast as a transposed 1 x 1

    def why_two_step(self, x: Tensor) -> str:
        return self._why_not_geometry()

    def _why_not_geometry(self) -> str:
        return "transposed convolutions have no kernel"

    def forward(
        self, input: Tensor, output_size: Sequence[int] | None = None, residual: Tensor | None = None
    ) -> Tensor:
        k = row_axes(self.fold, self.axes)
        T = self._run(self.first, input, range(k, self.axes), output_size)
        y = self._run(self.second, T, range(k), output_size)
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)

    def _run(self, factor: nn.Module, x: Tensor, axes: range, output_size: Sequence[int] | None) -> Tensor:
        """Output of one factor; along the axes of the other factor's kernel it keeps the size of ``x``."""
        if output_size is None or not axes:
            return factor(x)
        sizes = zip(x.shape[-self.axes :], output_size[-self.axes :], strict=True)
        return factor(x, [after if i in axes else before for i, (before, after) in enumerate(sizes)])


class LowRankConvTranspose1d(_LowRankConvTranspose):
    __doc__ = _LowRankConvTranspose.__doc__
    dense, pointwise, axes = nn.ConvTranspose1d, nn.Conv1d, 1


class LowRankConvTranspose2d(_LowRankConvTranspose):
    __doc__ = _LowRankConvTranspose.__doc__
    dense, pointwise, axes = nn.ConvTranspose2d, nn.Conv2d, 2


class LowRankConvTranspose3d(_LowRankConvTranspose):
    __doc__ = _LowRankConvTranspose.__doc__
    dense, pointwise, axes = nn.ConvTranspose3d, nn.Conv3d, 3
