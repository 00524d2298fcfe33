"""Triton kernel of :mod:`.matmul_program`: ragged matrix products ``[M, K] x [K, N]`` with dependencies, one launch.

A persistent program draws a ticket (the index of its next tile), spins until all tiles of the earlier stages of its
layer are done, computes the tile, and increments the layer's counter of finished tiles. Tickets are drawn in order, so
a program only ever waits for tiles that are already running: no deadlock.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["options", "program_kernel", "run"]

PROGRAMS = 4  # programs per multiprocessor: at least as many as fit
FIELDS = tl.constexpr(26)  # per problem: see Program.build in matmul_program.py
TYPES = tl.constexpr((tl.float32, tl.bfloat16, tl.float16, tl.float64))
VECTORS = tl.constexpr((4, 8, 8, 2))  # elements of each type in the widest load
# Layouts: any strides; contiguous columns; contiguous rows, or columns, aligned to whole vectors.
ANY, COLUMNS, ROW_VECTORS, COLUMN_VECTORS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _multiple(x, size: tl.constexpr):
    """x, known to be a multiple of size, in a form Triton can analyze: tl.multiple_of is lost on loaded values."""
    return x // size * size


@triton.jit
def _matrix(problem, i: tl.constexpr, step: tl.constexpr, TYPE: tl.constexpr, LAYOUT: tl.constexpr):
    """Pointer and two strides of an operand, with the alignment Triton needs for vectorized loads."""
    at = tl.load(problem + i).to(tl.pointer_type(TYPES[TYPE]))
    down, across = tl.load(problem + step), tl.load(problem + step + 1)
    VECTOR: tl.constexpr = VECTORS[TYPE]
    if LAYOUT >= ROW_VECTORS:
        at, down, across = tl.multiple_of(at, 16), _multiple(down, VECTOR), _multiple(across, VECTOR)
    if LAYOUT == ROW_VECTORS:
        across = across * 0 + 1
    if LAYOUT % 2 == 1:
        down = down * 0 + 1
    return at, down, across


@triton.jit
def _offsets(i, down, j, across, LAYOUT: tl.constexpr):
    """Offsets ``[len(i), len(j)]`` within a tile, in int32."""
    if LAYOUT == ROW_VECTORS:
        return i[:, None] * down.to(tl.int32) + j[None, :]
    elif LAYOUT == ANY:
        return i[:, None] * down.to(tl.int32) + j[None, :] * across.to(tl.int32)
    else:
        return i[:, None] + j[None, :] * across.to(tl.int32)


@triton.jit
def _tf32(x):
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _fp64(x):
    """x in fp64. The sum over one element hides 16-bit loads, for which the compiler fails on fp64 products."""
    NARROW: tl.constexpr = x.dtype.primitive_bitwidth == 16
    x = x.to(tl.float64)
    return tl.sum(x[:, :, None], 2) if NARROW else x


@triton.jit
def _multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b. bf16 and fp16 are exact in tf32; an fp32 operand beside them is split into two tf32 parts."""
    ACC: tl.constexpr = total.dtype
    A_PARTS: tl.constexpr = a.dtype.primitive_bitwidth // 16
    B_PARTS: tl.constexpr = b.dtype.primitive_bitwidth // 16
    if ACC.primitive_bitwidth == 64:
        return tl.dot(_fp64(a), _fp64(b), total, input_precision="ieee", out_dtype=ACC)
    elif min(A_PARTS, B_PARTS) > 1:
        return tl.dot(a.to(ACC), b.to(ACC), total, input_precision=PRECISION)
    elif B_PARTS > 1:
        b = b.to(ACC)
        near = _tf32(b)
        total = tl.dot(a.to(ACC), b - near, total, input_precision="tf32")
        return tl.dot(a.to(ACC), near, total, input_precision="tf32")
    elif A_PARTS > 1:
        a = a.to(ACC)
        near = _tf32(a)
        total = tl.dot(a - near, b.to(ACC), total, input_precision="tf32")
        return tl.dot(near, b.to(ACC), total, input_precision="tf32")
    else:
        return tl.dot(a.to(ACC), b.to(ACC), total, input_precision="tf32")


