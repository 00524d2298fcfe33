"""small_svd, W = U diag(s) V^T for many small matrices: kernel and reference body against the fp64 truth."""

import math

import pytest
import torch

import compaware_kernels as ck
from compaware_kernels.ops import linalg
from tests.helpers import cases

info = ck.info()
kernel = pytest.mark.skipif(
    info["ops"]["small_svd"]["CPU"] != "C++ kernel",
    reason=f"no C++ kernel: {info['library']} ({info['build']['reason']})",
)
small_svd = torch.ops.compaware.small_svd
both_bodies = pytest.mark.parametrize(
    "svd", [pytest.param(small_svd, id="kernel", marks=kernel), pytest.param(linalg.small_svd._init_fn, id="reference")]
)
both_dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)

SHAPES = [
    (1, 1), (1, 9), (9, 1), (2, 2), (3, 2), (7, 13), (16, 16), (31, 37), (37, 31), (64, 5), (5, 64), (32, 32), (64, 64),
]  # fmt: skip
BATCHES = (1, 8, 19)  # less than a group of vector lanes, whole groups, and a remainder
EMPTY = [(0, 4, 3), (0, 3, 4), (2, 0, 5), (2, 5, 0), (0, 0, 0)]
SPECTRA = cases.SPECTRA | {"one 1e6": lambda k: [1e6] + [1.0] * (k - 1)}

# Limits in eps: ||U diag(s) V^T - W||_F / ||W||_F, the largest entry of U^T U - I and of V^T V - I, and the largest
# error of s over s_1. Twice what was measured here: 9.4, 21 and 12 for the kernel, 42, 52 and 9.5 for LAPACK.
KERNEL_LIMITS, REFERENCE_LIMITS = (19, 42, 24), (84, 104, 19)


def errors(W, U, s, V):
    """The three errors that are limited, for [B, m, n]."""
    eps = torch.finfo(W.dtype).eps
    W, U, s, V = (x.double() for x in (W, U, s, V))
    scale = W.abs().amax((-2, -1)).clamp_min(1e-300)  # so that the check itself does not overflow
    W, s = W / scale[:, None, None], s / scale[:, None]
    norm = torch.linalg.matrix_norm(W)
    residual = torch.linalg.matrix_norm(U * s[:, None] @ V.mT - W) / torch.where(norm > 0, norm, 1)
    eye = torch.eye(s.shape[1], dtype=s.dtype)
    skew = torch.stack([(x.mT @ x - eye).abs().amax() for x in (U, V)])
    truth = torch.linalg.svdvals(W)
    wrong = (s - truth).abs() / torch.where(norm > 0, truth[:, 0], 1)[:, None]
    return tuple(x.max().item() / eps for x in (residual, skew, wrong))


def check(svd, W):
    before, (U, s, V) = W.clone(), svd(W)
    B, m, n = W.shape
    k = min(m, n)
    assert torch.equal(W, before)
    assert [tuple(x.shape) for x in (U, s, V)] == [(B, m, k), (B, k), (B, n, k)]
    assert all(x.is_contiguous() and x.dtype == W.dtype for x in (U, s, V))
    assert (s >= 0).all() and (s.diff() <= 0).all()
    names = ("residual", "orthonormality", "singular values")
    limits = KERNEL_LIMITS if svd is small_svd else REFERENCE_LIMITS
    for name, got, limit in zip(names, errors(W, U, s, V), limits, strict=True):
        assert got <= limit, f"{name}: {got:.1f} eps, shape {(B, m, n)}"


