"""Low-rank layers as functions: two factors, bias, residual and activation in one op.

    y = act(U (V x) + bias + residual)

On the CPU in fp32 (C++) and on CUDA (Triton) the rank-r intermediate stays in the cache, or on the chip; where no
kernel takes the arguments, two steps of plain PyTorch run. :func:`why_two_step` says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library, lowrank_ops

# Below these the CPU kernel was slower than two convolutions of torch in some case (bench/test_inference.py).
SMALLEST_CHANNELS = 8


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
    """A convolution in two factors: ``y = act(U * (V * x) + bias + residual)``.

    Args:
        x: ``[N, C, H, W]``, best in channels_last.
        V: the first convolution: ``[G r, C/G, kh, kw]`` (fold ``paper``), ``[G r, C/G, 1, kw]`` (``spatial``) or
            ``[G r, C/G, 1, 1]`` (``input``).
        U: the second: ``[O, r, 1, 1]``, ``[O, r, kh, 1]`` or ``[O, r, kh, kw]``.
        bias: ``[O]``.
        residual: added before the activation, of the shape of y.
        packed: what ``torch.ops.compaware.lowrank_pack(V, U, groups)`` gave, to pack constant weights once.
        stride, padding, dilation, groups: of the whole convolution, as in ``torch.nn.functional.conv2d``; each axis
            goes to the factor whose kernel has it.
        activation: ``none`` | ``relu`` | ``relu6`` | ``silu`` | ``gelu``.

    Returns:
        ``[N, O, OH, OW]`` in channels_last, differentiable (the intermediate is computed again in the backward pass).

    Raises:
        ValueError: unknown fold or activation.
        RuntimeError: shapes that do not fit each other; says what was wanted and what came.

    Source: Alvarez & Salzmann, NIPS 2017 (fold ``paper``); :mod:`compaware_kernels.folds` has the others'.
    """
    lowrank_ops.check(activation, fold)
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
    """A linear layer in two factors: ``y = act((x V^T) U^T + bias + residual)``.

    Args:
        x: ``[..., C]``;  V: ``[r, C]``;  U: ``[O, r]``;  bias: ``[O]``;  residual: ``[..., O]``.
        packed: what ``torch.ops.compaware.lowrank_pack(V, U, 1)`` gave, to pack constant weights once.
        activation: ``none`` | ``relu`` | ``relu6`` | ``silu`` | ``gelu``.

    Returns:
        ``[..., O]``, contiguous, differentiable.

    Raises:
        ValueError: unknown activation.
        RuntimeError: shapes that do not fit each other.
    """
    lowrank_ops.check(activation)
    return torch.ops.compaware.lowrank_linear(x, V, U, bias, residual, packed, activation)


def why_two_step(x: Tensor, V: Tensor, U: Tensor, fold: str = "paper") -> str:
    """Why a layer runs as two steps of plain PyTorch; "" where one kernel does both, and that is faster."""
    if torch.is_grad_enabled() and (x.requires_grad or V.requires_grad or U.requires_grad):
        return "gradients are wanted, for which two steps keep the intermediate"
    if fold != "paper" and V.ndim > 2:
        return f"the second factor of fold {fold} is no 1 x 1"
    if x.is_cuda:
        return _why_not_cuda(x, V, U)
    if not x.is_cpu or _library.missing:
        return f"no kernel for {x.device.type}" if not x.is_cpu else f"C++ library: {_library.missing}"
    if x.dtype != torch.float32 or V.dtype != torch.float32:
        return f"the CPU kernel is for fp32; got {x.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if V.shape[1] < SMALLEST_CHANNELS:
        return f"{V.shape[1]} input channels per group: two steps are faster below {SMALLEST_CHANNELS}"
    return ""


def _why_not_cuda(x: Tensor, V: Tensor, U: Tensor) -> str:
    return "no kernel for cuda"
