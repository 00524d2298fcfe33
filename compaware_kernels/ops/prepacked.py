"""Linear layers and 2-D convolutions whose weights are kept in oneDNN's own layout, as Inductor's freezing keeps them.

torch converts an ordinary weight in every call. The bias, and a residual sum, are added as the output is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import Geometry, sees_padding

__all__ = ["convolutions", "linears", "pack", "why_not"]

# oneDNN's relu, relu6 and gelu turn NaN into numbers: those are torch's, written over the output.
IN_PLACE = {"relu": torch.relu_, "relu6": lambda y: F.relu6(y, inplace=True), "gelu": torch.ops.aten.gelu_,
            "silu": lambda y: F.silu(y, inplace=True), "none": lambda y: y}  # fmt: skip
PLAIN, SILU = ("none", [], ""), ("swish", [], "")  # what follows a layer: name, numbers, algorithm
SUM = ("add", 1.0, None, [], "")
LAST = torch.channels_last


def why_not(dtype: torch.dtype, V: Sequence[int], U: Sequence[int], geometry: Geometry | None) -> str:
    """Why factors of these shapes cannot run prepacked; "" if they can."""
    if not _has(dtype):
        return f"oneDNN has no {dtype} here"
    return "oneDNN crashes where output pixels see only padding" if geometry and sees_padding(V, U, geometry) else ""


@cache
def _has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    return name is None or getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def pack(weights: Sequence[Tensor], geometry: Geometry | None) -> list[Tensor]:
    """Weights of one layer, or of two in a row, in oneDNN's layout.

    Args:
        weights: of linear layers ``[O, C]`` or of convolutions ``[O, C/G, kh, kw]``; two: V and U.
        geometry: of the convolution that the weights make up together; None: linear layers.
    """
    if geometry is None:
        return [torch.ops.mkldnn._reorder_linear_weight(W) for W in weights]
    places = _places(len(weights), geometry)
    return [torch.ops.mkldnn._reorder_convolution_weight(W, *place) for W, place in zip(weights, places, strict=True)]


def _places(count: int, geometry: Geometry) -> list[tuple]:
    """Padding, stride, dilation and groups of each of ``count`` convolutions."""
    parts = geometry.parts() if count == 2 else [geometry[:3]]
    return [(padding, stride, dilation, geometry.groups) for stride, padding, dilation in parts]


def convolutions(count: int, geometry: Geometry, in_place: bool, wanted: torch.memory_format) -> Callable[..., Tensor]:
    """Function ``f(x, bias, residual, packed)`` of one or two convolutions, output in the memory format ``wanted``.

    ``in_place`` permits writing the output over the residual.
    """
    *before, place = _places(count, geometry)
    conv, conv_ = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
    after, finish = (
        (SILU, IN_PLACE["none"]) if geometry.activation == "silu" else (PLAIN, IN_PLACE[geometry.activation])
    )
    finish_sum = IN_PLACE[geometry.activation]

    def run(x: Tensor, bias: Tensor | None, residual: Tensor | None, packed: Sequence[Tensor]) -> Tensor:
        x = x.contiguous(memory_format=LAST)
        for V, where in zip(packed, before, strict=False):
            x = conv(x, V, None, *where, *PLAIN)
        if residual is None:
            y = finish(conv(x, packed[-1], bias, *place, *after))
        elif in_place and before and residual.is_contiguous(memory_format=LAST):  # a single layer may read it as x
            y = finish_sum(conv_.binary(residual, x, packed[-1], bias, *place, *SUM))
        else:
            y = finish_sum(conv.binary(x, residual.contiguous(memory_format=LAST), packed[-1], bias, *place, *SUM))
        return y.contiguous(memory_format=wanted)

    return run


def linears(activation: str) -> Callable[..., Tensor]:
    """Function ``f(x, bias, residual, packed)`` of one or two linear layers."""
    linear, finish = torch.ops.mkldnn._linear_pointwise, IN_PLACE[activation]

    def run(x: Tensor, bias: Tensor | None, residual: Tensor | None, packed: Sequence[Tensor]) -> Tensor:
        for V in packed[:-1]:
            x = linear(x, V, None, *PLAIN)
        if residual is None:
            return finish(linear(x, packed[-1], bias, *PLAIN))
        return finish(linear.binary(x, residual, packed[-1], bias, "add"))

    return run
