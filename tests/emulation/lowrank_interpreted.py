"""The fused low-rank kernel in Triton's interpreter; run with TRITON_INTERPRET=1, on its own.

The truth is fp64; the bound is twice the error of two steps of plain torch in the same arithmetic.
"""

import importlib.util
import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from compaware_kernels._utils.dtypes import nearest_tf32
from compaware_kernels.ops import triton_lowrank
from compaware_kernels.ops.lowrank import ACTIVATIONS
from tests.emulation import triton_sim

pytestmark = pytest.mark.emulation

ARITHMETIC = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def conv(x, V, r, O, stride=(1, 1), padding=(0, 0), dilation=(1, 1), ends="br", activation="none"):
    """Sizes of a case: x [N, C, H, W], V [r, C, *V]; ends: b for a bias, r for a residual."""
    return SimpleNamespace(**locals())


CASES = {
    "strided": conv((2, 19, 13, 11), (3, 3), 33, 37, (2, 2), (1, 1), activation="gelu"),
    "tiny": conv((1, 5, 9, 8), (1, 1), 1, 3, ends=""),
    "oblong": conv((3, 7, 10, 12), (5, 2), 3, 50, (1, 3), (2, 0), (1, 2), "b", "silu"),
    "column": conv((2, 40, 7, 9), (3, 1), 17, 24, (1, 2), (1, 0), ends="r", activation="relu"),
    "pointwise": conv((2, 100, 9, 9), (1, 1), 100, 130, (2, 2), activation="relu6"),
    "dilated": conv((1, 24, 12, 12), (3, 3), 128, 72, (1, 1), (2, 2), (2, 2), "b", "relu"),
    "aligned": conv((2, 72, 8, 8), (3, 3), 24, 136, (1, 1), (1, 1), activation="relu"),
    "deep": conv((1, 256, 4, 4), (3, 3), 16, 16, padding=(1, 1), ends=""),
    "far padding": conv((1, 16, 3, 4), (3, 3), 16, 16, (2, 1), (4, 5), ends="b"),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """gpu(multiprocessors, seed, precision): properties of the simulated GPU that the launcher sees."""

    def set_up(multiprocessors=1, seed=0, precision="ieee"):
        monkeypatch.setattr(triton_lowrank, "_multiprocessors", lambda device: multiprocessors)
        monkeypatch.setattr(triton_sim, "seed", seed)
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = precision

    torch.manual_seed(0)
    set_up()
    return set_up


def tensors(case, dtype):
    """x, V, U, bias, residual; every sum of products has a variance of about one."""
    C, (kh, kw) = case.x[1], case.V
    V, U = torch.randn(case.r, C, kh, kw) / (C * kh * kw) ** 0.5, torch.randn(case.O, case.r, 1, 1) / case.r**0.5
    x, bias = torch.randn(case.x).to(memory_format=torch.channels_last), torch.randn(case.O)
    y = F.conv2d(F.conv2d(x, V, None, case.stride, case.padding, case.dilation), U)
    made = x, V, U, bias if "b" in case.ends else None, torch.randn_like(y) if "r" in case.ends else None
    return [None if t is None else t.to(dtype) for t in made]


def two_steps(case, x, V, U, bias, residual, rounded=lambda t: t):
    T = F.conv2d(rounded(x), rounded(V), None, case.stride, case.padding, case.dilation)
    y = F.conv2d(rounded(T), rounded(U), bias)
    return ACTIVATIONS[case.activation](y if residual is None else y + residual)


def fused(case, args, module=triton_lowrank):
    return module.lowrank_conv2d(*args, case.stride, case.padding, case.dilation, case.activation)


def double(args):
    return [None if t is None else t.double() for t in args]


def assert_close(got, truth, plain):
    """The error is at most twice that of plain torch (NaN fails)."""
    assert got.dtype == plain.dtype
    for size in (Tensor.norm, lambda error: error.abs().max()):
        error, bound = size(got - truth), 2 * size(plain - truth)
        assert error <= bound, f"error {error:.2e}, allowed {bound:.2e}"


def check(case, arithmetic, module=triton_lowrank):
    args = tensors(case, ARITHMETIC[arithmetic])
    rounded = nearest_tf32 if arithmetic == "tf32" else lambda t: t
    got = fused(case, args, module)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got, two_steps(case, *double(args)), two_steps(case, *args, rounded))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", CASES)
