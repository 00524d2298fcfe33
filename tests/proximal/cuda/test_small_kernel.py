"""ck_small, SVT of a small matrix in one block, emulated: against fp64 and its own error bounds; races and bounds."""

import math

import numpy as np
import pytest
import torch

from compaware_kernels._utils.constants import constant
from compaware_kernels.proximal.jacobi import LOSS
from tests.emulation import emulator
from tests.emulation.emulator import Launch
from tests.helpers import cases, oracle
from tests.proximal.cuda.test_block_kernels import SANITIZERS, longest_first

pytestmark = [pytest.mark.emulation, pytest.mark.skipif(bool(emulator.missing), reason=emulator.missing)]

BYTES, COARSE = 96 * 1024, constant("kCoarse")  # BYTES: kSmallBytes
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # DType of csrc/core/shrink.h
BELOW, FP32, FP64, REFUSED = 0, 1, 2, 7
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 5), (12, 40), (33, 17), (64, 27), (64, 64), (16, 144), (300, 13)]
LARGEST = [(128, 64), (78, 78), (752, 16), (6142, 2), (12287, 1)]  # the largest shapes that fit
ALL_TYPES = pytest.mark.parametrize("dtype", TYPES, ids=str)
TOL = 1e-3


class Jobs:
    """One launch of ck_small, and its outputs."""

    def __init__(self, weights, taus, tol=TOL, refused=0, gamma=math.inf):
        self.weights, self.tol, self.gamma, count = weights, tol, gamma, len(weights)
        self.slope = torch.tensor([1 / (1 - 1 / gamma)], dtype=torch.float64)
        self.tau, self.refused = torch.tensor(taus, dtype=torch.float64), torch.tensor([refused], dtype=torch.int32)
        self.s = [torch.full((min(W.shape),), math.nan, dtype=torch.float64) for W in weights]
        self.error, self.rank, self.method = torch.full((3, count), math.nan, dtype=torch.float64)
        rows = []
        for i, W in enumerate(weights):
            tall = W if W.shape[0] >= W.shape[1] else W.mT
            out = [x[i : i + 1].data_ptr() for x in (self.error, self.rank, self.method)]
            row = [tall.data_ptr(), TYPES.index(W.dtype), *tall.shape, *tall.stride(), self.tau[i:].data_ptr()]
            rows.append([*row, self.slope.data_ptr(), self.s[i].data_ptr(), *out])
        self.table = torch.tensor(rows)

    def launch(self, threads=256):
        return Launch(
            "ck_small", len(self.weights), threads, BYTES, [self.table, len(self.weights), self.refused, self.tol]
        )

    def run(self, **launch):
        emulator.launch(*self.launch(**launch))
        return self


def check(W, P, tau, s, error, rank, method, tol=TOL, gamma=math.inf):
    """W: before the operator. For fp64 the error of NumPy's SVD is allowed in addition."""
    A, X, n, info = W.double().numpy(), P.double().numpy(), min(W.shape), torch.finfo(W.dtype)
    wanted = oracle.svt(A, tau) if math.isinf(gamma) else oracle.firm_svt(A, tau, gamma)
    norm, slope = np.linalg.norm(A), 1 / (1 - 1 / gamma)
    sigma = np.linalg.svd(A, compute_uv=False)
    truth = np.maximum(np.minimum(slope * (sigma - tau), sigma), 0)
    coarse = W.dtype == torch.float64 or COARSE * 2**-24 * 1.01 * norm > tol * tau / slope
    assert method == (BELOW if norm <= tau else FP64 if coarse else FP32)
    unit, lapack = 2.0**-24 if method == FP32 else 2.0**-53, 100 * 2**-53 * norm * slope
    tiny = (W.numel() ** 0.5) * info.smallest_normal * info.eps
    promised = 1.01 * (LOSS + n) * unit * norm * slope + info.eps / 2 * np.linalg.norm(wanted) + tiny
    assert np.linalg.norm(X - wanted) <= error + lapack
    if method == BELOW:
        assert error <= 2e-12 * norm * slope
    else:  # the bound includes the rounding to the dtype of W
        assert promised <= error * (1 + 1e-9) <= 1.02 * promised + tiny + info.eps * (slope - 1) * promised
    if tau > 0:  # rounding to the dtype of W is no error of the computation
        assert np.linalg.norm(X - wanted, 2) <= tol * tau + info.eps * np.linalg.norm(wanted) + tiny + lapack
    assert (s.diff() <= 0).all() and (s >= 0).all() and rank == (s > 0).sum()
    assert np.abs(s.numpy() - truth).max() <= 20 * unit * norm * slope + lapack


