"""Low-rank convolution and linear ops: schemas, reference and fake implementations, gradients, flop counts, autocast.

Both factors in one op, with bias, residual and activation: ``y = act(U (V x) + bias + residual)``. The reference
implementation is two steps of plain PyTorch; the C++ and Triton kernels keep the rank-r intermediate on chip.

``packed`` is the result of ``lowrank_pack(V, U, groups)``, or None. It saves the CPU kernel the packing and is a hint
only: if V or U has changed since, the kernel repacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from .._utils.constants import constant
from ..folds import row_axes
from .transforms import register_derivatives

__all__ = [
    "ACTIVATIONS",
    "Geometry",
    "check",
    "format_of",
    "lowrank_conv2d",
    "lowrank_conv2d_",
    "lowrank_linear",
    "lowrank_linear_two_step",
    "lowrank_pack",
    "lowrank_two_step",
    "sees_padding",
]

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}
HEADER = constant("kPackHeader")  # fp32 numbers before the packed factors
COLUMNS = constant("kPackColumns")  # columns are padded to a multiple of this
Ints = Sequence[int]


def check(activation: str, fold: str = "paper") -> None:
    """Raise ValueError for an unknown activation or fold."""
    row_axes(fold, 2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


# --- lowrank_pack: both factors in the CPU kernel's layout ------------------------------------------------------------


@torch.library.custom_op("compaware::lowrank_pack", mutates_args=())
def lowrank_pack(V: Tensor, U: Tensor, groups: int) -> Tensor:
    """Factors in the CPU kernel's layout, 1-D fp32; empty if that kernel does not take them.

    V: ``[G r, C/G, kh, kw]`` or ``[r, C]``.  U: ``[O, r, 1, 1]`` or ``[O, r]``.
    """
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


class Geometry(NamedTuple):
    """Geometry of a low-rank convolution: the non-tensor arguments of its ops, in their order."""

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    fold: str
    activation: str

    def parts(self) -> tuple[list[Ints], list[Ints]]:
        """(stride, padding, dilation) of both convolutions; each axis belongs to the one with its kernel."""
        k = row_axes(self.fold, 2)

        def on_axes(start: int, stop: int) -> list[Ints]:
            plain = (1, 0, 1)  # stride, padding, dilation along the axes of the other factor
            return [[v if start <= i < stop else other for i, v in enumerate(value)]
                    for value, other in zip(self[:3], plain, strict=True)]  # fmt: skip

        return on_axes(k, 2), on_axes(0, k)


def format_of(x: Tensor, V: Tensor) -> torch.memory_format:
    """Memory format of y: as in torch's convolutions, channels_last if x or the weight is."""
    last = torch.channels_last
    return last if last in (suggest_memory_format(x), suggest_memory_format(V)) else torch.contiguous_format


def sees_padding(V: Ints, U: Ints, geometry: Geometry) -> bool:
    """Whether output pixels see only padding, for factors of these shapes.

    There oneDNN crashes in channels_last, fp32 with a bias or bf16, most often if grouped.
    """
    reach = [geometry.dilation[i] * (V[2 + i] * U[2 + i] - 1) for i in range(2)]
    return any(p > r for p, r in zip(geometry.padding, reach, strict=True))


def _two_convolutions(x, V, U, bias, residual, *geometry) -> Tensor:
    geometry = Geometry(*geometry)
    first, second = geometry.parts()
    y = F.conv2d(F.conv2d(x, V, None, *first, geometry.groups), U, bias, *second, geometry.groups)
    return ACTIVATIONS[geometry.activation](y if residual is None else y + residual)


@torch.library.custom_op("compaware::lowrank_two_step", mutates_args=())
def lowrank_two_step(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, fold: str, activation: str,
) -> Tensor:  # fmt: skip
    """Reference low-rank convolution, ``[N, C, H, W]`` -> ``[N, O, OH, OW]``: two convolutions."""
    check(activation, fold)
    geometry = Geometry(stride, padding, dilation, groups, fold, activation)
    works = torch.contiguous_format if sees_padding(V.shape, U.shape, geometry) else torch.channels_last
    factors = (V, U) if works == torch.channels_last else (V.contiguous(), U.contiguous())
    y = _two_convolutions(x.contiguous(memory_format=works), *factors, bias, residual, *geometry)
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
    """lowrank_conv2d written over the residual, which may overlap other arguments.  Inference only: no gradient."""
    residual.copy_(lowrank_conv2d(x, V, U, bias, residual, packed, stride, padding, dilation, groups, fold, activation))


lowrank_conv2d_.register_fake(lambda *args: None)


