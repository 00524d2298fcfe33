"""Linear layers and 2-D convolutions whose weights are kept in oneDNN's own layout, as Inductor's freezing keeps them.

torch converts an ordinary weight in every call. The bias, and a residual sum, are added as the output is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import Geometry, sees_padding

__all__ = ["Prepacked", "why_not"]

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


class Prepacked:
    """One or two layers in a row on prepacked weights, to be called: ``y = act(W_2 (W_1 x) + bias + residual)``.

    Args:
        weights: of linear layers ``[O, C]`` or of convolutions ``[O, C/G, kh, kw]``; two: V and U.
        geometry: of the convolution that the weights make up together; None: linear layers.
    """

    def __init__(self, weights: Sequence[Tensor], geometry: Geometry | None):
        self.places: list[tuple] = [()] * len(weights)
        if geometry is None:
            self.weights = [torch.ops.mkldnn._reorder_linear_weight(W) for W in weights]
            return
        parts = geometry.parts() if len(weights) == 2 else [geometry[:3]]
        self.places = [(padding, stride, dilation, geometry.groups) for stride, padding, dilation in parts]
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.weights = [reorder(W, *place) for W, place in zip(weights, self.places, strict=True)]

    def __call__(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, in_place: bool,
        wanted: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        """Output for ``x``, ``[N, C, H, W]`` or ``[..., C]``, in the memory format ``wanted``.

        ``in_place`` permits writing it over the residual.
        """
        *before, (W, place) = zip(self.weights, self.places, strict=True)
        layer = torch.ops.mkldnn._linear_pointwise
        if place:
            x, layer = x.contiguous(memory_format=LAST), torch.ops.mkldnn._convolution_pointwise
        for V, where in before:
            x = layer(x, V, None, *where, *PLAIN)
        if residual is None and activation == "silu":
            y, activation = layer(x, W, bias, *place, *SILU), "none"
        elif residual is None:
            y = layer(x, W, bias, *place, *PLAIN)
        elif not place:
            y = layer.binary(x, residual, W, bias, "add")
        elif in_place and before and residual.is_contiguous(memory_format=LAST):  # a single layer may read it as x
            y = torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, W, bias, *place, *SUM)
        else:
            y = layer.binary(x, residual.contiguous(memory_format=LAST), W, bias, *place, *SUM)
        y = IN_PLACE[activation](y)
        return y.contiguous(memory_format=wanted)
