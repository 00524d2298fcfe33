"""Many dense products, one after another where they must be, in one launch: what :class:`..gpu.program.Program` lists.

A Triton program takes a ticket, the number of its tile, waits until what comes before it in its layer is done,
multiplies, and says that it is done. Tickets are drawn in order: whoever waits, waits for one that already runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = tl.constexpr(24)  # of a problem: see ..gpu.program.Program.build
TYPES = tl.constexpr((tl.float32, tl.bfloat16, tl.float16, tl.float64))
VECTORS = tl.constexpr((4, 8, 8, 2))  # elements of each type in the widest load
SINGLE, BFLOAT16, HALF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _multiple(x, size: tl.constexpr):
    """What is a multiple already, in a form in which Triton sees it: it forgets tl.multiple_of where x was loaded."""
    return x // size * size


@triton.jit
def _matrix(problem, i: tl.constexpr, step: tl.constexpr, TYPE: tl.constexpr, LAYOUT: tl.constexpr):
    """The pointer and the two strides. What Triton knows of them lets it load whole vectors."""
    at = tl.load(problem + i).to(tl.pointer_type(TYPES[TYPE]))
    down, across = tl.load(problem + step), tl.load(problem + step + 1)
    VECTOR: tl.constexpr = VECTORS[TYPE]
    if LAYOUT > 2:
        at, down, across = tl.multiple_of(at, 16), _multiple(down, VECTOR), _multiple(across, VECTOR)
    if LAYOUT == 1 or LAYOUT == 3:
        across = across * 0 + 1
    if LAYOUT == 2 or LAYOUT == 4:
        down = down * 0 + 1
    return at, down, across


@triton.jit
def _offsets(i, down, j, across, LAYOUT: tl.constexpr):
    """Within a tile, in int32."""
    if LAYOUT == 1 or LAYOUT == 3:
        return i[:, None] * down.to(tl.int32) + j[None, :]
    elif LAYOUT == 2 or LAYOUT == 4:
        return i[:, None] + j[None, :] * across.to(tl.int32)
    else:
        return i[:, None] * down.to(tl.int32) + j[None, :] * across.to(tl.int32)


@triton.jit
def _tf32(x):
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(a, b, total, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b. bf16 and fp16 are tf32 as they are: of fp32 beside them, two parts in tf32 are all but the whole."""
    ACC: tl.constexpr = total.dtype
    A_HALF: tl.constexpr = A_TYPE % 3 != 0 and PRECISION != "wide"
    B_HALF: tl.constexpr = B_TYPE % 3 != 0 and PRECISION != "wide"
    a, b = a.to(ACC), b.to(ACC)
    if A_HALF and B_HALF:
        return tl.dot(a, b, total, input_precision="tf32")
    elif A_HALF:
        near = _tf32(b)
        return tl.dot(a, near, tl.dot(a, b - near, total, input_precision="tf32"), input_precision="tf32")
    elif B_HALF:
        near = _tf32(a)
        return tl.dot(near, b, tl.dot(a - near, b, total, input_precision="tf32"), input_precision="tf32")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _tile(problem, row, column, chunk, PRECISION: tl.constexpr, KINDS: tl.constexpr, INDEX: tl.constexpr):
    """One tile of C = alpha A B + beta D + gamma I, or its share of the sum: who comes last adds all shares, in order."""
    KIND: tl.constexpr = KINDS[INDEX]
    ACC: tl.constexpr = TYPES[KIND[0]]
    A_TYPE: tl.constexpr = KIND[1]
    A_LAYOUT: tl.constexpr = KIND[2]
    B_TYPE: tl.constexpr = KIND[3]
    B_LAYOUT: tl.constexpr = KIND[4]
    C_TYPE: tl.constexpr = KIND[5]
    C_LAYOUT: tl.constexpr = KIND[6]
    D_LAYOUT: tl.constexpr = KIND[7]
    BM: tl.constexpr = KIND[8]
    BN: tl.constexpr = KIND[9]
    BK: tl.constexpr = KIND[10]
    A_VECTOR: tl.constexpr = VECTORS[A_TYPE]
    B_VECTOR: tl.constexpr = VECTORS[B_TYPE]
    C_VECTOR: tl.constexpr = VECTORS[C_TYPE]
    M, N, K = tl.load(problem + 6).to(tl.int32), tl.load(problem + 7).to(tl.int32), tl.load(problem + 8).to(tl.int32)
    if A_LAYOUT == 4:
        M = _multiple(M, A_VECTOR)
    if B_LAYOUT == 3:
        N = _multiple(N, B_VECTOR)
    if C_LAYOUT == 3:
        N = _multiple(N, C_VECTOR)
    if A_LAYOUT == 3:
        K = _multiple(K, A_VECTOR)
    if B_LAYOUT == 4:
        K = _multiple(K, B_VECTOR)
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    first_m, first_n = row * BM, column * BN
    inside_m, inside_n = i < M - first_m, j < N - first_n
    length, chunks = tl.load(problem + 20).to(tl.int32) // BK * BK, tl.load(problem + 21).to(tl.int32)

    A, a_m, a_k = _matrix(problem, 0, 9, A_TYPE, A_LAYOUT)
    B, b_k, b_n = _matrix(problem, 1, 11, B_TYPE, B_LAYOUT)
    first_k = (chunk * length).to(tl.int64)
    A += first_m.to(tl.int64) * a_m + first_k * a_k
    B += first_n.to(tl.int64) * b_n + first_k * b_k
    a_at, b_at = _offsets(i, a_m, k, a_k, A_LAYOUT), _offsets(k, b_k, j, b_n, B_LAYOUT)
    total = tl.zeros((BM, BN), ACC)
    for at in range(chunk * length, min(K, (chunk + 1) * length), BK):
        inside_k = k < K - at
        a = tl.load(A + a_at, mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        b = tl.load(B + b_at, mask=inside_k[:, None] & inside_n[None, :], other=0.0)
        total = _multiply(a, b, total, A_TYPE, B_TYPE, PRECISION)
        A += BK * a_k
        B += BK * b_k

    here = row * tl.cdiv(N, BN) + column
    arrived = chunks - 1
    shares = tl.load(problem + 22).to(tl.pointer_type(ACC)) + (here * chunks).to(tl.int64) * (BM * BN)
    share_at = i[:, None] * BN + j[None, :]
    if chunks > 1:
        tl.store(shares + chunk * (BM * BN) + share_at, total)
        tl.debug_barrier()
        arrivals = tl.load(problem + 23).to(tl.pointer_type(tl.int32)) + here
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == chunks - 1:
            tl.store(arrivals, 0)  # for the next launch
            total = tl.zeros((BM, BN), ACC)
            for _ in range(chunks):
                total += tl.load(shares + share_at)
                shares += BM * BN

    if arrived == chunks - 1:
        coef = tl.load(problem + 4).to(tl.pointer_type(tl.float64))
        given = tl.load(problem + 4) != 0
        total *= tl.load(coef, mask=given, other=1.0).to(ACC)
        inside = inside_m[:, None] & inside_n[None, :]
        if D_LAYOUT >= 0:
            beta = tl.load(coef + 1, mask=given, other=0.0).to(ACC)
            D, d_m, d_n = _matrix(problem, 3, 15, C_TYPE, D_LAYOUT)
            D += first_m.to(tl.int64) * d_m + first_n.to(tl.int64) * d_n
            d = tl.load(D + _offsets(i, d_m, j, d_n, D_LAYOUT), mask=inside & (beta != 0), other=0.0)
            total += beta * d.to(ACC)
        gamma = tl.load(coef + 2, mask=given, other=0.0).to(ACC)
        total += tl.where((first_m + i)[:, None] == (first_n + j)[None, :], gamma, 0.0)
        C, c_m, c_n = _matrix(problem, 2, 13, C_TYPE, C_LAYOUT)
        C += first_m.to(tl.int64) * c_m + first_n.to(tl.int64) * c_n
        tl.store(C + _offsets(i, c_m, j, c_n, C_LAYOUT), total.to(TYPES[C_TYPE]), mask=inside)


@triton.jit
def program_kernel(
    problems,  # int64 [problems, FIELDS]
    tiles,  # int32 [tiles, 4]: problem; row, column and share of the tile
    counters,  # int32 [1 + layers]: tickets drawn; tiles done of each layer
    KINDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tiles + tl.atomic_add(counters, 1, sem="relaxed").to(tl.int64) * 4
    problem = problems + tl.load(tile).to(tl.int64) * FIELDS
    counter, wanted = counters + 1 + tl.load(problem + 18), tl.load(problem + 19)
    done = tl.full((), 0, tl.int32)
    while done < wanted:
        done = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()

    gate = tl.load(problem + 5)
    if tl.load(gate.to(tl.pointer_type(tl.int32)), mask=gate != 0, other=1) != 0:
        kind = tl.load(problem + 17)
        row, column, chunk = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        for i in tl.static_range(len(KINDS)):
            if kind == i:
                _tile(problem, row, column, chunk, PRECISION, KINDS, i)
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


def run(problems: Tensor, tiles: Tensor, counters: Tensor, kinds: tuple, precision: str) -> None:
    """Launch what the tables list."""
    if len(tiles):
        with torch.cuda.device_of(problems):
            program_kernel[(len(tiles),)](problems, tiles, counters, kinds, precision, num_warps=4, num_stages=3)