def _out(size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> list[int]:
    """Output height and width of a convolution."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


def _conv2d_fake(x, V, U, bias, residual, *geometry):
    kernel = [V.shape[2 + i] * U.shape[2 + i] for i in range(2)]  # one of the two factors is 1 along each axis
    y = x.new_empty(x.shape[0], U.shape[0], *_out(x.shape[2:], kernel, *geometry[:3]))
    return y.contiguous(memory_format=format_of(x, V))


lowrank_two_step.register_fake(_conv2d_fake)


@lowrank_conv2d.register_fake
def _(x, V, U, bias, residual, packed, *rest):
    return _conv2d_fake(x, V, U, bias, residual, *rest)


@register_flop_formula([torch.ops.compaware.lowrank_conv2d, torch.ops.compaware.lowrank_conv2d_])
def _(x, V, U, bias, residual, packed, *geometry, out_shape) -> int:
    first, second = Geometry(*geometry).parts()
    T = [x[0], V[0], *_out(x[2:], V[2:], *first)]
    y = [x[0], U[0], *_out(T[2:], U[2:], *second)]
    return conv_flop_count(list(x), list(V), T) + conv_flop_count(T, list(U), y)


def _save(ctx, inputs, output):
    x, V, U, bias, residual, _, *geometry = inputs
    ctx.save_for_backward(x, V, U, bias, residual, output)
    ctx.geometry = geometry


def _activation_derivative(activation: str, y: Tensor, before) -> Tensor | float:
    """Derivative of the activation at its input ``before()`` (recomputed, differentiable); ``y`` is its output."""
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
    geometry = Geometry(*ctx.geometry)
    sums, (first, second) = geometry._replace(activation="none"), geometry.parts()
    grad = grad * _activation_derivative(
        geometry.activation, y, lambda: lowrank_conv2d(x, V, U, bias, residual, None, *sums)
    )
    T = F.conv2d(x, V, None, *first, geometry.groups)
    of_x, of_V, of_U = ctx.needs_input_grad[:3]
    grad_T, grad_U = _convolution_backward(grad, T, U, second, geometry.groups, (True, of_U))
    grad_x, grad_V = _convolution_backward(grad_T, x, V, first, geometry.groups, (of_x, of_V))
    grad_bias = None if bias is None else grad.sum((0, 2, 3))
    return grad_x, grad_V, grad_U, grad_bias, None if residual is None else grad, *[None] * 7


def _convolution_backward(grad, x, W, part: list[Ints], groups: int, wanted: tuple[bool, bool]):
    """Gradients with respect to ``x`` and ``W``, where wanted; ``part``: stride, padding, dilation."""
    return torch.ops.aten.convolution_backward(grad, x, W, None, *part, False, [0, 0], groups, [*wanted, False])[:2]


register_derivatives(
    lowrank_conv2d,
    _conv2d_backward,
    save=_save,
    composite=lambda x, V, U, bias, residual, packed, *rest: _two_convolutions(x, V, U, bias, residual, *rest),
)


# --- lowrank_linear ---------------------------------------------------------------------------------------------------


def _two_linears(x, V, U, bias, residual, activation: str) -> Tensor:
    y = F.linear(F.linear(x, V), U, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


@torch.library.custom_op("compaware::lowrank_linear_two_step", mutates_args=())
def lowrank_linear_two_step(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    check(activation)
    return _two_linears(x, V, U, bias, residual, activation).clone(memory_format=torch.contiguous_format)


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
    grad = grad * _activation_derivative(activation, y, lambda: lowrank_linear(x, V, U, bias, residual, None, "none"))
    flat_x, flat = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_T = flat @ U
    grad_x = (grad_T @ V).reshape(x.shape)
    grad_bias = None if bias is None else flat.sum(0)
    return (grad_x, grad_T.mT @ flat_x, flat.mT @ (flat_x @ V.mT), grad_bias, None if residual is None else grad,
            None, None)  # fmt: skip


register_derivatives(
    lowrank_linear,
    _linear_backward,
    save=_save,
    composite=lambda x, V, U, bias, residual, packed, activation: _two_linears(x, V, U, bias, residual, activation),
)


# --- autocast: cast floating-point arguments to the autocast dtype, as torch does for convolutions and linear layers --


def _autocast(op, device: str, keys, *args):
    dtype = torch.get_autocast_dtype(device)
    cast = [a.to(dtype) if isinstance(a, Tensor) and a.dtype.is_floating_point and a.dtype != torch.float64 else a
            for a in args]  # fmt: skip
    cast[5] = None  # packed weights are fp32
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(f"Autocast{device.upper()}")):
        return op(*cast)


_library = torch.library.Library("compaware", "FRAGMENT")
for _op in (lowrank_conv2d, lowrank_linear):
    for _device in ("cpu", "cuda"):
        _body = partial(_autocast, _op._opoverload, _device)
        _library.impl(_op._opoverload, _body, f"Autocast{_device.upper()}", with_keyset=True)
