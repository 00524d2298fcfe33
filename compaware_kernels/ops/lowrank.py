"""The ops of low-rank inference, written as those of :mod:`compaware_kernels.ops`: schema, reference, fake, gradient.

A layer's two factors in one op, with bias, residual and activation: ``y = act(U (V x) + bias + residual)``. The
reference body is two steps of plain PyTorch; the C++ and the Triton kernel keep the intermediate on the chip.

``packed`` is what ``lowrank_pack(V, U, groups)`` returned, or None: it saves the kernel the packing. It is a hint only:
a kernel that finds V or U changed since packs anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .._utils.constants import constant
from ..folds import row_axes

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}
HEADER = constant("kPackHeader")  # floats before the packed factors
COLUMNS = constant("kPackColumns")  # columns are padded to a multiple of this
Ints = Sequence[int]


def check(activation: str, fold: str = "paper") -> None:
    """Raise ValueError for an unknown activation or fold."""
    row_axes(fold, 2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


# --- lowrank_pack: both factors as the CPU kernel reads them ----------------------------------------------------------


@torch.library.custom_op("compaware::lowrank_pack", mutates_args=())
def lowrank_pack(V: Tensor, U: Tensor, groups: int) -> Tensor:
    """V ``[G r, C/G, kh, kw]`` or ``[r, C]``, U ``[O, r, 1, 1]`` or ``[O, r]`` -> 1-D fp32; empty if nothing packs."""
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


def format_of(x: Tensor, V: Tensor) -> torch.memory_format:
    """Of y: as for any convolution of torch, channels_last if x or the weight is."""
    last = torch.channels_last
    return last if last in (suggest_memory_format(x), suggest_memory_format(V)) else torch.contiguous_format


@torch.library.custom_op("compaware::lowrank_two_step", mutates_args=())
def lowrank_two_step(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, fold: str, activation: str,
) -> Tensor:  # fmt: skip
    """Two convolutions in channels_last; what the kernels fall back to."""
    check(activation, fold)
    first, second = parts(fold, stride, padding, dilation)
    T = F.conv2d(x.contiguous(memory_format=torch.channels_last), V, None, *first, groups)
    y = F.conv2d(T, U, bias, *second, groups)
    y = ACTIVATIONS[activation](y if residual is None else y + residual)
    return y.contiguous(memory_format=format_of(x, V))


@torch.library.custom_op("compaware::lowrank_conv2d", mutates_args=())
def lowrank_conv2d(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, packed: Tensor | None,
    stride: Ints, padding: Ints, dilation: Ints, groups: int, fold: str, activation: str,
) -> Tensor:  # fmt: skip
    return lowrank_two_step(x, V, U, bias, residual, stride, padding, dilation, groups, fold, activation)


@torch.library.custom_op("compaware::lowrank_conv2d_", mutates_args={"residual"})
def lowrank_conv2d_(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor, packed: Tensor | None,
    stride: Ints, padding: Ints, dilation: Ints, groups: int, fold: str, activation: str,
) -> None:  # fmt: skip
    """The same, written over the residual, which may overlap other arguments.  For inference: it has no gradient."""
    residual.copy_(lowrank_conv2d(x, V, U, bias, residual, packed, stride, padding, dilation, groups, fold, activation))


lowrank_conv2d_.register_fake(lambda *args: None)


def _out(size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> list[int]:
    """Height and width after a convolution."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def _conv2d_fake(x, V, U, bias, residual, stride, padding, dilation, groups, fold, activation):
    kernel = [V.shape[2 + i] * U.shape[2 + i] for i in range(2)]  # one of the two factors is 1 along each axis
    y = x.new_empty(x.shape[0], U.shape[0], *_out(x.shape[2:], kernel, stride, padding, dilation))
    return y.contiguous(memory_format=format_of(x, V))


lowrank_two_step.register_fake(_conv2d_fake)