def check_all(weights, taus, **options):
    before = [W.clone() for W in weights]
    jobs = Jobs(weights, taus, **options).run()
    for i, W in enumerate(weights):
        found = [x[i].item() for x in (jobs.error, jobs.rank, jobs.method)]
        check(before[i], W, taus[i], jobs.s[i], *found, tol=jobs.tol, gamma=jobs.gamma)
    return jobs


def gaussian(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@ALL_TYPES
@pytest.mark.parametrize("spectrum", cases.SPECTRA)
def test_spectra(spectrum, dtype):
    for gamma in (math.inf, 2.0):
        weights = [torch.from_numpy(cases.matrix(shape, spectrum)).to(dtype) for shape in SHAPES]
        check_all(weights, [cases.TAU] * len(weights), gamma=gamma)


@ALL_TYPES
@pytest.mark.parametrize("gamma", [1.001, 1.2, 5.0, 1e9])
def test_firm_thresholds(gamma, dtype):
    for tau in (0, 1e-4, 0.5, 2, 7, 1e9):
        weights = [gaussian(shape, dtype) for shape in SHAPES]
        before = [W.clone() for W in weights]
        check_all(weights, [tau] * len(weights), gamma=gamma)
        if tau == 0 and dtype != torch.float64:
            assert all(map(torch.equal, weights, before))


def test_large_singular_values_stay_to_rounding():
    W = cases.with_spectrum(30, 12, torch.linspace(40, 20, 12)).float()
    P = W.clone()
    assert Jobs([P], [1.0], gamma=3.0).run().rank == 12 and (P - W).norm() <= 3e-6 * W.norm()


@ALL_TYPES
def test_thresholds(dtype):
    """Thresholds from below all singular values to above all, in fp64 where fp32 would be too coarse."""
    for tau in (0, 1e-9, 1e-4, 1e-3, 1, 7, 1e9):
        weights = [gaussian(shape, dtype) for shape in SHAPES]
        before = [W.clone() for W in weights]
        jobs = check_all(weights, [tau] * len(weights))
        if tau == 0 and dtype != torch.float64:
            assert all(map(torch.equal, weights, before)) and set(jobs.method.tolist()) == {FP64}
        if tau == 1e9:
            assert not any(W.any() for W in weights) and not jobs.error.any() and set(jobs.method.tolist()) == {BELOW}


@ALL_TYPES
def test_largest(dtype):
    check_all([gaussian(shape, dtype) for shape in LARGEST], [5.0] * len(LARGEST))


@ALL_TYPES
def test_zero_matrices(dtype):
    for tau in (0, 1):
        jobs = check_all([torch.zeros(shape, dtype=dtype) for shape in SHAPES], [tau] * len(SHAPES))
        assert not jobs.error.any() and set(jobs.method.tolist()) == {BELOW}


def test_fp64_to_the_last_bits():
    """Against long double, because NumPy's own error is as large."""
    worst = 0
    for shape, spectrum in (
        ((30, 9), None),
        ((16, 16), "log-spaced to 1e-9"),
        ((40, 12), "half zeros"),
        ((700, 3), None),
    ):
        W = gaussian(shape, torch.float64) if spectrum is None else torch.from_numpy(cases.matrix(shape, spectrum))
        for tau in (1e-6, 0.1, cases.TAU):
            rows, s = longest_first(W.mT)
            kept = s > tau
            U = rows[kept] / s[kept, None]
            wanted = (U.T * (1 - tau / s[kept])) @ (U @ W.numpy().astype(np.longdouble))
            P = W.clone()
            jobs = Jobs([P], [tau]).run()
            moved = float(np.linalg.norm((P.numpy() - wanted).astype(float)))
            worst = max(worst, moved / jobs.error.item())
            assert np.abs(jobs.s[0].numpy() - np.maximum(s - tau, 0)).max() <= 10 * 2**-53 * s[0]
    assert worst <= 0.6


@ALL_TYPES
def test_memory(dtype):
    """Views with any strides, aligned only to the element size; memory in between is not changed."""
    for views in (
        lambda M: M[1:31, 1:13],
        lambda M: M[1:31, 1:13].mT,
        lambda M: M.mT[3:12, 1:36],
        lambda M: M[::3, 1::2],
        lambda M: M.flatten()[1:391].view(30, 13),
    ):
        M = gaussian((37, 41), dtype)
        before, alone = M.clone(), views(M.clone()).clone(memory_format=torch.contiguous_format)
        check_all([views(M)], [3.0])
        check_all([alone], [3.0])
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6 if dtype == torch.float32 else 0
        assert (views(M) - alone).abs().max() <= tolerance * views(before).norm()
        views(M).copy_(views(before))
        assert torch.equal(M, before)


def test_scale():
    """Scaling by a power of two changes no bit, from subnormal weights to those whose squares overflow."""
    for dtype, exponents in ((torch.float32, (-140, -100, 60, 120)), (torch.float64, (-1000, -600, 500, 1000))):
        W = (8 * gaussian((20, 9), dtype)).round() / 8
        for exponent in exponents:
            first, scaled = W.clone(), (W.double() * 2.0**exponent).to(dtype)
            jobs = Jobs([first], [1.5]).run(), Jobs([scaled], [1.5 * 2.0**exponent]).run()
            assert torch.equal(scaled, (first.double() * 2.0**exponent).to(dtype)) and not torch.equal(first, W)
            assert torch.equal(jobs[1].s[0], jobs[0].s[0] * 2.0**exponent)
            assert jobs[0].rank == jobs[1].rank and jobs[0].method == jobs[1].method


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_subnormal_weights(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    check_all([(gaussian((20, 9)) * 8 * smallest).to(dtype)], [10 * smallest])


def test_a_matrix_does_not_depend_on_others_in_the_launch():
    weights = [gaussian((30, 12), seed=i) for i in range(3)] + [gaussian((30, 12), seed=1)]
    alone = [W.clone() for W in weights]
    check_all(weights, [3.0, 4.0, 5.0, 4.0])
    for W, tau in zip(alone, (3.0, 4.0, 5.0, 4.0), strict=True):
        Jobs([W], [tau]).run(threads=64)
    assert all(map(torch.equal, weights, alone)) and torch.equal(weights[1], weights[3])


def test_nonfinite_matrices_are_refused():
    """Nothing is written, neither to the matrix with NaN nor to any other."""
    weights = [gaussian((9, 4)), gaussian((5, 5))]
    weights[0][2, 2] = math.nan
    before = [W.clone() for W in weights]
    jobs = Jobs(weights, [1.0, 1.0], refused=1).run()
    assert all(torch.equal(W.nan_to_num(7), B.nan_to_num(7)) for W, B in zip(weights, before, strict=True))
    assert torch.cat([*jobs.s, jobs.error]).isnan().all()
    assert jobs.rank.tolist() == [-1, -1] and jobs.method.tolist() == [REFUSED, REFUSED]


def test_undetected_nan_terminates_and_stays_in_its_matrix():
    for value in (math.nan, math.inf):
        weights = [gaussian((9, 4)), gaussian((5, 5))]
        weights[0][2, 2] = value
        other = weights[1].clone()
        jobs = Jobs(weights, [1.0, 1.0]).run()
        check(other, weights[1], 1.0, jobs.s[1], *(x[1].item() for x in (jobs.error, jobs.rank, jobs.method)))
        assert not jobs.error[0] < math.inf


def test_tolerance_selects_fp64():
    for tol, method in ((1e-3, FP32), (1e-6, FP64)):
        jobs = check_all([gaussian((30, 12))], [1.0], tol=tol)
        assert jobs.method == method


@SANITIZERS
def test_no_races_and_nothing_out_of_bounds(sanitizer):
    weights = [
        gaussian((21, 10)),
        gaussian((4, 7), torch.bfloat16),
        gaussian((40, 3), torch.float64).mT,
        gaussian((5, 2)),
    ]
    taus = [3.0, 1.0, 2.0, 1e9]
    before = [W.clone() for W in weights]
    jobs = Jobs(weights, taus)
    tensors = [*weights, jobs.tau, jobs.slope, jobs.error, *jobs.s]
    emulator.sanitize(sanitizer, [jobs.launch(threads=64)], tensors)
    for i, W in enumerate(weights):
        check(before[i], W, taus[i], jobs.s[i], *(x[i].item() for x in (jobs.error, jobs.rank, jobs.method)))


def test_the_largest_shapes_fit_in_shared_memory():
    weights = [gaussian(shape, torch.float64) for shape in ((78, 78), (752, 16))]
    jobs = Jobs(weights, [10.0, 10.0])
    before = [W.clone() for W in weights]
    emulator.sanitize("address", [jobs.launch()], [*weights, jobs.tau, jobs.slope, jobs.error, *jobs.s])
    assert not any(map(torch.equal, weights, before))


@ALL_TYPES
def test_tau_zero(dtype):
    """W does not change in any bit; rank, singular values and bounds are still reported."""
    W = cases.with_spectrum(24, 20, torch.linspace(3, 0, 20)).to(dtype)
    jobs = Jobs([W.clone()], [0.0]).run()
    assert torch.equal(jobs.weights[0], W)
    check(W, jobs.weights[0], 0.0, jobs.s[0], *(x[0].item() for x in (jobs.error, jobs.rank, jobs.method)))