def gaussian(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(shape, name, dtype, seed=0):
    *batch, m, n = shape
    U, _ = torch.linalg.qr(gaussian((*batch, m, min(m, n)), torch.float64, seed))
    V, _ = torch.linalg.qr(gaussian((*batch, n, min(m, n)), torch.float64, seed + 1))
    return (U * torch.tensor(list(SPECTRA[name](min(m, n))), dtype=torch.float64) @ V.mT).to(dtype)


@both_bodies
@both_dtypes
def test_shapes(svd, dtype):
    for shape in SHAPES:
        for B in BATCHES:
            check(svd, gaussian((B, *shape), dtype))


@both_bodies
@both_dtypes
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra(svd, dtype, spectrum):
    for shape in SHAPES:
        check(svd, with_spectrum((5, *shape), spectrum, dtype))


@both_bodies
@both_dtypes
def test_structure(svd, dtype):
    """Zeros and ties that are exact in the entries: pruned rows and columns, repeated columns, permutations, ones."""
    for m, n in SHAPES:
        W = gaussian((6, m, n), dtype)
        W[0, ::2] = 0
        W[1, :, 1::2] = 0
        W[2] = W[2, :, :1]
        W[3] = torch.eye(max(m, n), dtype=dtype).flip(0)[:m, :n]
        W[4] = 1
        W[5] *= torch.logspace(0, -30, n, dtype=dtype)
        check(svd, W)


@both_bodies
@both_dtypes
def test_empty(svd, dtype):
    for shape in EMPTY:
        B, m, n = shape
        U, s, V = svd(torch.zeros(shape, dtype=dtype))
        assert (U.shape, s.shape, V.shape) == ((B, m, min(m, n)), (B, min(m, n)), (B, n, min(m, n)))


@both_bodies
@both_dtypes
def test_strides(svd, dtype):
    W = gaussian((6, 12, 9), dtype)
    for V in (W.mT, W[::2], W[:, 1::3], W[:, :, ::2], W.flip(0), W.transpose(0, 1), W[:1].expand(5, -1, -1)):
        check(svd, V)


@kernel
@both_dtypes
def test_scale(dtype):
    """Scaling W by a power of two scales s and changes no bit of U and V; the squares of W under- and overflow."""
    W = gaussian((9, 8, 5), dtype)
    U, s, V = small_svd(W)
    largest = math.log2(torch.finfo(dtype).max)
    for exponent in (-0.7, -0.5, 0.5, 0.9):
        factor = 2.0 ** int(exponent * largest)
        got = small_svd(W * factor)
        assert torch.equal(got[0], U) and torch.equal(got[1], s * factor) and torch.equal(got[2], V)
    mixed = W * torch.logspace(-30, 30, 9, dtype=torch.float64)[:, None, None].to(dtype)
    check(small_svd, mixed)


@both_bodies
@both_dtypes
def test_vectors_of_the_shorter_side_times_s(svd, dtype):
    for shape in SHAPES:
        low, full = with_spectrum((19, *shape), "rank 1", dtype), gaussian((19, *shape), dtype)
        for W in (low, full, full * 2.0**80, full * 2.0**-80):
            U, s, V = svd(W, True)
            error, norm = (torch.linalg.matrix_norm(X.double()) for X in (U.double() @ V.double().mT - W, W))
            assert bool((error <= 84 * torch.finfo(dtype).eps * norm).all()), shape
            assert torch.equal(s, svd(W)[1]) or svd is not small_svd


@kernel
@both_dtypes
def test_a_matrix_does_not_depend_on_its_batch(dtype):
    W = torch.cat([gaussian((20, 12, 9), dtype), with_spectrum((20, 12, 9), "rank 1", dtype)])
    W = W[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    for scaled in (False, True):
        together, alone = small_svd(W, scaled), [small_svd(W[b : b + 1], scaled) for b in range(40)]
        for i in range(3):
            assert torch.equal(together[i], torch.cat([one[i] for one in alone]))


@kernel
@both_dtypes
def test_thread_count_does_not_change_a_bit(dtype):
    W, results, threads = gaussian((133, 11, 14), dtype), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(small_svd(W))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, first) for other in results[1:] for x, first in zip(other, results[0], strict=True))


@kernel
@both_dtypes
def test_nan_and_inf_terminate_and_stay_in_their_matrix(dtype):
    W = gaussian((5, 6, 4), dtype)
    good = small_svd(W)
    for value in (math.nan, math.inf, -math.inf):
        bad = W.clone()
        bad[2, 3, 1] = value
        others = [0, 1, 3, 4]
        assert all(torch.equal(x[others], y[others]) for x, y in zip(small_svd(bad), good, strict=True))


@kernel
def test_refusals():
    with pytest.raises(RuntimeError, match=r"W: wanted a batch of matrices, \[B, m, n\]; got 2 axes"):
        small_svd(torch.zeros(3, 4))
    for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64):
        with pytest.raises(RuntimeError, match="W: wanted fp64 or fp32; got"):
            small_svd(torch.zeros(1, 3, 4, dtype=dtype))


@both_dtypes
def test_opcheck(dtype):
    for shape in ((3, 5, 4), (3, 4, 5), (0, 4, 5), (2, 1, 1)):
        torch.library.opcheck(small_svd.default, (gaussian(shape, dtype),))