@lowrank_conv2d.register_fake
def _(x, V, U, bias, residual, packed, *rest):
    return _conv2d_fake(x, V, U, bias, residual, *rest)


@register_flop_formula([torch.ops.compaware.lowrank_conv2d, torch.ops.compaware.lowrank_conv2d_])
def _(x, V, U, bias, residual, packed, stride, padding, dilation, groups, fold, activation, *, out_shape) -> int:
    first, second = parts(fold, stride, padding, dilation)
    T = [x[0], V[0], *_out(x[2:], V[2:], *first)]
    y = [x[0], U[0], *_out(T[2:], U[2:], *second)]
    return conv_flop_count(list(x), list(V), T) + conv_flop_count(T, list(U), y)


def _save(ctx, inputs, output):
    x, V, U, bias, residual, _, *geometry = inputs
    ctx.save_for_backward(x, V, U, bias, residual, output)
    ctx.geometry = geometry


def _slope(activation: str, y: Tensor, before) -> Tensor | float:
    """The derivative of the activation; ``before()`` gives what went into it (differentiable again)."""
    if activation == "relu":
        return y > 0
    if activation == "relu6":
        return (y > 0) & (y < 6)
    if activation == "silu":
        z = before()
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    if activation == "gelu":
        z = before()
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return 1.0


def _conv2d_backward(ctx, grad: Tensor):
    x, V, U, bias, residual, y = ctx.saved_tensors
    *geometry, groups, fold, activation = ctx.geometry
    first, second = parts(fold, *geometry)
    grad = grad * _slope(
        activation, y, lambda: lowrank_conv2d(x, V, U, bias, residual, None, *geometry, groups, fold, "none")
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
    check(activation)
    y = F.linear(F.linear(x, V), U, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("compaware::lowrank_linear", mutates_args=())
def lowrank_linear(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, packed: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    return lowrank_linear_two_step(x, V, U, bias, residual, activation)


lowrank_linear_two_step.register_fake(lambda x, V, U, *rest: x.new_empty(*x.shape[:-1], U.shape[0]))
lowrank_linear.register_fake(lambda x, V, U, *rest: x.new_empty(*x.shape[:-1], U.shape[0]))


@register_flop_formula(torch.ops.compaware.lowrank_linear)
def _(x, V, U, bias, residual, packed, activation, *, out_shape) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(V) + math.prod(U))


def _linear_backward(ctx, grad: Tensor):
    x, V, U, bias, residual, y = ctx.saved_tensors
    (activation,) = ctx.geometry
    grad = grad * _slope(activation, y, lambda: lowrank_linear(x, V, U, bias, residual, None, "none"))
    flat_x, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_T = flat @ U
    grad_x = (grad_T @ V).reshape(x.shape)
    grad_bias = None if bias is None else flat.sum(0)
    return (grad_x, grad_T.mT @ flat_x, flat.mT @ (flat_x @ V.mT), grad_bias, None if residual is None else grad,
            None, None)  # fmt: skip


lowrank_linear.register_autograd(_linear_backward, setup_context=_save)


# --- autocast: floating-point arguments in the region's dtype, as torch does for convolutions and linear layers -------


def _autocast(op, device: str, keys, *args):
    dtype = torch.get_autocast_dtype(device)
    cast = [a.to(dtype) if isinstance(a, Tensor) and a.dtype.is_floating_point and a.dtype != torch.float64 else a
            for a in args]  # fmt: skip
    cast[5] = None  # what was packed is for fp32
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(f"Autocast{device.upper()}")):
        return op(*cast)


_library = torch.library.Library("compaware", "FRAGMENT")
for _op in (lowrank_conv2d, lowrank_linear):
    for _device in ("cpu", "cuda"):
        _body = partial(_autocast, _op._opoverload, _device)
        _library.impl(_op._opoverload, _body, f"Autocast{_device.upper()}", with_keyset=True)
