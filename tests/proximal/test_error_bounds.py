"""Probabilistic error bounds: random probes, norm estimates, fp64 products."""

import math

import pytest
import torch

from compaware_kernels.ops import linalg
from compaware_kernels.proximal import error_bounds
from compaware_kernels.proximal.spectral_functions import SoftThreshold
from compaware_kernels.proximal.subspace_iteration import MARGIN, Subspace
from tests.helpers.cases import with_spectrum


def test_probes_fail_as_rarely_as_predicted():
    from scipy.stats import chi2

    c = 1 / (error_bounds._factor(error_bounds.PROBES) ** 2 * error_bounds.PROBES)
    assert 1e-14 < chi2.cdf(c * error_bounds.PROBES, error_bounds.PROBES) <= error_bounds.FAILURE


@pytest.mark.parametrize("decay", [0.0, 0.5, 3.0])
def test_norms_from_probes_are_upper_bounds(decay):
    R = with_spectrum(80, 60, torch.arange(1.0, 61) ** -decay)
    for seed in range(50):
        y = torch.randn(60, error_bounds.PROBES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for power in range(1, 6):
            y = R @ y if power % 2 else R.mT @ y
            bound = error_bounds.norm_from_log(math.log(float(y.norm())), error_bounds.PROBES, power)
            assert bound >= (R.norm() if power == 1 else 1.0)
            assert power > 1 or error_bounds.norm_from_probes(y) == pytest.approx(bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_in_fp64(dtype):
    for m, n, p in ((1, 1, 1), (7, 5, 3), (64, 33, 24), (1000, 600, 40), (0, 4, 2), (4, 0, 2), (5, 4, 0)):
        X, Y = torch.randn(m, n).to(dtype), torch.randn(n, p)
        for A in (X, X.mT.contiguous().mT, torch.randn(2 * m, 2 * n).to(dtype)[::2, ::2]):
            for B in (Y, Y.double(), Y.mT.contiguous().mT):
                wanted = A.double() @ B.double()
                got = torch.ops.compaware.wide_product(A, B)
                assert got.dtype == torch.float64
                torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-12)
    with pytest.raises(RuntimeError, match="wanted"):
        torch.ops.compaware.wide_product(torch.randn(2, 3), torch.randn(2, 3))


def test_wide_product_of_any_strides():
    for m, n, p in ((300, 200, 40), (200, 300, 24), (5, 4, 3)):
        A, B = torch.randn(m, n), torch.randn(n, p)
        for X in (A, A.mT.contiguous().mT):
            for Y in (B, B.mT.contiguous().mT):
                torch.testing.assert_close(linalg.product(X, Y), A @ B, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_spectral_norm_estimates_are_rarely_too_small(rank):
    """With the documented margin, in a thousand draws; for one direction as for many."""
    R = with_spectrum(80, 60, torch.ones(rank))
    small = 0
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        sketch = R @ torch.randn(60, error_bounds.PROBES, generator=generator, dtype=torch.float64)
        small += MARGIN * error_bounds.spectral_estimates((sketch.mT @ sketch)[None])[0] < 1
    assert small <= 3


def test_two_parts_below_the_threshold_may_exceed_it_together():
    """A singular pair just below the threshold, and the rest orthogonal to it: sqrt(0.8^2 + 0.7^2) > 1."""
    V = torch.eye(6, 2, dtype=torch.float64)
    search = Subspace(
        torch.eye(6).double(), 1.0, V, 1e-3, torch.Generator(), max_columns=3, slack=0.01, square=6.0,
        gain=SoftThreshold(1.0).gain,
    )  # fmt: skip
    search.mu, search.checked, search.rho = [3.0, 0.8, 0.1], 1, 0.7
    sketch = error_bounds.Sketch(bound=0.02, spectral=0.0, columns=torch.zeros(1), missing=0.0)
    assert search._tail(sketch) == pytest.approx(math.hypot(0.8, 0.7) + 0.03 - 1)
    search.mu, search.rho = [3.0], 1.01
    assert search._tail(sketch) == math.inf
