"""Triton kernel of low-rank convolution and linear layers: two fused GEMMs, the rank-r intermediate in registers.

``y = act(conv1x1(conv(x, V), U) + bias + residual)``. One program computes T ``[BM pixels, r]`` as an implicit GEMM
over taps and channels, rounds it to the weights' dtype, as a stored intermediate would be, and multiplies it by U, BO
output channels at a time, with bias, residual and activation as epilogue. A linear layer is a 1 x 1 convolution of
one-pixel images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .lowrank import check
from .lowrank_limits import MAX_RANK, ROW

__all__ = ["TILES", "Tile", "lowrank_conv2d", "lowrank_kernel", "lowrank_linear", "tile_for"]


class Tile(NamedTuple):
    """Tile sizes of one program: BM pixels, BK channels per step of the first GEMM, BO output channels per step."""

    BM: int
    BK: int
    BO: int
    num_warps: int
    num_stages: int


# Arithmetic -> rank (rounded up) -> tiles, largest first. Each compiles without register spills and fits into shared
# memory on sm_80 to sm_120 (bench/results/gpu-kernels.md).
TILES: dict[str, dict[int, list[Tile]]] = {
    "half": {
        16: [Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(32, 64, 128, 4, 4)],
        32: [Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(32, 64, 128, 4, 4)],
        64: [Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4)],
        128: [Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 4)],
    },
    "tf32": {
        16: [Tile(128, 32, 64, 8, 4), Tile(64, 32, 64, 4, 4), Tile(32, 32, 64, 4, 4)],
        32: [Tile(128, 32, 64, 8, 3), Tile(64, 32, 64, 4, 4), Tile(32, 32, 64, 4, 4)],
        64: [Tile(128, 32, 64, 8, 3), Tile(64, 32, 64, 4, 3), Tile(32, 32, 64, 4, 4)],
        128: [Tile(128, 32, 32, 8, 2), Tile(64, 32, 32, 8, 3), Tile(32, 32, 32, 8, 3)],
    },
    "ieee": {
        16: [Tile(128, 32, 32, 8, 3), Tile(64, 32, 32, 4, 3), Tile(32, 32, 64, 4, 3)],
        32: [Tile(128, 32, 32, 8, 3), Tile(64, 32, 32, 8, 3), Tile(32, 32, 32, 4, 3)],
        64: [Tile(128, 16, 32, 8, 3), Tile(64, 32, 32, 8, 3), Tile(32, 32, 32, 8, 3)],
        128: [Tile(64, 16, 32, 8, 3), Tile(32, 16, 32, 4, 3)],
    },
}
assert max(TILES["half"]) == MAX_RANK


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # in this form NaN stays NaN
    if ACTIVATION == "relu6":
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    if ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    return y


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr):
    """a b + c, c in fp32.  Tensor cores truncate fp32 to tf32 (13 bits less), so operands are rounded to it first."""
    if PRECISION == "tf32":
        a, b = _nearest_tf32(a), _nearest_tf32(b)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(x):
    half = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    return tl.where(x == x, half, x)  # the integer sum may turn NaN into a number


@triton.jit
def lowrank_kernel(
    x,  # [N, C, H, W], channels contiguous
    V,  # [R, KH, KW, C], contiguous
    U,  # [O, P], contiguous; P: R rounded up, zero-padded
    bias,  # [O] or None
    residual,  # [M, O], contiguous, or None
    y,  # [M, O], contiguous; M = N OH OW
    M, R, H, W, OH, OW,
    C, O, P, x_n, x_h, x_w,  # divided by ALIGN
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # Triton infers alignment only from multiples of 16; these are multiples of ALIGN (8 halves fill a 16-byte load).
    C, O, P = C * ALIGN, O * ALIGN, P * ALIGN
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    pixel = m < M
    top = m // OW % OH * stride_h - pad_h
    left = m % OW * stride_w - pad_w
    n = m // (OH * OW)
    corner = x + (n.to(tl.int64) * x_n + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w) * ALIGN

    T = tl.zeros((BM, BR), tl.float32)
    for k in range(KH * KW * tl.cdiv(C, BK)):  # taps innermost: the next tap finds x in the L1 cache
        tap = k % (KH * KW)
        down, right = tap // KW * dilation_h, tap % KW * dilation_w
        c = k // (KH * KW) * BK + tl.arange(0, BK)
        inside = pixel & (top + down >= 0) & (top + down < H) & (left + right >= 0) & (left + right < W)
        a = tl.load(
            (corner + (down.to(tl.int64) * x_h + right.to(tl.int64) * x_w) * ALIGN)[:, None] + c[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
            cache_modifier=".ca" if KH * KW > 1 else ".cg",
        )
        v = tl.load(
            V + tap * C + r[None, :].to(tl.int64) * (KH * KW * C) + c[:, None],
            mask=(c < C)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        T = _product(a, v, T, PRECISION)

    T = T.to(U.dtype.element_ty)
    for first in range(tl.program_id(1) * BO, O, tl.num_programs(1) * BO):
        o = first + tl.arange(0, BO)
        u = tl.load(U + o[None, :].to(tl.int64) * P + r[:, None], mask=(r < P)[:, None] & (o < O)[None, :], other=0.0)
        part = _product(T, u, tl.zeros((BM, BO), tl.float32), PRECISION)
        if bias is not None:
            part += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        at, valid = m[:, None].to(tl.int64) * O + o[None, :], pixel[:, None] & (o < O)[None, :]
        if residual is not None:
            part += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(y + at, _activate(part, ACTIVATION).to(y.dtype.element_ty), mask=valid)


def lowrank_conv2d(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    """``y = act(conv1x1(conv(x, V), U) + bias + residual)`` in one kernel launch, output in channels_last.

    Args:
        x: ``[N, C, H, W]``, fp16, bf16 or fp32 (same for all tensors), any strides; no copy if channels are contiguous.
        V: ``[r, C, kh, kw]``, r at most 128.
        U: ``[O, r, 1, 1]``.
        bias: ``[O]``.
        residual: ``[N, O, OH, OW]``.
        activation: none, relu, relu6, silu or gelu (exact).

    Returns:
        ``[N, O, OH, OW]``, channels_last. Accumulates in fp32; fp32 inputs use tf32 if torch's convolutions do.

    Raises:
        ValueError: unknown activation.
        RuntimeError: shapes that do not fit each other.
    """
    check(activation)
    (r, _, KH, KW), O = V.shape, U.shape[0]
    axes = zip(x.shape[2:], (KH, KW), stride, padding, dilation, strict=True)
    shape = (x.shape[0], O, *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes))
    if min(shape[2:]) < 1:
        raise RuntimeError(f"lowrank_conv2d: a kernel of {KH} x {KW} does not fit an input of {list(x.shape)}")
    _want("lowrank_conv2d", "V", V, (r, x.shape[1], KH, KW))
    _want("lowrank_conv2d", "U", U, (O, r, 1, 1))
    _want("lowrank_conv2d", "bias", bias, (O,))
    _want("lowrank_conv2d", "residual", residual, shape)
    V = V.contiguous(memory_format=torch.channels_last)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if y.numel():
        precision = torch.backends.cudnn.conv.fp32_precision
        _launch(x, V, U.flatten(1), bias, residual, y, (*stride, *padding, *dilation), activation, precision)
    return y


def lowrank_linear(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``y = act((x V^T) U^T + bias + residual)`` in one kernel launch.

    Args:
        x: ``[..., C]``, fp16, bf16 or fp32 (same for all tensors).
        V: ``[r, C]``, r at most 128.
        U: ``[O, r]``.
        bias: ``[O]``.
        residual: ``[..., O]``.
        activation: as for :func:`lowrank_conv2d`.

    Returns:
        ``[..., O]``, contiguous. Accumulates in fp32; fp32 inputs use tf32 if torch's matrix products do.

    Raises:
        ValueError: unknown activation.
        RuntimeError: shapes that do not fit each other.
    """
    check(activation)
    (r, C), O = V.shape, U.shape[0]
    _want("lowrank_linear", "x", x, (*x.shape[:-1], C))
    _want("lowrank_linear", "U", U, (O, r))
    _want("lowrank_linear", "bias", bias, (O,))
    _want("lowrank_linear", "residual", residual, (*x.shape[:-1], O))
    y = torch.empty(*x.shape[:-1], O, dtype=x.dtype, device=x.device)
    if residual is not None:
        residual = residual.contiguous()
    if y.numel():
        x, V, out = x.reshape(-1, C, 1, 1), V.contiguous()[:, :, None, None], y.view(-1, O, 1, 1)
        precision = torch.backends.cuda.matmul.fp32_precision
        _launch(x, V, U, bias, residual, out, (1, 1, 0, 0, 1, 1), activation, precision)
    return y


