"""Emulator of CUDA: correct kernels run as on a GPU, and each injected bug is detected by the right check."""

import re
import struct

import numpy as np
import pytest
import torch

from tests.emulation import emulator
from tests.emulation.emulator import launch, sanitize

pytestmark = [pytest.mark.emulation, pytest.mark.skipif(bool(emulator.missing), reason=emulator.missing)]

PLANTED = (emulator.ROOT / "tests/emulation/cxx/planted.cuh").read_text()
BUGS = re.findall(r"k[A-Z]\w+", re.search(r"enum Bug {(.*?)}", PLANTED, re.DOTALL)[1])
THREADS = 64


def reverse(bug="kNone", blocks=3, shared=4 * THREADS):
    x, y = torch.randn(blocks, THREADS), torch.zeros(blocks, THREADS)
    return [("ck_planted_reverse", blocks, THREADS, shared, [x, y, BUGS.index(bug)])], y, x.flip(1)


def static(bug="kNone"):
    x, y = torch.randn(64), torch.zeros(64)
    return [("ck_planted_static", 1, 64, 0, [x, y, BUGS.index(bug)])], y, x.flip(0)


def count(bug="kNone"):
    total = torch.zeros(1, dtype=torch.int32)
    return [("ck_planted_count", 4, 64, 0, [total, BUGS.index(bug)])], total, torch.tensor([256], dtype=torch.int32)


