"""The ops of low-rank inference, in the manner of :mod:`compaware_kernels.ops`: schema, reference body, fake, gradient.

A layer's two factors in one op, with bias, residual and activation: ``y = act(U (V x) + bias + residual)``. The reference
body is two steps of plain PyTorch. The CPU's C++ kernel and the GPU's Triton kernel keep the intermediate on the chip.

``packed`` is what ``lowrank_pack(V, U, groups)`` returned, or None: it saves the kernel the packing. It is a hint only:
a kernel that finds V or U changed since packs anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .folds import row_axes

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}
HEADER, COLUMNS = 16, 16  # floats before the packed factors; what their columns are padded to (csrc/core/lowrank_work.h)
Ints = Sequence[int]


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation by name.  Raises ValueError for an unknown one."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return ACTIVATIONS[activation](y)


# --- lowrank_pack: both factors as the CPU kernel reads them ----------------------------------------------------------


@torch.library.custom_op("compaware::lowrank_pack", mutates_args=())
def lowrank_pack(V: Tensor, U: Tensor, groups: int) -> Tensor:
    """V ``[G r, C/G, kh, kw]`` or ``[r, C]``, U ``[O, r, 1, 1]`` or ``[O, r]`` -> 1-D fp32, empty where nothing packs."""
    return V.new_empty(0, dtype=torch.float32)


@lowrank_pack.register_fake
def _(V, U, groups):
    size = 0
    if V.device.type == "cpu" and V.dtype == U.dtype == torch.float32 and U[0, 0].numel() == 1:
        r, O = V.shape[0] // groups, U.shape[0] // groups
        columns = [-(-n // COLUMNS) * COLUMNS for n in (r, O)]
        size = HEADER + groups * (V[0].numel() * columns[0] + r * columns[1])
    return V.new_empty(size, dtype=torch.float32)


# --- lowrank_conv2d ---------------------------------------------------------------------------------------------------


def parts(fold: str, *values: Ints) -> tuple[list[Ints], list[Ints]]:
    """Stride, padding and dilation of the first and of the second convolution: each axis goes where its kernel is."""
    k = row_axes(fold, 2)

    def on_axes(start: int, stop: int) -> list[Ints]:
        plain = (1, 0, 1)  # stride, padding, dilation of an axis whose kernel is the other's
        return [[v if start <= i < stop else other for i, v in enumerate(value)]
                for value, other in zip(values, plain, strict=True)]  # fmt: skip

    return on_axes(k, 2), on_axes(0, k)


@torch.library.custom_op("compaware::lowrank_two_step", mutates_args=())
def lowrank_two_step(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, fold: str, activation: str,
) -> Tensor:  # fmt: skip
    """Two convolutions in channels_last; what the kernels fall back to."""
    first, second = parts(fold, stride, padding, dilation)
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(F.conv2d(x, V, None, *first, groups), U, bias, *second, groups)
    y = activate(y if residual is None else y + residual, activation)
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("compaware::lowrank_conv2d", mutates_args=())
def lowrank_conv2d(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, packed: Tensor | None,
    stride: Ints, padding: Ints, dilation: Ints, groups: int, fold: str, activation: str,
) -> Tensor:  # fmt: skip
    return lowrank_two_step(x, V, U, bias, residual, stride, padding, dilation, groups, fold, activation)


def _conv2d_fake(x, V, U, bias, residual, stride, padding, dilation, groups, fold, activation):
    k = [V.shape[2] * U.shape[2], V.shape[3] * U.shape[3]]  # one of the two factors is 1 along each axis
    out = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (k[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]  # fmt: skip
    y = x.new_empty(x.shape[0], U.shape[0], *out)
    return y.contiguous(memory_format=torch.channels_last)


lowrank_two_step.register_fake(_conv2d_fake)


@lowrank_conv2d.register_fake
def _(x, V, U, bias, residual, packed, *rest):
    return _conv2d_fake(x, V, U, bias, residual, *rest)


def _save(ctx, inputs, output):
    x, V, U, bias, residual, _, *geometry = inputs
    ctx.save_for_backward(x, V, U, bias, residual, output)
    ctx.geometry = geometry


def _through_activation(grad: Tensor, activation: str, y: Tensor, before) -> Tensor:
    """The gradient before the activation; ``before()`` gives what went into it."""
    if activation == "relu":
        return grad * (y > 0)
    if activation == "relu6":
        return grad * ((y > 0) & (y < 6))
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, before())
    return torch.ops.aten.gelu_backward(grad, before()) if activation == "gelu" else grad


def _conv2d_backward(ctx, grad: Tensor):
    x, V, U, bias, residual, y = ctx.saved_tensors
    *geometry, groups, fold, activation = ctx.geometry
    first, second = parts(fold, *geometry)
    grad = _through_activation(
        grad, activation, y, lambda: lowrank_conv2d(x, V, U, bias, residual, None, *geometry, groups, fold, "none")
    )
    T = F.conv2d(x, V, None, *first, groups)
    grad_T, grad_U, _ = _convolution_backward(grad, T, U, *second, groups, True, ctx.needs_input_grad[2])
    grad_x, grad_V, _ = _convolution_backward(grad_T, x, V, *first, groups, *ctx.needs_input_grad[:2])
    grad_bias = None if bias is None else grad.sum((0, 2, 3))
    return grad_x, grad_V, grad_U, grad_bias, None if residual is None else grad, *[None] * 7


def _convolution_backward(grad, x, W, stride, padding, dilation, groups, of_x, of_W):
    return torch.ops.aten.convolution_backward(
        grad, x, W, None, stride, padding, dilation, False, [0, 0], groups, [of_x, of_W, False]
    )


lowrank_conv2d.register_autograd(_conv2d_backward, setup_context=_save)


# --- lowrank_linear ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("compaware::lowrank_linear_two_step", mutates_args=())
def lowrank_linear_two_step(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    y = F.linear(F.linear(x, V), U, bias)
    return activate(y if residual is None else y + residual, activation).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("compaware::lowrank_linear", mutates_args=())
def lowrank_linear(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, packed: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    return lowrank_linear_two_step(x, V, U, bias, residual, activation)


lowrank_linear_two_step.register_fake(lambda x, V, U, *rest: x.new_empty(*x.shape[:-1], U.shape[0]))
lowrank_linear.register_fake(lambda x, V, U, *rest: x.new_empty(*x.shape[:-1], U.shape[0]))


def _linear_backward(ctx, grad: Tensor):
    x, V, U, bias, residual, y = ctx.saved_tensors
    (activation,) = ctx.geometry
    grad = _through_activation(
        grad, activation, y, lambda: lowrank_linear(x, V, U, bias, residual, None, "none")
    )  # fmt: skip
    flat_x, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_T = flat @ U
    grad_x = (grad_T @ V).reshape(x.shape)
    grad_bias = None if bias is None else flat.sum(0)
    return (grad_x, grad_T.mT @ flat_x, flat.mT @ (flat_x @ V.mT), grad_bias, None if residual is None else grad,
            None, None)  # fmt: skip


lowrank_linear.register_autograd(_linear_backward, setup_context=_save)