def _want(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise RuntimeError(f"{op}: wanted {name} of shape {list(shape)}; got {list(tensor.shape)}")


def tile_for(kind: str, rank: int, pixels: int, multiprocessors: int) -> tuple[int, Tile, int]:
    """Rank rounded up, tile with the least loads on the busiest multiprocessor, and number of programs per tile.

    With fewer tiles than multiprocessors, several programs compute the same T and split its output channels.
    """
    BR = next(BR for BR in TILES[kind] if rank <= BR)

    def rows(tile: Tile) -> int:  # of x and V loaded by the busiest multiprocessor
        return triton.cdiv(triton.cdiv(pixels, tile.BM), multiprocessors) * (tile.BM + BR)

    tile = min(TILES[kind][BR], key=rows)
    return BR, tile, max(1, multiprocessors // triton.cdiv(pixels, tile.BM))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    x: Tensor,  # [N, C, H, W]
    V: Tensor,  # [r, C, kh, kw], channels_last
    U: Tensor,  # [O, r]
    bias: Tensor | None,  # [O]
    residual: Tensor | None,  # [N, O, OH, OW], channels_last
    y: Tensor,  # [N, O, OH, OW], channels_last, not empty
    geometry: tuple[int, ...],  # stride, padding, dilation
    activation: str,
    precision: str,
) -> None:
    (N, C, H, W), (r, _, KH, KW), (_, O, OH, OW) = x.shape, V.shape, y.shape
    full = ROW // x.itemsize
    align = full if C % full == 0 and O % full == 0 else 1
    if x.stride(1) != 1 or any(step % align for step in _strides(x)) or x.data_ptr() % ROW:
        x = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    U = F.pad(U, (0, -r % align)).contiguous()
    V, U, residual = (t if t is None or t.data_ptr() % ROW == 0 else t.clone() for t in (V, U, residual))
    kind = "half" if x.itemsize == 2 else "tf32" if precision == "tf32" else "ieee"
    BR, tile, sharing = tile_for(kind, r, N * OH * OW, _multiprocessors(x.device))
    grid = (triton.cdiv(N * OH * OW, tile.BM), min(sharing, triton.cdiv(O, tile.BO)))
    with torch.cuda.device_of(x):
        lowrank_kernel[grid](
            x, V, U, None if bias is None else bias.contiguous(), residual, y,
            N * OH * OW, r, H, W, OH, OW, *(n // align for n in (C, O, U.shape[1], *_strides(x))), *geometry,
            KH, KW, activation, "tf32" if kind == "tf32" else "ieee", align,
            tile.BM, tile.BK, tile.BO, BR, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _strides(x: Tensor) -> list[int]:
    """Strides of image, row and pixel; 0 along axes of size 1, where torch leaves the stride arbitrary."""
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 2, 3)]
