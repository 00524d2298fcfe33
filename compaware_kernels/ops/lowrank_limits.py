"""Limits of the low-rank kernels (C++, Triton): arguments that they do not support, or run slower than two steps."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_RANK", "ROW", "cpu_cannot", "cpu_declines", "triton_declines"]

# Below these the CPU kernel was up to a third slower than two torch convolutions: columns are padded to multiples of
# 16, and each tap has an overhead (AMD EPYC with AVX-512, 1 thread, 3 to 32 channels, ranks 8 and 16, 56 x 56). For
# kernels larger than 1 x 1; the last for 4 x 4 and larger.
SMALLEST_CHANNELS, SMALLEST_RANK, SMALLEST_RANK_OF_LARGE = 16, 12, 24
# 1 x 1 layers of few channels on many pixels are bound by writing the output: 0.6x the speed of two steps (2 threads,
# 16 and 24 channels, 25,088 pixels; on 1,568 pixels they were 1.5x as fast).
THIN_CHANNELS, MANY_PIXELS = 32, 8192


MAX_RANK = 128  # of the Triton kernel: larger ranks do not fit into shared memory
MAX_PIXELS = 2**30  # of x: pixel indices are int32, with room for padding; offsets are int64
ROW = 16  # bytes of the widest load, to which rows of x, V, U and y are aligned


def cpu_declines(x: Tensor, V: Tensor, U: Tensor, groups: int = 1, fold: str = "paper") -> str:
    """Why the CPU kernel does not take these arguments, or is slower than two steps; "" if it is used.

    Args:
        x: ``[N, C, H, W]`` or ``[..., C]``.
        V: ``[G r, C/G, kh, kw]`` or ``[r, C]``.
        U: ``[O, r, 1, 1]`` or ``[O, r]``.
    """
    if torch.is_autocast_enabled("cpu"):
        return "autocast: the CPU kernel is for fp32"
    if x.dtype is not V.dtype:
        return f"the CPU kernel is for fp32; got {x.dtype} and weights of {V.dtype}"
    return cpu_cannot(x.dtype, V.ndim, fold) or ("" if V.ndim == 2 else _too_small(x, V, groups))


def cpu_cannot(dtype: torch.dtype, axes: int, fold: str) -> str:
    """Why the CPU kernel cannot run factors of this dtype with 2 or 4 axes, whatever their shapes; "" if it can."""
    if dtype is not torch.float32:
        return f"the CPU kernel is for fp32; got {dtype} and weights of {dtype}"
    return "" if axes == 2 or fold == "paper" else f"the second factor of fold {fold} is no 1 x 1"


def _too_small(x: Tensor, V: Tensor, groups: int) -> str:
    r, C, taps = V.shape[0] // groups, V.shape[1], V.shape[2] * V.shape[3]
    least = SMALLEST_RANK if taps < 16 else SMALLEST_RANK_OF_LARGE
    if taps == 1 and C < THIN_CHANNELS and x.shape[0] * x.shape[2] * x.shape[3] > MANY_PIXELS:
        return f"{C} channels on more than {MANY_PIXELS} pixels: two steps write faster"
    if taps == 1 or (r >= least and C >= SMALLEST_CHANNELS):
        return ""
    return f"{C} channels, rank {r} per group: two steps are faster below {SMALLEST_CHANNELS} channels or rank {least}"


def triton_declines(x: Tensor, V: Tensor, U: Tensor, groups: int = 1, fold: str = "paper") -> str:
    """Why the Triton kernel does not take these arguments; "" if it does.  Shapes as in :func:`cpu_declines`."""
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
