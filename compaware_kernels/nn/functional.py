"""Functional low-rank convolution and linear layer: two factors, bias, residual and activation in one op.

    y = act(U (V x) + bias + residual)

The fp32 CPU kernel (C++) keeps the rank-r intermediate in the cache, the CUDA kernel (Triton) on chip. If no kernel
takes the arguments, two steps of plain PyTorch run; :func:`compaware_kernels.ops.backends.choose` gives the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import lowrank

__all__ = ["lowrank_conv2d", "lowrank_linear"]


def lowrank_conv2d(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    fold: str = "paper",
    activation: str = "none",
) -> Tensor:
    """Low-rank convolution ``y = act(U * (V * x) + bias + residual)``, ``[N, C, H, W]`` -> ``[N, O, OH, OW]``.

    Args:
        x: ``[N, C, H, W]``, fastest in channels_last.
        V: the first convolution: ``[G r, C/G, kh, kw]`` (fold ``paper``), ``[G r, C/G, 1, kw]`` (``spatial``) or
            ``[G r, C/G, 1, 1]`` (``input``).
        U: the second convolution: ``[O, r, 1, 1]``, ``[O, r, kh, 1]`` or ``[O, r, kh, kw]``.
        bias: ``[O]``.
        residual: ``[N, O, OH, OW]``, added before the activation.
        packed: ``torch.ops.compaware.lowrank_pack(V, U, groups)``, to pack constant weights once. If the weights have
            changed since, they are repacked; a write through ``.data`` is detected if it changes most of them.
        stride, padding, dilation, groups: of the dense convolution, as in ``torch.nn.functional.conv2d``; each axis
            applies to the factor with that kernel axis.
        activation: ``none`` | ``relu`` | ``relu6`` | ``silu`` | ``gelu``.

    Returns:
        ``[N, O, OH, OW]``, in channels_last if x or V is; differentiable (the intermediate is recomputed in the
        backward pass). In forward mode and under the transforms of ``torch.func`` two convolutions run, which torch
        differentiates and maps.

    Raises:
        ValueError: unknown fold or activation.
        RuntimeError: shapes or dtypes do not match; the message has the wanted and the given ones.

    Accuracy: the CPU kernel accumulates each factor sequentially in fp32; its error is at most twice that of torch's
    two convolutions plus 8 units in the last place of the largest output (measured: 6).

    Source: Alvarez & Salzmann, NIPS 2017 (fold ``paper``); :mod:`compaware_kernels.folds` has those of the others.
    """
    lowrank.check(activation, fold)
    stride, padding, dilation = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return torch.ops.compaware.lowrank_conv2d(
        x, V, U, bias, residual, packed, stride, padding, dilation, groups, fold, activation
    )


def lowrank_linear(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Low-rank linear layer ``y = act((x V^T) U^T + bias + residual)``, ``[..., C]`` -> ``[..., O]``.

    Args:
        x: ``[..., C]``;  V: ``[r, C]``;  U: ``[O, r]``;  bias: ``[O]``;  residual: ``[..., O]``.
        packed: ``torch.ops.compaware.lowrank_pack(V, U, 1)``, as for :func:`lowrank_conv2d`.
        activation: ``none`` | ``relu`` | ``relu6`` | ``silu`` | ``gelu``.

    Returns:
        ``[..., O]``, contiguous, differentiable; in forward mode and under the transforms of ``torch.func`` as two
        linear layers.

    Raises:
        ValueError: unknown activation.
        RuntimeError: shapes or dtypes do not match.
    """
    lowrank.check(activation)
    return torch.ops.compaware.lowrank_linear(x, V, U, bias, residual, packed, activation)
