"""Registry of low-rank layers: dense torch class -> low-rank class.

The factors of a low-rank layer are torch layers, so that hooks, quantization, export and optimizers work on them as on
any other. ``rank`` is per group: a grouped convolution has one factorization per group, all of the same rank.
"""

from __future__ import annotations

from torch import nn

from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .conv_transpose import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from .linear import LowRankLinear
from .lowrank import LowRank

__all__ = ["LOW_RANK", "low_rank_type"]

_CLASSES = (LowRankLinear, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankConvTranspose1d, LowRankConvTranspose2d,
            LowRankConvTranspose3d)  # fmt: skip
LOW_RANK = {low_rank.dense: low_rank for low_rank in _CLASSES}


def low_rank_type(layer: nn.Module) -> type[LowRank]:
    """The low-rank class that replaces a dense layer.

    Raises:
        TypeError: there is none; the layer is no Linear, convolution or transposed convolution.
    """
    for kind in type(layer).__mro__:  # a subclass that has a low-rank class of its own comes before its base
        if kind in LOW_RANK:
            return LOW_RANK[kind]
    raise TypeError(f"layer: wanted {', '.join(dense.__name__ for dense in LOW_RANK)}; got {type(layer).__name__}")
