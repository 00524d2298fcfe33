"""Device functions for one matrix per block (csrc/cuda/block.cuh, jacobi.cuh), emulated: against fp64, races,
bounds."""

import math

import numpy as np
import pytest
import torch

from tests.emulation import emulator
from tests.emulation.emulator import Launch
from tests.helpers.cases import with_spectrum

pytestmark = [pytest.mark.emulation, pytest.mark.skipif(bool(emulator.missing), reason=emulator.missing)]

EPS = torch.finfo(torch.float64).eps
SANITIZERS = pytest.mark.parametrize("sanitizer", ["thread", "address"])


def run(kernel, *args, grid=1, threads=256, shared=0):
    emulator.launch(kernel, grid, threads, shared, args)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- triangular factors ----------------------------------------------------------------------------------------------

SIZES = (1, 2, 15, 16, 17, 64, 136, 257)
SPECTRA = {  # singular values of B; those of G = B^T B reach down to 1e-9
    "flat": np.ones,
    "log-spaced": lambda n: np.logspace(0, -4.5, n),
    "ties": lambda n: np.resize([2.0, 1.0, 0.5], n),
    "half zeros": lambda n: np.where(np.arange(n) < (n + 1) // 2, np.linspace(2, 1, n), 0.0),
    "zero": np.zeros,
}


def factors(G, dependent=1e-10, threads=256):
    """Cholesky factor L of G and its inverse S; the half of G that must not be read is NaN."""
    n = len(G)
    L, S = torch.where(torch.ones(n, n).tril() > 0, G, math.nan), torch.full((n, n), math.nan, dtype=torch.float64)
    run("ck_case_cholesky", L, n, dependent, threads=threads)
    run("ck_case_inverse", L, n, S, threads=threads)
    return L, S


def check_factors(B, L, S, dropped=1e-10):
    """Check both against B; returns which columns are independent of those before."""
    G, n, independent = B.mT @ B, B.shape[1], L.diagonal() != 0
    condition = torch.linalg.cond(B[:, independent]).item() ** 2 if independent.any() else 0
    loss, wanted = EPS * (n + condition), torch.diag(independent.double())
    assert torch.equal(L, L.tril()) and torch.equal(S, S.triu()) and (L.diagonal() >= 0).all()
    assert not (L[:, ~independent].any() or S[:, ~independent].any() or S[~independent].any())
    assert (L @ L.mT - G).norm() <= max((n + 3) * EPS, dropped * (not independent.all())) * G.norm()
    assert (S.mT @ L - wanted)[:, independent].norm() <= loss
    assert ((B @ S).mT @ (B @ S) - wanted).norm() <= loss
    return independent


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("n", SIZES)
def test_factors(n, spectrum):
    s = SPECTRA[spectrum](n)
    B = with_spectrum(n + 5, n, s)
    independent = check_factors(B, *factors(B.mT @ B))
    assert independent.sum() == (s > 0).sum()


@pytest.mark.parametrize("n", (17, 136))
def test_dependent_columns(n):
    """Columns that are zero, copies or sums of earlier ones, or too small to be used."""
    B = normal(n + 5, n)
    B[:, 3], B[:, 7], B[:, -1] = 0, B[:, 2], B[:, 0] + B[:, 1]
    B[:, 9] = B[:, 4] + 1e-6 * B[:, 9]
    independent = check_factors(B, *factors(B.mT @ B), dropped=1e-6)
    assert (~independent).nonzero().flatten().tolist() == [3, 7, 9, n - 1]
    assert factors(B.mT @ B, dependent=1e-14)[0][9, 9] > 0


def test_scale_does_not_matter():
    B = normal(40, 33)
    L, S = factors(B.mT @ B)
    for scale in (2.0**-300, 2.0**300):
        scaled = factors(scale**2 * B.mT @ B)
        assert torch.equal(scaled[0], L * scale) and torch.equal(scaled[1], S / scale)


def test_nan_stays_in_its_column():
    B = normal(40, 33)
    G = B.mT @ B
    G[20, 20] = math.nan
    L, S = factors(G)
    assert L.isfinite().all() and S.isfinite().all() and not L[:, 20].any()
    rest = torch.arange(33) != 20
    L, S = L[rest][:, rest], S[rest][:, rest]
    check_factors(B[:, rest], L, S)


@pytest.mark.parametrize("n", (33, 257))
def test_thread_count_does_not_change_a_bit(n):
    B = normal(n + 5, n)
    first = factors(B.mT @ B)
    for threads in (32, 96, 512):
        again = factors(B.mT @ B, threads=threads)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("sanitizer, n", [("thread", 34), ("address", 34), ("address", 160)])
def test_factors_without_races(sanitizer, n):
    B = normal(2, n + 5, n)
    L, S = B.mT @ B, torch.full((2, n, n), math.nan, dtype=torch.float64)
    launches = [Launch("ck_case_cholesky", 2, 64, 0, [L, n, 1e-10]), Launch("ck_case_inverse", 2, 64, 0, [L, n, S])]
    emulator.sanitize(sanitizer, launches)
    for each in zip(B, L, S, strict=True):
        assert check_factors(*each).all()


# --- Jacobi ----------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
SHAPES = [(1, 1), (1, 9), (2, 1), (2, 2), (3, 2), (9, 4), (7, 13), (16, 16), (17, 40), (33, 33), (40, 30), (72, 72),
          (41, 136), (13, 200), (5, 700)]  # fmt: skip
ROW_SPECTRA = {
    "log-spaced": lambda k: np.logspace(0, -9, k),
    "ties": lambda k: np.resize([2.0, 1.0, 0.5, 0.25], k),
    "half zeros": lambda k: np.where(np.arange(k) < (k + 1) // 2, np.linspace(2, 1, k), 0.0),
    "rank 1": lambda k: np.eye(k)[0],
    "zero": np.zeros,
}


def jacobi(A, sweeps=40, threads=256, V=True):
    """Rows of A and the accumulated rotations after Jacobi, and the number of sweeps. Rows are not adjacent in
    memory."""
    (count, length), stride = A.shape, A.shape[1] + 3
    rows, turns = (torch.full((count, k + 3), 7, dtype=A.dtype) for k in (length, count))
    rows[:, :length], turns[:, :count] = A, torch.eye(count, dtype=A.dtype)
    used = torch.zeros(1, dtype=torch.int64)
    arguments = [rows, count, length, stride, turns if V else 0, count, count + 3, sweeps, 0, used]
    run(f"ck_case_jacobi{torch.finfo(A.dtype).bits}", *arguments, threads=threads)
    assert (rows[:, length:] == 7).all() and (turns[:, count:] == 7).all()
    return rows[:, :length].clone(), turns[:, :count].clone(), int(used)


def check_jacobi(A, rows, V):
    """Limits in eps; measured: at most 12 + sqrt(length) and 20."""
    eps, (count, length) = torch.finfo(A.dtype).eps, A.shape
    scale = A.abs().amax().double().clamp_min(1e-300)
    A, rows, V = A.double() / scale, rows.double() / scale, V.double()
    norms = torch.linalg.vector_norm(rows, dim=1)
    some = norms > 2**-98 * norms.max()  # no accuracy is promised for shorter rows
    N = torch.where(some[:, None], rows / norms[:, None], 0.0)
    skew = (N @ N.mT - torch.diag(some.double())).abs().max()
    assert skew <= eps * (2 * max(16, length) ** 0.5 + 4)
    truth = torch.zeros(count, dtype=torch.float64)
    truth[: min(count, length)] = torch.linalg.svdvals(A)
    assert (norms.sort(descending=True).values - truth).abs().max() <= 20 * eps * truth[0]
    assert torch.linalg.norm(V.mT @ rows - A) <= (20 + count / 4) * eps * torch.linalg.norm(A)
    assert (V @ V.mT - torch.eye(count)).abs().max() <= 20 * eps


@BOTH
@pytest.mark.parametrize("spectrum", ["normal", *ROW_SPECTRA])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jacobi(shape, spectrum, dtype):
    if spectrum == "normal":
        A = normal(*shape, dtype=dtype)
    else:
        A = with_spectrum(*shape, ROW_SPECTRA[spectrum](min(shape))).to(dtype)
    rows, V, used = jacobi(A)
    check_jacobi(A, rows, V)
    assert used <= {"normal": 14, "ties": 14, "zero": 0}.get(spectrum, 24)


@BOTH
def test_relative_accuracy(dtype):
    """Rows that differ by 30 orders of magnitude: each singular value is accurate to rounding, in any order of the
    rows."""
    A = normal(24, 30, dtype=dtype)
    for order in (
        torch.arange(24),
        torch.arange(24).flip(0),
        torch.randperm(24, generator=torch.Generator().manual_seed(0)),
    ):
        D = torch.logspace(0, -29, 24, dtype=torch.float64)[order].to(dtype)
        rows, V, used = jacobi(D[:, None] * A)
        wanted = torch.from_numpy(longest_first(D.double()[:, None] * A.double())[1].astype(float))
        found = torch.linalg.vector_norm(rows.double(), dim=1).sort(descending=True).values
        assert ((found - wanted) / wanted).abs().max() <= 60 * torch.finfo(dtype).eps
        N = rows.double() / torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
        assert (N @ N.mT - torch.eye(24)).abs().max() <= 20 * torch.finfo(dtype).eps
        assert used <= 12


def longest_first(A):
    """Reference: (rows of A, rotated until orthogonal, their norms), in long double, one pair at a time."""
    R = A.numpy().astype(np.longdouble)
    for _ in range(20):
        R = R[np.argsort(-np.linalg.norm(R.astype(float), axis=1))]
        for p in range(len(R)):
            for q in range(p + 1, len(R)):
                a, b, d = R[p] @ R[p], R[q] @ R[q], R[p] @ R[q]
                if d * d > 1e-38 * a * b:
                    zeta = (b - a) / (2 * d)
                    t = np.copysign(1, zeta) / (abs(zeta) + np.sqrt(1 + zeta * zeta))
                    R[p], R[q] = ((R[p] - t * R[q]) / np.sqrt(1 + t * t), (t * R[p] + R[q]) / np.sqrt(1 + t * t))
    norms = np.sqrt((R * R).sum(1))
    return R[np.argsort(-norms)], np.sort(norms)[::-1]


@BOTH
def test_powers_of_two_change_no_bit(dtype):
    A = normal(12, 20, dtype=dtype)
    rows, V, used = jacobi(A)
    largest = math.log2(torch.finfo(dtype).max)
    for exponent in (-0.75, -0.5, 0.5, 0.97):
        scale = 2.0 ** int(exponent * largest)
        again = jacobi(A * scale)
        assert torch.equal(again[0], rows * scale) and torch.equal(again[1], V) and again[2] == used


@BOTH
def test_orthogonal_rows_are_not_changed(dtype):
    A = torch.diag(torch.arange(40.0, 0, -1)).to(dtype)
    rows, V, used = jacobi(A)
    assert torch.equal(rows, A) and torch.equal(V, torch.eye(40, dtype=dtype)) and used == 0


@BOTH
def test_nan_terminates(dtype):
    for value in (math.nan, math.inf):
        A = normal(12, 9, dtype=dtype)
        A[3, 4] = value
        jacobi(A)


@BOTH
def test_neither_threads_nor_v_change_a_bit(dtype):
    for shape in ((37, 30), (13, 200), (5, 300)):
        A = normal(*shape, dtype=dtype)
        first = jacobi(A)
        for threads in (32, 128):
            assert all(torch.equal(x, y) for x, y in zip(first[:2], jacobi(A, threads=threads)[:2], strict=True))
        assert torch.equal(first[0], jacobi(A, V=False)[0])


@BOTH
def test_number_of_sweeps_is_limited(dtype):
    assert jacobi(normal(20, 20, dtype=dtype), sweeps=2)[2] == 2


@BOTH
@SANITIZERS
def test_jacobi_without_races(sanitizer, dtype):
    """In shared memory: groups of eight and of four rows, and rows too long for registers."""
    for count, length in ((21, 30), (11, 200), (3, 300)):
        A = normal(count, length, dtype=dtype)
        rows, V, used = A.clone(), torch.eye(count, dtype=dtype), torch.zeros(1, dtype=torch.int64)
        arguments = [rows, count, length, length, V, count, count, 3, 1, used]
        size = rows.numel() * rows.element_size()
        emulator.sanitize(sanitizer, [Launch(f"ck_case_jacobi{torch.finfo(dtype).bits}", 1, 64, size, arguments)])
        again = jacobi(A, sweeps=3, threads=64)
        assert torch.allclose(rows, again[0], atol=1e-5) and torch.allclose(V, again[1], atol=1e-5)


# --- sums, order, random numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", (32, 64, 256, 1024))
def test_sums(threads):
    x = -1 - torch.arange(777, dtype=torch.float64)
    sums, largest = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    run("ck_case_sums", x, 777, sums, largest, threads=threads)
    assert sums.tolist() == [x.sum(), x.square().sum()] and largest == -1
    x[5], x[6] = math.nan, 3
    run("ck_case_sums", x, 777, sums, largest, threads=threads)
    assert sums.isnan().all() and largest == 3


@SANITIZERS
def test_sums_without_races(sanitizer):
    sums, largest = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    emulator.sanitize(sanitizer, [Launch("ck_case_sums", 1, 128, 0, [normal(300), 300, sums, largest])])
    assert torch.equal(largest, normal(300).amax(0, keepdim=True))


@pytest.mark.parametrize("n", (1, 2, 136, 300))
def test_order(n):
    x = normal(n)
    x[1::3] = x[::3][: len(x[1::3])]
    x[::17] = math.nan
    x[5::40] = math.inf
    place = torch.full((n,), -1, dtype=torch.int32)
    run("ck_case_order", x, n, place)
    wanted = sorted(range(n), key=lambda i: (x[i].isnan().item(), -x[i].nan_to_num(0).item()))
    assert place[wanted].tolist() == list(range(n))


@pytest.mark.parametrize(
    "counter, key, wanted",
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0_A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox(counter, key, wanted):
    """Known answers of Random123."""
    words = torch.zeros(4, dtype=torch.int64)
    run("ck_case_philox", torch.tensor(counter), key, words, threads=32)
    assert " ".join(f"{word:08x}" for word in words.tolist()) == wanted


def normals(seed, call, stream, n=20000):
    x = torch.full((n,), math.nan, dtype=torch.float64)
    run("ck_case_normal", seed, call, stream, n, x)
    return x


def test_normal_numbers():
    x = normals(5, 1, 2)
    quantiles = torch.tensor([0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999], dtype=torch.float64)
    found = torch.stack([(x <= z).double().mean() for z in torch.special.ndtri(quantiles)])
    assert ((found - quantiles).abs() <= 5 * (quantiles * (1 - quantiles) / len(x)).sqrt()).all()
    assert abs(x.mean()) <= 5 / 20000**0.5 and x.unique().numel() == len(x)
    assert abs((x[1:] * x[:-1]).mean()) <= 5 / 20000**0.5 and abs((x[::2] * x[1::2]).mean()) <= 5 / 10000**0.5


def test_random_numbers_are_distinct():
    first = normals(5, 1, 2, 1000)
    assert torch.equal(first, normals(5, 1, 2, 1000)) and torch.equal(first[:10], normals(5, 1, 2, 10))
    for other in ((6, 1, 2), (5 + 2**40, 1, 2), (5, 2, 2), (5, 1, 3), (5, 1, ~2)):
        assert not torch.isin(first, normals(*other, 1000)).any()


def test_normal_numbers_come_from_philox():
    """Box-Muller transform of 53-bit uniform numbers."""
    words = torch.zeros(4, dtype=torch.int64)
    run("ck_case_philox", torch.tensor([3, 0, 2, 1]), 5, words, threads=32)
    w = words.tolist()
    u, v = ((w[0] << 32 | w[1]) >> 11) + 1, (w[2] << 32 | w[3]) >> 11
    radius, angle = math.sqrt(-2 * math.log(u / 2**53)), 2 * math.pi * v / 2**53
    wanted = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)], dtype=torch.float64)
    assert torch.allclose(normals(5, 1, 2, 8)[6:], wanted, rtol=1e-13)