def test_values(name, arithmetic, gpu):
    gpu(precision="tf32" if arithmetic == "tf32" else "ieee")
    check(CASES[name], arithmetic)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(conv((1, 16, 6, 6), (1, 1), 8, 16, activation=activation), "fp32")


@pytest.mark.parametrize("multiprocessors", [2, 1000], ids=["middle tile", "smallest tile, shared"])
@pytest.mark.parametrize("name", ["strided", "aligned"])
def test_tiles(name, multiprocessors, gpu):
    gpu(multiprocessors)
    check(CASES[name], "bf16")


def test_program_order_does_not_matter(gpu):
    case = CASES["strided"]
    args, results = tensors(case, torch.float32), []
    for seed in range(4):
        gpu(multiprocessors=6, seed=seed)
        results.append(fused(case, args))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shape", [(130,), (2, 3, 19)], ids=str)
def test_linear(shape, arithmetic, gpu):
    gpu(precision="tf32" if arithmetic == "tf32" else "ieee")
    x, V, U = (
        torch.randn(*shape[:-1], 5, shape[-1]),
        torch.randn(9, shape[-1]) / shape[-1] ** 0.5,
        torch.randn(70, 9) / 3,
    )
    args = [t.to(ARITHMETIC[arithmetic]) for t in (x, V, U, torch.randn(70), torch.randn(*shape[:-1], 5, 70))]

    def two(x, V, U, bias, residual, rounded=lambda t: t):
        T = F.linear(rounded(x), rounded(V))
        return F.gelu(F.linear(rounded(T), rounded(U), bias) + residual)

    got = triton_lowrank.lowrank_linear(*args, activation="gelu")
    assert got.is_contiguous()
    assert_close(got, two(*double(args)), two(*args, nearest_tf32 if arithmetic == "tf32" else lambda t: t))


def test_any_strides():
    """NCHW, a crop, an expanded batch, a start that is not aligned to 16 bytes, strided channels."""
    case = conv((2, 16, 6, 7), (3, 3), 8, 16, padding=(1, 1))
    big = torch.randn(2, 20, 9, 9).to(memory_format=torch.channels_last)
    xs = [torch.randn(2, 16, 6, 7), big[:, :16, 2:8, 1:8], torch.randn(1, 16, 6, 7).expand(2, -1, -1, -1)]
    xs += [big[:, 1:17, 1:7, 2:9], torch.randn(2, 16, 6, 14)[..., ::2]]
    _, V, U, bias, residual = tensors(case, torch.float32)
    U, residual = torch.randn(16, 9, 1, 1)[:, 1:], residual.contiguous()
    for x in xs:
        args = x, V.to(memory_format=torch.channels_last), U, bias, residual
        assert_close(fused(case, args), two_steps(case, *double(args)), two_steps(case, *args))


def test_empty_outputs():
    V, U = torch.randn(4, 8, 1, 1), torch.randn(16, 4, 1, 1)
    assert triton_lowrank.lowrank_conv2d(torch.randn(0, 8, 3, 3), V, U).shape == (0, 16, 3, 3)
    assert triton_lowrank.lowrank_linear(torch.randn(2, 0, 8), V[:, :, 0, 0], U[:, :, 0, 0]).shape == (2, 0, 16)


def test_not_finite(gpu):
    """NaN passes every activation and stays in its output; unused pixels of a tile add nothing."""
    for activation in ACTIVATIONS:
        case = conv((1, 8, 6, 6), (3, 3), 4, 8, padding=(1, 1), activation=activation)
        args = tensors(case, torch.float32)
        args[0][0, 3, 0, 0] = torch.nan
        assert torch.equal(fused(case, args).isnan(), two_steps(case, *args).isnan())
        assert fused(case, args).isnan().sum() == 4 * 8


