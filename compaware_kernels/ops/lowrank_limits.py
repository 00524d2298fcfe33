"""For which arguments the low-rank kernels, in C++ and in Triton, are worth calling.  Imports no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

# Below these the CPU kernel was slower than two convolutions of torch, by up to a third: its columns count in sixteens,
# and every tap costs something (AMD EPYC with AVX-512, 1 thread, 3 to 32 channels, ranks 8 and 16, 56 x 56).
SMALLEST_CHANNELS, SMALLEST_RANK, SMALLEST_RANK_OF_LARGE = 16, 12, 24  # with kernels; of 4 x 4 and more
# And 1 x 1 layers of few channels on many pixels, which do little but write their output: 0.6x (2 threads, 16 and
# 24 channels, 25,088 pixels; on 1,568 pixels they were faster by half).
THIN_CHANNELS, MANY_PIXELS = 32, 8192


MAX_RANK = 128  # of the Triton kernel: more does not fit on the chip
MAX_PIXELS = 2**30  # of x: pixels are counted in int32, and padding adds some; offsets are int64
ROW = 16  # bytes: the widest load; rows of x, V, U and y start at multiples of it


def cpu_declines(x: Tensor, V: Tensor, U: Tensor, groups: int = 1, fold: str = "paper") -> str:
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


def triton_declines(x: Tensor, V: Tensor, U: Tensor, groups: int = 1, fold: str = "paper") -> str:
    """Why the Triton kernel is not for these arguments, in words; "" if it is.  Shapes as :func:`cpu_declines`."""
    (r, C), O = V.shape[:2], U.shape[0]
    dtype, size = x.dtype, x.itemsize
    if not x.is_cuda:
        return f"a CUDA device is wanted; x is on {x.device}"
    if not dtype == V.dtype == U.dtype or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"one dtype of fp16, bf16 and fp32 is wanted; got {dtype}, {V.dtype}, {U.dtype}"
    if groups != 1 or fold != "paper":
        return f"groups 1 and fold paper are wanted; got {groups} and {fold}"
    if not 1 <= r <= MAX_RANK:
        return f"a rank of at most {MAX_RANK} is wanted: more does not fit on the chip; got {r}"
    if C * size % ROW or O * size % ROW:
        return f"channels in multiples of {ROW // size} are wanted: others load one by one; got {C} and {O}"
    if x.numel() > MAX_PIXELS * C:
        return f"at most {MAX_PIXELS} pixels are wanted; x is {list(x.shape)}"
    return ""
