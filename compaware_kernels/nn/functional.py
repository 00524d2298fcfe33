"""Low-rank layers as functions: two factors, bias, residual and activation in one op.

    y = act(U (V x) + bias + residual)

On the CPU in fp32 (C++) and on CUDA (Triton) the rank-r intermediate stays in the cache, or on the chip; where no
kernel takes the arguments, two steps of plain PyTorch run: :mod:`compaware_kernels.ops.backends` has the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops import lowrank


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
