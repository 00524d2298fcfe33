"""Matrices at the ends of the range of their dtype: right within the bound, or refused before anything changes."""

import copy
import math

import numpy as np
import pytest
import torch

import compaware_kernels as ck
from compaware_kernels.ops import shrinkage
from compaware_kernels.proximal.error_bounds import norms, rescale, unit_exponent
from compaware_kernels.proximal.spectral_functions import WeightedThreshold
from tests.helpers import oracle
from tests.helpers.marks import slow_but
from tests.proximal import hunt

SCALES = [1e-320, 1e-310, 1e-300, 1e-200, 1e-160, 1e150, 1e200, 1e300, 5e307]
LARGEST = {torch.float16: 65504.0, torch.bfloat16: 3.38e38, torch.float32: 3.4e38}


@pytest.mark.parametrize("part", slow_but([0], range(6)))
def test_hunt(part):
    """Scales and thresholds at the ends of the range of every dtype, on every route."""
    for seed in range(9_000_000 + 60 * part, 9_000_060 + 60 * part):
        holds, _, message = hunt.check(hunt.case(seed, extreme=True))
        assert holds, (seed, message)


@pytest.mark.parametrize("shape", [(12, 9), (120, 90), (300, 200)], ids=str)
@pytest.mark.parametrize("op", ["svt_", "firm_svt_", "spectral_ball_", "truncate_", "weighted_svt_", "svt", "firm_svt"])
def test_fp64_down_to_subnormal_numbers(op, shape):
    """Error 25 at a bound of 1e-11, in these units, before matrices were scaled."""
    generator = torch.Generator().manual_seed(0)
    for exponent in (-970, -1020, -1030, -1060, 1015):
        W = torch.ldexp(torch.randn(shape, generator=generator, dtype=torch.float64), torch.tensor(exponent // 2))
        W = torch.ldexp(W, torch.tensor(exponent - exponent // 2))
        tau = math.ldexp(3.0, exponent)
        parameter = {"truncate_": 3, "weighted_svt_": torch.full((min(shape),), tau, dtype=torch.float64)}.get(op, tau)
        kwargs = {"tol": 1e-3, "fold": None} | ({"gamma": 2.0} if "firm" in op else {})
        for forced in (False, True):
            holds, _, message = hunt.check(hunt.Case(op, op, [[W]], [parameter], kwargs, forced=forced))
            assert holds, (exponent, message)


@pytest.mark.parametrize("shape", [(8, 6), (60, 40)], ids=str)
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_a_result_beyond_the_range_is_refused(dtype, shape):
    """The entries of a truncation can be larger than those of the matrix."""
    signs = torch.sign(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    W, A, state = (LARGEST[dtype] * signs.double()).to(dtype), torch.randn(30, 20), ck.WarmState(seed=2)
    ck.truncate_([torch.randn(300, 200)], 4, state=state, names=["other"])
    before, was = [A.clone(), W.clone()], copy.deepcopy(state.state_dict())
    assert W.isfinite().all()
    with pytest.raises(ValueError, match=rf"^weights\[1\]: wanted a result that fits {dtype}; .*nothing was changed"):
        ck.truncate_([A, W], 1, state=state)
    now = state.state_dict()
    assert torch.equal(A, before[0]) and torch.equal(W, before[1])
    assert now["calls"] == was["calls"] and now["bases"].keys() == was["bases"].keys()
    assert all(torch.equal(V, was["bases"][key]) for key, V in now["bases"].items())
    (info,) = ck.spectral_ball_([W], LARGEST[dtype])  # its entries are at most the radius
    assert W.isfinite().all() and info.error_bound < math.inf


@pytest.mark.parametrize("shape", [(8, 6), (60, 40)], ids=str)
def test_singular_values_beyond_fp64_are_refused(shape):
    W = torch.full(shape, 1.7e308, dtype=torch.float64)
    for call in (lambda: ck.svt_([W], 1.0), lambda: ck.truncate_([W], 1), lambda: ck.spectral_ball_([W], 1.0)):
        with pytest.raises(ValueError, match=r"^weights\[0\]: wanted singular values that fp64 can hold"):
            call()
        assert (W == 1.7e308).all()
    P, info = ck.svt(W, 1.0, return_info=True)
    assert info.error_bound == math.inf and P.shape == W.shape


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_the_functional_form_says_that_a_result_is_beyond_the_range(dtype):
    W = (LARGEST[dtype] * torch.sign(torch.randn(60, 40, generator=torch.Generator().manual_seed(0))).double()).to(
        dtype
    )
    tau = 0.5 * float(torch.linalg.matrix_norm(W.double(), 2))
    P, info = ck.firm_svt(W, min(tau, 3e38), 1.001, return_info=True)
    assert bool(P.isfinite().all()) is (float(info.error_bound) < math.inf)
    assert not bool(P.isnan().any())


def test_gradients_do_not_depend_on_the_scale():
    W = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    G, wanted = torch.randn(2, 7, 5, dtype=torch.float64), None
    for exponent in (0, -1000, 1000):
        X = rescale(W, exponent).requires_grad_()
        for op in (lambda X, tau: ck.svt(X, tau), lambda X, tau: ck.firm_svt(X, tau, 3.0)):
            (grad,) = torch.autograd.grad((op(X, rescale(0.7, exponent)) * G).sum(), X)
            assert grad.isfinite().all()
        wanted = grad if wanted is None else wanted
        torch.testing.assert_close(grad, wanted)


def test_subnormal_entries_that_lapack_cannot_take():
    """eigh in fp32 gives eigenvectors with NaN for some matrices with subnormal entries."""
    holds, _, message = hunt.check(hunt.Case("rows", "firm_svt_", [[_scaled_rows()]], [1.376], {
        "tol": 1e-4, "fold": None, "gamma": 2.0}, forced=True))  # fmt: skip
    assert holds, message


def _scaled_rows():
    rng = np.random.default_rng(0)
    return torch.tensor(rng.standard_normal((34, 38)) * 10 ** rng.uniform(-40, 0, (34, 1))).float()


def test_a_factorization_with_nan_is_none(monkeypatch):
    W, eigh = torch.randn(120, 90, generator=torch.Generator().manual_seed(0)), torch.linalg.eigh

    def broken(G):
        w, V = eigh(G)
        if G.dtype == torch.float32:
            V[0, 0] = torch.nan
        return torch.return_types.linalg_eigh((w, V))

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    X = W.clone()
    (info,) = ck.svt_([X], 3.0)
    assert info.method == "gram, fp64" and float((X - ck.svt(W.double(), 3.0)).norm()) <= float(info.error_bound)


@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_fp64_whose_squares_leave_the_range(scale):
    """Group lasso: 50 to 75 % of the entries were wrong, or not shrunk at all."""
    W = scale * torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-1, 1)
    W[1] = 0
    e = -math.frexp(scale)[1]
    for share in (0.5, 3.0, 6.0):
        tau = min(share * scale, 1.7e308)
        up = rescale(W, e).numpy()
        calls = {
            "group_shrink": (ck.group_shrink(W, tau), oracle.group_shrink(up, rescale(tau, e))),
            "sparse_group_shrink": (
                ck.sparse_group_shrink(W, scale / 4, tau),
                oracle.sparse_group_shrink(up, rescale(scale / 4, e), rescale(tau, e)),
            ),
        }
        V, b = W.clone(), W[:, 0].clone()
        ck.group_shrink_([V], tau, biases=[b])
        together = oracle.group_shrink(np.c_[up, up[:, 0]], rescale(tau, e))
        calls["with biases"] = torch.cat([V, b[:, None]], 1), together
        for name, (P, truth) in calls.items():
            lost = 1e-12 + rescale(1e-323, e)  # roundoff; subnormal numbers
            assert np.abs(rescale(P, e).numpy() - truth).max() <= lost, (name, share)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_derivatives_of_rows_whose_squares_leave_the_range(dtype):
    W = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    G, wanted = torch.randn(5, 8).to(dtype), None
    for exponent in (0, -70, 70, *[-600, 600] * (dtype == torch.float64)):
        X, tau = rescale(W, exponent).requires_grad_(), rescale(1.5, exponent)
        reference = shrinkage.group_shrink._init_fn(X.detach(), torch.tensor(tau, dtype=torch.float64))
        torch.testing.assert_close(reference, ck.group_shrink(X.detach(), tau))
        (grad,) = torch.autograd.grad((ck.group_shrink(X, tau) * G).sum(), X)
        wanted = grad if wanted is None else wanted
        torch.testing.assert_close(grad, wanted)


def test_rescaling():
    for x in (5e-324, 1e-310, 1.0, 1.7e308):
        e = unit_exponent(x)
        assert 0.5 <= rescale(x, e) < 1 or (e == 0 and x == 1)
        assert rescale(rescale(x, e), -e) == x
    assert unit_exponent(0.0) == 0
    X = torch.tensor([5e-324, 3e-310, 2.0, 1e308], dtype=torch.float64)[:, None, None].expand(4, 2, 3)
    exponents = [unit_exponent(x) for x in X[:, 0, 0].tolist()]
    up = rescale(X, exponents)
    assert ((up >= 0.5) & (up <= 2)).all() and torch.equal(rescale(up, [-e for e in exponents]), X)
    assert (norms(up).sqrt() >= 1).all()


def test_bounds_of_other_singular_values_are_not_rounded_to_fp32():
    w = WeightedThreshold(torch.tensor([1e50, 2e50, 3e50], dtype=torch.float64))
    s = torch.tensor([9e50, 8e50], dtype=torch.float64)
    assert w.lipschitz(s, 7e50, 0.0) == pytest.approx(2.0)