@triton.jit
def _size(problem, i: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    size = tl.load(problem + i).to(tl.int32)
    VECTOR: tl.constexpr = VECTORS[TYPE]
    return _multiple(size, VECTOR) if WHOLE else size


@triton.jit
def _product(problem, tile, total, PRECISION: tl.constexpr, LOOPS: tl.constexpr, INDEX: tl.constexpr):
    """total + A B of one tile ``[BM, BN]``, over all of K or one split of it."""
    LOOP: tl.constexpr = LOOPS[INDEX]
    A_TYPE: tl.constexpr = LOOP[1]
    A_LAYOUT: tl.constexpr = LOOP[2]
    B_TYPE: tl.constexpr = LOOP[3]
    B_LAYOUT: tl.constexpr = LOOP[4]
    BK: tl.constexpr = LOOP[5]
    BM: tl.constexpr = total.shape[0]
    BN: tl.constexpr = total.shape[1]
    M, N = _size(problem, 6, A_TYPE, A_LAYOUT == COLUMN_VECTORS), _size(problem, 7, B_TYPE, B_LAYOUT == ROW_VECTORS)
    K = _size(problem, 8, A_TYPE, A_LAYOUT == ROW_VECTORS)
    if B_LAYOUT == COLUMN_VECTORS:
        VECTOR: tl.constexpr = VECTORS[B_TYPE]
        K = _multiple(K, VECTOR)
    A, a_m, a_k = _matrix(problem, 0, 9, A_TYPE, A_LAYOUT)
    B, b_k, b_n = _matrix(problem, 1, 11, B_TYPE, B_LAYOUT)
    first_m, first_n = tl.load(tile + 1) * BM, tl.load(tile + 2) * BN
    length = tl.load(problem + 22).to(tl.int32) // BK * BK
    first_k = tl.load(tile + 3) * length
    A += first_m.to(tl.int64) * a_m + first_k.to(tl.int64) * a_k
    B += first_n.to(tl.int64) * b_n + first_k.to(tl.int64) * b_k

    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    a_at, b_at = _offsets(i, a_m, k, a_k, A_LAYOUT), _offsets(k, b_k, j, b_n, B_LAYOUT)
    inside_m, inside_n = i < M - first_m, j < N - first_n
    for at in range(first_k, min(K, first_k + length), BK):
        inside_k = k < K - at
        a = tl.load(A + a_at, mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        b = tl.load(B + b_at, mask=inside_k[:, None] & inside_n[None, :], other=0.0)
        total = _multiply(a, b, total, PRECISION)
        A += BK * a_k
        B += BK * b_k
    return total


@triton.jit
def _gather(problem, tile, total):
    """Split-K: store the partial tile; the last program to arrive reduces all partials in fixed order."""
    BM: tl.constexpr = total.shape[0]
    BN: tl.constexpr = total.shape[1]
    chunks, last = tl.load(problem + 23).to(tl.int32), True
    if chunks > 1:
        here = tl.load(tile + 1) * tl.cdiv(tl.load(problem + 7).to(tl.int32), BN) + tl.load(tile + 2)
        shares = tl.load(problem + 24).to(tl.pointer_type(total.dtype)) + (here * chunks).to(tl.int64) * (BM * BN)
        at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        tl.store(shares + tl.load(tile + 3) * (BM * BN) + at, total)
        tl.debug_barrier()
        arrivals = tl.load(problem + 25).to(tl.pointer_type(tl.int32)) + here
        last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == chunks - 1
        tl.debug_barrier()
        if last:
            tl.store(arrivals, 0)  # for the next launch
            total = tl.zeros((BM, BN), total.dtype)
            for _ in range(chunks):
                total += tl.load(shares + at)
                shares += BM * BN
    return total, last


@triton.jit
def _finish(problem, tile, total, ENDS: tl.constexpr, INDEX: tl.constexpr):
    """Epilogue of one tile: C = alpha total + beta D + gamma I."""
    END: tl.constexpr = ENDS[INDEX]
    C_TYPE: tl.constexpr = END[1]
    LAYOUT: tl.constexpr = END[2]
    BM: tl.constexpr = total.shape[0]
    BN: tl.constexpr = total.shape[1]
    M, N = tl.load(problem + 6).to(tl.int32), _size(problem, 7, C_TYPE, LAYOUT == ROW_VECTORS)
    m, n = tl.load(tile + 1) * BM, tl.load(tile + 2) * BN
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    inside = (i < M - m)[:, None] & (j < N - n)[None, :]
    given, coef = tl.load(problem + 4) != 0, tl.load(problem + 4).to(tl.pointer_type(tl.float64))
    total *= tl.load(coef, mask=given, other=1.0).to(total.dtype)
    beta = tl.load(coef + 1, mask=given & (tl.load(problem + 3) != 0), other=0.0).to(total.dtype)
    if beta != 0:
        D, d_m, d_n = _matrix(problem, 3, 15, C_TYPE, LAYOUT)
        D += m.to(tl.int64) * d_m + n.to(tl.int64) * d_n
        total += beta * tl.load(D + _offsets(i, d_m, j, d_n, LAYOUT), mask=inside, other=0.0).to(total.dtype)
    gamma = tl.load(coef + 2, mask=given, other=0.0).to(total.dtype)
    total += tl.where((m + i)[:, None] == (n + j)[None, :], gamma, 0.0)
    C, c_m, c_n = _matrix(problem, 2, 13, C_TYPE, LAYOUT)
    C += m.to(tl.int64) * c_m + n.to(tl.int64) * c_n
    tl.store(C + _offsets(i, c_m, j, c_n, LAYOUT), total.to(TYPES[C_TYPE]), mask=inside)


@triton.jit
def _tile(
    problem, tile,
    PRECISION: tl.constexpr, GROUPS: tl.constexpr, LOOPS: tl.constexpr, ENDS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile: accumulator type and size are set by GROUP, main loop and epilogue by the problem."""
    ACC: tl.constexpr = TYPES[GROUPS[GROUP][0]]
    BM: tl.constexpr = GROUPS[GROUP][1]
    BN: tl.constexpr = GROUPS[GROUP][2]
    total = tl.zeros((BM, BN), ACC)
    loop = tl.load(problem + 18)
    for i in tl.static_range(len(LOOPS)):
        if LOOPS[i][0] == GROUP:  # noqa: SIM102 (decided when it is compiled)
            if loop == i:
                total = _product(problem, tile, total, PRECISION, LOOPS, i)
    total, complete = _gather(problem, tile, total)
    if complete:
        end = tl.load(problem + 19)
        for i in tl.static_range(len(ENDS)):
            if ENDS[i][0] == GROUP:  # noqa: SIM102
                if end == i:
                    _finish(problem, tile, total, ENDS, i)


@triton.jit
def _counter(counters, problem):
    """Pointer to the finished-tile counter of the layer; recomputed at every use to save registers."""
    return counters + 1 + tl.load(problem + 20)


@triton.jit(do_not_specialize=["all_tiles"])
def program_kernel(
    problems,  # int64 [problems, FIELDS]
    tiles,  # int32 [tiles, 4]: problem; row, column and K split of the tile
    counters,  # int32 [1 + layers]: tickets drawn; finished tiles of each layer
    awake,  # int32 [1]: if 0, the kernel returns at once
    all_tiles,
    GROUPS: tl.constexpr,
    LOOPS: tl.constexpr,
    ENDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    last = tl.where(tl.load(awake) != 0, all_tiles, 0)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    while tl.condition(ticket < last, disable_licm=True):  # hoisted code would hold registers throughout
        tile = tiles + ticket.to(tl.int64) * 4
        problem = problems + tl.load(tile).to(tl.int64) * FIELDS
        wanted = tl.load(problem + 21)
        done = tl.full((), 0, tl.int32)
        while done < wanted:
            done = tl.atomic_add(_counter(counters, problem), 0, sem="acquire", scope="gpu")
        tl.debug_barrier()

        gate = tl.load(problem + 5)
        if tl.load(gate.to(tl.pointer_type(tl.int32)), mask=gate != 0, other=1) != 0:
            group = tl.load(problem + 17)
            for i in tl.static_range(len(GROUPS)):
                if group == i:
                    _tile(problem, tile, PRECISION, GROUPS, LOOPS, ENDS, i)
        tl.debug_barrier()
        tl.atomic_add(_counter(counters, problem), 1, sem="release", scope="gpu")
        ticket = tl.atomic_add(counters, 1, sem="relaxed")


def options(major: int) -> dict[str, int]:
    """Compile options by major compute capability; on 12.0, others spill registers."""
    return {"num_stages": 3} if major < 12 else {"num_stages": 2, "maxnreg": 255}


@cache
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """Number of multiprocessors of a device, and its major compute capability."""
    if device.type != "cuda":
        return 4, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def run(
    problems: Tensor, tiles: Tensor, counters: Tensor, awake: Tensor, kinds: tuple, precision: str, warps: int
) -> None:
    """Launch the products in the tables with PROGRAMS persistent programs per multiprocessor."""
    if len(tiles):
        count, major = _multiprocessors(problems.device)
        grid = (min(len(tiles), PROGRAMS * count),)
        arguments = (problems, tiles, counters, awake, len(tiles), *kinds, precision)
        with torch.cuda.device_of(problems):
            program_kernel[grid](*arguments, num_warps=warps, **options(major))