def last(bug="kNone"):
    partial, arrived = torch.zeros(9, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    wanted = torch.tensor([28, *range(8)])
    return [("ck_planted_last", 8, 32, 0, [partial, arrived, BUGS.index(bug)])], partial, wanted


def half_sum(bug="kNone"):
    x = torch.randint(-9, 9, (4, 16)).float()
    return [("ck_planted_half_sum", 1, 64, 0, [x, BUGS.index(bug)])], x, x.sum(1, keepdim=True).expand(4, 16).clone()


def neighbor(bug="kNone"):
    x, y = torch.randn(16, 2), torch.zeros(16, 2)
    return [("ck_planted_neighbor", 1, 32, 128, [x, y, BUGS.index(bug)])], y, x.flip(1)


def either():
    x = torch.zeros(16)
    return [("ck_planted_either", 1, 32, 0, [x])], x, torch.arange(16.0)


CASES = [reverse, static, count, last, half_sum, neighbor, either]


def run(how, launches):
    if how == "plain":
        for each in launches:
            launch(*each)
    else:
        sanitize(how, launches)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("together", [1, 3])
def test_right_kernels_are_right_in_any_order(seed, together, monkeypatch):
    monkeypatch.setenv("CK_EMU_SEED", str(seed))
    monkeypatch.setenv("CK_EMU_THREADS", str(together))
    for case in CASES:
        launches, result, wanted = case()
        run("plain", launches)
        assert torch.equal(result, wanted), case


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_right_kernels_pass_the_sanitizers(sanitizer):
    cases = [case() for case in CASES]
    sanitize(sanitizer, [each for launches, _, _ in cases for each in launches])
    assert all(torch.equal(result, wanted) for _, result, wanted in cases)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_pointers_in_tables_are_translated(sanitizer):
    x, y = torch.randn(2, 32), torch.zeros(2, 32)
    table = torch.tensor([[x[0].data_ptr(), y[1].data_ptr()], [x[1].data_ptr(), y[0].data_ptr()]])
    before = table.clone()
    for arg in (table, table.data_ptr()):
        sanitize(sanitizer, [("ck_planted_through", 2, 32, 0, [arg])], [x, y.zero_(), table])
        assert torch.equal(y, x.flip(0)) and torch.equal(table, before)


@pytest.mark.parametrize("case, bug, how, message", [
    (reverse, "kNoBarrier", "thread", r"data race(?s:.*)ck_planted_reverse .*planted.cuh:\d+"),
    (reverse, "kAhead", "thread", r"data race(?s:.*)ck_planted_reverse .*planted.cuh:\d+"),
    (neighbor, "kAhead", "thread", r"data race(?s:.*)ck_planted_neighbor .*planted.cuh:\d+"),
    (static, "kNoBarrier", "thread", r"data race(?s:.*)ck_planted_static .*planted.cuh:\d+"),
    (count, "kPlainSum", "thread", r"data race(?s:.*)ck_planted_count .*planted.cuh:\d+"),
    (last, "kNoFence", "thread", r"data race(?s:.*)ck_planted_last .*planted.cuh:\d+"),
    (neighbor, "kShuffleAsBarrier", "thread", r"data race(?s:.*)ck_planted_neighbor .*planted.cuh:\d+"),
    (reverse, "kTwoBarriers", "plain", r"divergent barrier.* \(32 threads \(1 3 5 7 ...\) at .*planted.cuh:\d+; 32"),
    (half_sum, "kForeignMask", "plain", r"a mask without the lane that gives it: lane 16"),
    (half_sum, "kHalfMask", "plain", r"lane 0 reads lane 8, which is not in the mask"),
    (half_sum, "kOutsideMask", "plain", r"lane 0 reads lane 16, which is not in the mask"),
    (half_sum, "kHalfWarp", "plain", r"deadlock.*, mask 0000ffff; 34 threads \(3 16-31 35 48-63\) exited"),
    (half_sum, "kTwoShuffles", "plain", r"lanes of one mask are at different warp operations"),
    (reverse, "kBeyond", "address", r"heap-buffer-overflow(?s:.*)ck_planted_reverse .*planted.cuh:\d+"),
    (static, "kBeyond", "address", r"planted.cuh:\d+:.*index 64 out of bounds"),
    (reverse, "kMisaligned", "address", r"planted.cuh:\d+:.*misaligned address"),
])  # fmt: skip
def test_an_injected_bug_is_detected(case, bug, how, message):
    launches, _, _ = case(bug)
    with pytest.raises(RuntimeError, match=message):
        run(how, launches)


@pytest.mark.parametrize("case", [reverse, static])
def test_unwritten_shared_memory_reads_as_nan(case):
    launches, result, wanted = case("kUnwritten")
    for _ in range(2):  # the second time, the first run's values must not be visible
        run("plain", launches)
        assert result.view(-1, 64)[:, 62].isnan().all() and torch.equal(
            result.isnan().sum(), torch.tensor(result.numel() // 64)
        )
        launch(*case()[0][0])


def test_too_little_shared_memory_is_detected():
    with pytest.raises(RuntimeError, match="heap-buffer-overflow"):
        sanitize("address", reverse(shared=4 * THREADS - 4)[0])


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_emulator_errors_are_raised_under_a_sanitizer(sanitizer):
    with pytest.raises(RuntimeError, match=r"(?m)^ck_planted_reverse: divergent barrier"):
        sanitize(sanitizer, reverse("kTwoBarriers", blocks=1)[0])


def test_invalid_launches():
    for grid, block, shared, message in [
        (0, 32, 0, "blocks; got 0"), (1, 1025, 0, "threads; got 1025"), (1, 32, 227 * 1024 + 1, "got 232449")
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            launch("ck_planted_count", grid, block, shared, [torch.zeros(1, dtype=torch.int32), 0])
    with pytest.raises(RuntimeError, match="ck_unknown: there is no such kernel"):
        launch("ck_unknown", 1, 32, 0, [])


@pytest.mark.parametrize("args", [[0], [0, 0, 0], [0, 0.0], [torch.zeros(1), torch.zeros(1)], [b"12345678", 0]])
def test_invalid_arguments(args):
    with pytest.raises(TypeError, match="ck_planted_count: wanted 'pi'"):
        launch("ck_planted_count", 1, 32, 0, args)
    with pytest.raises(TypeError, match="ck_planted_count: wanted 'pi'"):
        sanitize("thread", [("ck_planted_count", 1, 32, 0, args)])


def test_a_failed_launch_leaves_no_state():
    with pytest.raises(RuntimeError):
        run("plain", half_sum("kHalfWarp")[0])
    for case in CASES:
        launches, result, wanted = case()
        run("plain", launches)
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("width", [4, 16, 32])
@pytest.mark.parametrize("by", [1, 3, 5])
def test_shuffles_within_subwarps(width, by):
    out = torch.zeros(4, 32, dtype=torch.int32)
    launch("ck_shuffles", 1, 32, 0, [out, width, by])
    lane, first = torch.arange(32), torch.arange(32) // width * width
    last = first + width - 1
    up = torch.where(lane - by < first, lane, lane - by)
    down, xor = (torch.where(i > last, lane, i) for i in (lane + by, lane ^ by))
    wanted = [first + by % width, up, down, xor]
    assert torch.equal(out, torch.stack(wanted).int())


@pytest.mark.parametrize("yes", [[], [40], [3, 9, 50], range(32), range(64)])
def test_votes_and_atomics(yes):
    x, out = torch.zeros(64, dtype=torch.int32), torch.tensor([0] * 6 + [-1, 64, 0, 0], dtype=torch.int32)
    x[list(yes)] = 1
    launch("ck_votes", 1, 64, 0, [x, out])
    n, first = len(yes), sum(i < 32 for i in yes)
    bits = sum({1 << i % 31 for i in yes})
    wanted = [n > 0, n == 64, n, first, first > 0, first == 32, max(yes, default=-1), min(yes, default=64), n > 0, bits]
    assert out.tolist() == [int(i) for i in wanted]


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # as enum DType


def convert(x, to, wide):
    y = torch.empty(x.shape, dtype=to)
    launch("ck_convert", 2, 256, 0, [x, TYPES.index(x.dtype), y, TYPES.index(to), x.numel(), wide])
    return y


def same(x, y):
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x[~x.isnan()], y[~y.isnan()])


@pytest.mark.parametrize("dtype", TYPES[2:])
@pytest.mark.parametrize("wide", [0, 1])
def test_half_types_convert_as_in_torch(dtype, wide):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert all(same(convert(every, to, wide), every.to(to)) for to in TYPES)
    bits = torch.randint(-(2**31), 2**31, (9999,), dtype=torch.int64).to(torch.int32)
    some = torch.cat(
        [bits.view(torch.float32), torch.randn(9999), torch.tensor([65519.99, 65520, 3.3961776e38, 1e-45])]
    )
    assert same(convert(some, dtype, wide), some.to(dtype))


@pytest.mark.parametrize("dtype", TYPES[2:])
def test_fp64_is_rounded_once(dtype):
    """At the midpoint of two neighbors, and next to it by less than fp32 resolves."""
    # bit patterns of all finite numbers
    low = torch.arange(0x7BFF if dtype == torch.float16 else 0x7F7F).to(torch.int16)
    high = low + 1
    a, b = low.view(dtype).double(), high.view(dtype).double()
    middle, even = (a + b) / 2, torch.where(low % 2 == 0, low, high).view(dtype)
    for x, wanted in [
        (middle, even),
        (middle * (1 + 1e-15), high.view(dtype)),
        (middle * (1 - 1e-15), low.view(dtype)),
    ]:
        assert torch.equal(convert(x, dtype, 1), wanted) and torch.equal(convert(-x, dtype, 1), -wanted)


def shrink_jobs(weights):
    """ShrinkJobs of csrc/cuda/shrink.h: 341 jobs of 96 bytes each; and the number of blocks."""
    jobs, grid = [], 0
    for x, l1, tau in weights:
        steps = [(t.data_ptr() if t is not None else 0, t is not None and t.numel() > 1) for t in (l1, tau)]
        rows, span = x.shape[0] * x.shape[1], x.shape[2]
        jobs += [
            TYPES.index(x.dtype),
            x.data_ptr(),
            x.data_ptr(),
            x.shape[0],
            x[0].numel(),
            span,
            *sum(steps, ()),
            0,  # no bias
            grid,
        ]
        grid += (rows + 7) // 8 if span <= 1024 else rows
    return struct.pack("<q4092q", len(weights), *jobs, *[0] * (4092 - len(jobs))), grid


def shrunk(x, l1, tau):
    x = x.double().numpy()
    l1, tau = (t.view(-1, 1, 1).numpy() if t is not None else 0 for t in (l1, tau))
    x = np.sign(x) * np.maximum(np.abs(x) - l1, 0)
    norm = np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-300)
    return torch.from_numpy(x * np.maximum(1 - tau / norm, 0))


def ragged(sizes):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for (matrices, rows, columns), dtype in zip(sizes, dtypes, strict=True):
        x = torch.randn(matrices, rows, columns).to(dtype)
        yield x, torch.full((1,), 0.3, dtype=torch.float64), torch.rand(matrices, dtype=torch.float64) * columns**0.5
    yield torch.randn(1, 3, 5), torch.ones(1, dtype=torch.float64), None


@pytest.mark.parametrize("how", ["plain", "thread", "address"])
def test_the_shrink_kernel(how):
    weights = list(ragged([(2, 9, 5), (1, 3, 1030), (3, 1, 1024), (2, 1, 1500)]))
    wanted = [shrunk(*weight) for weight in weights]
    jobs, grid = shrink_jobs(weights)
    if how == "plain":
        launch("ck_shrink", grid, 256, 0, [jobs])
    else:
        sanitize(how, [("ck_shrink", grid, 256, 0, [jobs])], [t for weight in weights for t in weight if t is not None])
    for (x, _, _), y in zip(weights, wanted, strict=True):
        assert torch.allclose(x.double(), y, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-6), (x.dtype, x.shape)
