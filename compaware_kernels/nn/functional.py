"""Low-rank layers as functions: two factors, bias, residual and activation in one op.

    y = act(U (V x) + bias + residual)

On the CPU in fp32 (C++) and on CUDA (Triton) the rank-r intermediate stays in the cache, or on the chip; where no
kernel takes the arguments, two steps of plain PyTorch run. :func:`why_two_step` says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops import backends, library, lowrank

# Below these the CPU kernel was slower than two convolutions of torch, by up to a third: its columns count in sixteens,
# and every tap costs something (AMD EPYC with AVX-512, 1 thread, 3 to 32 channels, ranks 8 and 16, 56 x 56).
SMALLEST_CHANNELS, SMALLEST_RANK, SMALLEST_RANK_OF_LARGE = 16, 12, 24  # with kernels; of 4 x 4 and more
# And 1 x 1 layers of few channels on many pixels, which do little but write their output: 0.6x (2 threads, 16 and
# 24 channels, 25,088 pixels; on 1,568 pixels they were faster by half).
THIN_CHANNELS, MANY_PIXELS = 32, 8192


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
        packed: what ``torch.ops.compaware.lowrank_pack(V, U, groups)`` gave, to pack constant weights once. Weights
            that were written to since are packed anew; a write through ``.data`` is noticed if it changes most of them.
        stride, padding, dilation, groups: of the whole convolution, as in ``torch.nn.functional.conv2d``; each axis
            goes to the factor whose kernel has it.
        activation: ``none`` | ``relu`` | ``relu6`` | ``silu`` | ``gelu``.

    Returns:
        ``[N, O, OH, OW]``, in channels_last if x or V is; differentiable (the intermediate is computed again in the
        backward pass).

    Raises:
        ValueError: unknown fold or activation.
        RuntimeError: shapes or dtypes that do not fit each other; says what was wanted and what came.
        NotImplementedError: forward-mode derivatives.

    Each factor is one running sum in fp32 on the CPU: within 2 x the error of torch's two convolutions, plus 8 units in
    the last place of the largest output (measured: 6).

    Source: Alvarez & Salzmann, NIPS 2017 (fold ``paper``); :mod:`compaware_kernels.folds` has the others'.
    """
    lowrank.check(activation, fold)
    _refuse_forward_mode()
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
        packed: what ``torch.ops.compaware.lowrank_pack(V, U, 1)`` gave, as for :func:`lowrank_conv2d`.
        activation: ``none`` | ``relu`` | ``relu6`` | ``silu`` | ``gelu``.

    Returns:
        ``[..., O]``, contiguous, differentiable.

    Raises:
        ValueError: unknown activation.
        RuntimeError: shapes or dtypes that do not fit each other.
        NotImplementedError: forward-mode derivatives.
    """
    lowrank.check(activation)
    _refuse_forward_mode()
    return torch.ops.compaware.lowrank_linear(x, V, U, bias, residual, packed, activation)


def _refuse_forward_mode() -> None:
    if forward_ad._current_level >= 0:  # torch would take the derivative of a custom op for zero
        raise NotImplementedError("the low-rank ops have no forward-mode derivatives; use two convolutions or linears")


def why_two_step(x: Tensor, V: Tensor, U: Tensor, groups: int = 1, fold: str = "paper") -> str:
    """Why a layer runs as two steps of plain PyTorch; "" where one kernel does both."""
    if torch.is_grad_enabled() and (x.requires_grad or V.requires_grad or U.requires_grad):
        return "gradients are wanted, for which two steps keep the intermediate"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are wanted"
    if V.ndim == 4 and x.ndim != 4:
        return "no batch axis"
    if V.ndim == 4 and fold != "paper":
        return f"the second factor of fold {fold} is no 1 x 1"
    if x.is_cuda:
        return backends.missing() or backends.why_not(x, V, U, groups, fold)
    if not x.is_cpu or library.missing:
        return f"no kernel for {x.device.type}" if not x.is_cpu else f"C++ library: {library.missing}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast: the CPU kernel is for fp32"
    if x.dtype != torch.float32 or V.dtype != torch.float32:
        return f"the CPU kernel is for fp32; got {x.dtype} and weights of {V.dtype}"
    return _too_small(x, V, groups) if V.ndim == 4 else ""


def _too_small(x: Tensor, V: Tensor, groups: int) -> str:
    """Why two steps are faster than the CPU kernel; "" if they are not."""
    r, C, taps = V.shape[0] // groups, V.shape[1], V.shape[2] * V.shape[3]
    least = SMALLEST_RANK if taps < 16 else SMALLEST_RANK_OF_LARGE
    if taps == 1 and C < THIN_CHANNELS and x.shape[0] * x.shape[2] * x.shape[3] > MANY_PIXELS:
        return f"{C} channels on more than {MANY_PIXELS} pixels: two steps write faster"
    if taps == 1 or (r >= least and C >= SMALLEST_CHANNELS):
        return ""
    return f"{C} channels, rank {r} per group: two steps are faster below {SMALLEST_CHANNELS} channels or rank {least}"