@pytest.mark.parametrize("C", [8, 7], ids=["aligned", "not aligned"])
def test_offsets_beyond_int32(C, tmp_path):
    """Images 2^30 elements apart, in pages of virtual memory that are never touched."""
    case, apart = conv((3, C, 3, 3), (3, 3), 8, 8, padding=(1, 1)), 2**30
    memory = torch.frombuffer(mmap.mmap(-1, 6 * apart + 4096), dtype=torch.float16)
    x, *rest = tensors(case, torch.float16)
    far = memory.as_strided(x.shape, (apart, 1, 3 * C, C)).copy_(x)
    assert torch.equal(fused(case, (far, *rest)), fused(case, (x, *rest)))
    planted = plant("n.to(tl.int64) * x_n + top.to(tl.int64)", "n * x_n * ALIGN // ALIGN + top.to(tl.int64)", tmp_path)
    with pytest.raises(Exception, match="int32 overflow"):
        fused(case, (far, *rest), planted)


@pytest.mark.parametrize("kind, rank, pixels, multiprocessors, BR, BM, sharing", [
    ("half", 1, 10**6, 132, 16, 128, 1),  # enough pixels for all multiprocessors: the largest tile
    # every program loads V: a few idle multiprocessors cost less than twice as many programs
    ("half", 128, 98 * 128, 132, 128, 128, 1),
    ("half", 17, 132 * 64, 132, 32, 64, 1),
    ("tf32", 64, 49, 132, 64, 32, 66),
    ("ieee", 128, 10**6, 1, 128, 64, 1),
])  # fmt: skip
def test_tile_for(kind, rank, pixels, multiprocessors, BR, BM, sharing):
    got = triton_lowrank.tile_for(kind, rank, pixels, multiprocessors)
    assert (got[0], got[1].BM, got[2]) == (BR, BM, sharing) and got[1] in triton_lowrank.TILES[kind][BR]


# --- the simulator ----------------------------------------------------------------------------------------------------


@triton.jit
def elementwise(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n)
    tl.store(z + i, tl.where(a < b, a * b + a, tl.maximum(a / b, -a)), mask=i < n)


@triton.jit
def copy(x, y, n, BOUND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n + BOUND)


@triton.jit
def unmasked(x, y):
    tl.store(y, tl.load(x + tl.num_programs(0)))


@triton.jit
def running_sum(y):
    i = tl.program_id(0)
    tl.store(y + i + 1, tl.load(y + i) + 1)  # needs the store of the program before


@triton.jit
def asserting(x, n):
    tl.device_assert(tl.load(x) < n, "too large")


