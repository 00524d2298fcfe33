"""For which arguments the C++ kernel of the low-rank layers (``csrc/cpu/lowrank.cpp``) is worth calling."""

from __future__ import annotations

import torch
from torch import Tensor

# Below these the CPU kernel was slower than two convolutions of torch, by up to a third: its columns count in sixteens,
# and every tap costs something (AMD EPYC with AVX-512, 1 thread, 3 to 32 channels, ranks 8 and 16, 56 x 56).
SMALLEST_CHANNELS, SMALLEST_RANK, SMALLEST_RANK_OF_LARGE = 16, 12, 24  # with kernels; of 4 x 4 and more
# And 1 x 1 layers of few channels on many pixels, which do little but write their output: 0.6x (2 threads, 16 and
# 24 channels, 25,088 pixels; on 1,568 pixels they were faster by half).
THIN_CHANNELS, MANY_PIXELS = 32, 8192


def declines(x: Tensor, V: Tensor, U: Tensor, groups: int = 1, fold: str = "paper") -> str:
    """Why two steps of plain PyTorch are as right and faster, in words; "" if they are not.

    Args:
        x: ``[N, C, H, W]`` or ``[..., C]``.
        V: ``[G r, C/G, kh, kw]`` or ``[r, C]``.
        U: ``[O, r, 1, 1]`` or ``[O, r]``.
    """
    if torch.is_autocast_enabled("cpu"):
        return "autocast: the CPU kernel is for fp32"
    if x.dtype is not torch.float32 or V.dtype is not torch.float32:
        return f"the CPU kernel is for fp32; got {x.dtype} and weights of {V.dtype}"
    if V.ndim == 2:
        return ""
    return _too_small(x, V, groups) if fold == "paper" else f"the second factor of fold {fold} is no 1 x 1"


def _too_small(x: Tensor, V: Tensor, groups: int) -> str:
    r, C, taps = V.shape[0] // groups, V.shape[1], V.shape[2] * V.shape[3]
    least = SMALLEST_RANK if taps < 16 else SMALLEST_RANK_OF_LARGE
    if taps == 1 and C < THIN_CHANNELS and x.shape[0] * x.shape[2] * x.shape[3] > MANY_PIXELS:
        return f"{C} channels on more than {MANY_PIXELS} pixels: two steps write faster"
    if taps == 1 or (r >= least and C >= SMALLEST_CHANNELS):
        return ""
    return f"{C} channels, rank {r} per group: two steps are faster below {SMALLEST_CHANNELS} channels or rank {least}"
