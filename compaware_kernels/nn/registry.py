"""Registry of low-rank layers: dense torch class -> low-rank class, and which layers must stay dense.

The factors of a low-rank layer are torch layers, so that hooks, quantization, export and optimizers work on them as on
any other. ``rank`` is per group: a grouped convolution has one factorization per group, all of the same rank.
"""

from __future__ import annotations

from torch import nn

from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .conv_transpose import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from .linear import LowRankLinear
from .lowrank import LowRank

__all__ = ["LOW_RANK", "low_rank_type", "read_by_parent", "why_dense"]

_CLASSES = (LowRankLinear, LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankConvTranspose1d, LowRankConvTranspose2d,
            LowRankConvTranspose3d)  # fmt: skip
LOW_RANK = {low_rank.dense: low_rank for low_rank in _CLASSES}


def why_dense(model: nn.Module, name: str) -> str:
    """Why the layer ``name`` of ``model`` cannot be factorized; "" if it can."""
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if type(layer) not in LOW_RANK:
        return f"a {type(layer).__name__} may use its weight in ways of its own"
    if isinstance(parent, LowRank):
        return "a factor of a low-rank layer; ck.to_dense(model) first, to cut its rank further"
    return read_by_parent(parent)


def read_by_parent(parent: nn.Module) -> str:
    """Why the layers inside ``parent`` must keep a ``weight``: it reads that, instead of calling them; "" otherwise."""
    reads = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    return f"nn.{type(parent).__name__} reads its weight directly" if reads else ""


def low_rank_type(layer: nn.Module) -> type[LowRank]:
    """The low-rank class that replaces a dense layer.

    Raises:
        TypeError: there is none; the layer is no Linear, convolution or transposed convolution.
    """
    for kind in type(layer).__mro__:  # a subclass that has a low-rank class of its own comes before its base
        if kind in LOW_RANK:
            return LOW_RANK[kind]
    raise TypeError(f"layer: wanted {', '.join(dense.__name__ for dense in LOW_RANK)}; got {type(layer).__name__}")