@triton.jit
def total(x, y, BLOCK: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def test_bf16_is_rounded_as_torch_rounds():
    x, y = torch.randn(2, 1000, dtype=torch.bfloat16)
    z = torch.empty_like(x)
    elementwise[(1,)](x, y, z, 1000, 1024)
    assert torch.equal(z, torch.where(x < y, x * y + x, torch.maximum(x / y, -x)))


def test_tf32_is_simulated():
    a, b = torch.randn(2, 32, 32)
    errors = {}
    for precision in ("ieee", "tf32x3", "tf32"):
        c = torch.empty(32, 32)
        product[(1,)](a, b, c, precision)
        errors[precision] = (c - a.double() @ b.double()).abs().max()
    assert errors["tf32"] > 1e-4
    assert errors["ieee"] < 5e-6 and errors["tf32x3"] < 1e-5


@pytest.mark.parametrize("bound, n", [(1, 100), (0, 101)], ids=["store", "load"])
def test_an_access_past_the_end_is_out_of_bounds(bound, n):
    x, y = torch.randn(200)[:100], torch.empty(200)[:100]  # views: what follows them in memory is not theirs
    copy[(2,)](x, y, 100, 0, 64)
    assert torch.equal(x, y)
    with pytest.raises(Exception, match=rf"masked_{'store' if bound else 'load'} out of bounds in 1 of"):
        copy[(2,)](x, y, n, bound, 64)


def test_a_missing_mask_is_out_of_bounds():
    with pytest.raises(Exception, match="masked_load out of bounds"):
        unmasked[(3,)](torch.randn(3), torch.empty(1))


def test_a_race_shows_in_another_program_order(gpu):
    results = []
    for seed in range(4):
        gpu(seed=seed)
        y = torch.zeros(9)
        running_sum[(8,)](y)
        results.append(y)
    assert torch.equal(results[0], torch.arange(9.0))
    assert not any(torch.equal(result, results[0]) for result in results[1:])


def test_device_assert_raises():
    asserting[(1,)](torch.ones(1), 2)
    with pytest.raises(Exception, match="too large"):
        asserting[(1,)](torch.ones(1), 1)


@triton.jit
def count(x, y, OUT: tl.constexpr, BLOCK: tl.constexpr):
    tl.atomic_add(y + tl.load(x + tl.arange(0, BLOCK)) + OUT, 1.0)


def test_atomics():
    x, y = torch.tensor([0, 3, 3, 0]), torch.zeros(4)
    count[(2,)](x, y, 0, 4)
    assert y.tolist() == [4, 0, 0, 4]
    with pytest.raises(Exception, match="atomic_rmw out of bounds in 2 of 4"):
        count[(1,)](x, y, 1, 4)
    with pytest.raises(Exception, match="convert to fp32 first"):
        count[(1,)](x, y.bfloat16(), 0, 4)


def test_sums_in_bf16_are_refused():
    with pytest.raises(Exception, match="convert to fp32 first"):
        total[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.empty(1), 16)


# --- bugs injected into the kernel ------------------------------------------------------------------------------------

BUGS = {  # text replaced in the source, its replacement, and the case that detects it
    "a column past the right edge": ("left + right < W", "left + right <= W", "aligned", "fp32"),
    "a row past the top edge": ("top + down >= 0", "top + down >= -1", "aligned", "fp32"),
    "channels not masked": ("(c < C)[None, :]", "(c < C + BK)[None, :]", "strided", "fp32"),
    "ranks not masked": ("& (r < R)[None, :]", "", "strided", "fp32"),
    "one pixel too many": ("pixel = m < M", "pixel = m <= M", "strided", "fp32"),
    "outputs not masked": ("pixel[:, None] & (o < O)[None, :]", "pixel[:, None]", "strided", "fp32"),
    "sums in bf16": (
        "_product(a, v, T,",
        "_product(a, v, T.to(tl.bfloat16).to(tl.float32),",
        "deep",
        "bf16",
    ),
    "rows and columns swapped": (
        "tap // KW * dilation_h, tap % KW",
        "tap % KW * dilation_h, tap // KW",
        "aligned",
        "fp32",
    ),
    "no bias": ("if bias is not None", "if bias is None", "aligned", "fp32"),
    "tf32 not rounded": ("a, b = _nearest_tf32(a), _nearest_tf32(b)", "pass", "deep", "tf32"),
    "tf32 where fp32 is asked for": (
        "input_precision=PRECISION",
        'input_precision="tf32"',
        "aligned",
        "fp32",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_an_injected_bug_is_detected(bug, tmp_path, gpu):
    old, new, name, arithmetic = BUGS[bug]
    gpu(precision="tf32" if arithmetic == "tf32" else "ieee")
    planted = plant(old, new, tmp_path)
    with pytest.raises(Exception, match=r"error .* allowed|out of bounds"):
        check(CASES[name], arithmetic, planted)


def plant(old, new, folder):
    """The kernel's module with one text replaced in its source."""
    source = Path(triton_lowrank.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the source"
    path = folder / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("compaware_kernels.ops.planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._multiprocessors = triton_lowrank._multiprocessors
    return module
