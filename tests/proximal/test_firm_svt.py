"""Firm singular value thresholding: against fp64, by what it minimizes, its gradients, every route of the solver."""

import math

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

import compaware_kernels as ck
from compaware_kernels._utils.dtypes import compute_dtype
from tests.helpers import oracle
from tests.helpers.cases import DTYPES, EMPTY, SHAPES, SPECTRA, TAU, low_rank, matrix, with_spectrum
from tests.proximal.test_solver import ROUTES, WRONG

GAMMA, GAMMAS = 2.5, (1.01, 1.5, 3.0, 1e4)


def exact(W, tau, gamma):
    W = W.double()
    parts = [torch.from_numpy(oracle.firm_svt(M.numpy(), tau, gamma)) for M in W.reshape(-1, *W.shape[-2:])]
    return torch.stack(parts).reshape(W.shape) if parts else W


def check(P, truth, info, tau=1.0, gamma=GAMMA, tol=1e-3):
    """The bound holds, and the tolerance: relative to tau, and what the dtype cannot hold."""
    error, rounding = P.double() - truth, torch.finfo(P.dtype).eps * float(truth.norm())
    assert float(error.norm()) <= float(info.error_bound)
    assert float(torch.linalg.matrix_norm(error, 2)) <= tol * tau + rounding
    assert int(info.rank) == int((info.s > 0).sum())
    assert float((info.s.flatten() - torch.linalg.svdvals(truth)).norm()) <= float(info.error_bound)


# --- the function of one matrix -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_values_and_bound(spectrum, dtype):
    for shape in SHAPES:
        W = torch.from_numpy(matrix(shape, spectrum)).to(dtype)
        for tau, gamma in ((TAU, g) for g in GAMMAS):
            P, info = ck.firm_svt(W, tau, gamma, return_info=True)
            error = float((P.double() - exact(W, tau, gamma)).norm())
            svt = torch.finfo(compute_dtype(dtype)).eps * float(W.double().norm()) * 40 * gamma / (gamma - 1)
            assert error <= float(info.error_bound) and error <= svt + torch.finfo(dtype).eps * float(P.double().norm())
            assert P.dtype == dtype and P.shape == W.shape and int(info.rank) == int((info.s > 0).sum())


def penalty(P, tau, gamma):
    """The minimax concave penalty of the singular values, from its definition as an integral."""
    s = np.minimum(np.linalg.svd(P, compute_uv=False), gamma * tau)
    return np.sum(tau * s - s**2 / (2 * gamma))


@pytest.mark.parametrize("tau", [0.0, 1e-6, TAU, 3.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_laws(tau, gamma):
    """No nearby point is a better one, what is taken away is at most tau, and it moves at most slope times as far."""
    rng = np.random.default_rng(1)
    firm = lambda W: ck.firm_svt(torch.from_numpy(W), tau, gamma).numpy()  # noqa: E731
    objective = lambda P, W: 0.5 * np.sum((P - W) ** 2) + penalty(P, tau, gamma)  # noqa: E731
    for spectrum in SPECTRA:
        W = matrix((12, 7), spectrum, seed=2)
        other = W + 0.1 * rng.standard_normal(W.shape)
        P = firm(W)
        assert np.linalg.norm(W - P, 2) <= tau + 1e-10 * max(1, np.linalg.norm(W)) * gamma / (gamma - 1)
        assert np.linalg.norm(P - firm(other)) <= np.linalg.norm(W - other) * gamma / (gamma - 1) * (1 + 1e-9)
        for size in (1e-3, 1e-1):
            near = P + size * rng.standard_normal(P.shape)
            assert objective(P, W) <= objective(near, W) + 1e-9


def test_limits_are_the_soft_and_the_hard_threshold():
    W = torch.from_numpy(matrix((9, 14), "log-spaced to 1e-9"))
    torch.testing.assert_close(ck.firm_svt(W, TAU, 1e12), ck.svt(W, TAU), rtol=0, atol=1e-11)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(ck.firm_svt(W, TAU, 1 + 1e-6), (U * s * (s > TAU)) @ Vh, rtol=0, atol=1e-8)
    torch.testing.assert_close(ck.firm_svt(W, 0.0, 2.0), W, rtol=0, atol=1e-14)
    assert not ck.firm_svt(W, 1e3, 2.0).any()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape):
    W = torch.empty(shape)
    assert ck.firm_svt(W, 0.1, 2.0).shape == W.shape
    ck.firm_svt_([W], 0.1, 2.0)


def test_a_batch_equals_one_by_one():
    W = torch.from_numpy(matrix((3, 2, 8, 5), "log-spaced to 1e-9"))
    tau, gamma = torch.tensor([[0.1, 0.5], [0.0, 2.0], [9.0, 1e-6]]), torch.tensor([[1.1, 2.0], [3.0, 9.0], [2.0, 4.0]])
    P = ck.firm_svt(W, tau, gamma)
    for i in range(3):
        for j in range(2):
            one = ck.firm_svt(W[i, j], float(tau[i, j]), float(gamma[i, j]))
            torch.testing.assert_close(P[i, j], one, rtol=0, atol=1e-13)


# --- gradients and tracing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (1, 3), (3, 1), (2, 4, 4)], ids=str)
def test_gradients(shape):
    torch.manual_seed(3)
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tau, gamma = (torch.full(shape[:-2], x, dtype=torch.float64, requires_grad=True) for x in (0.7, 2.2))
    assert torch.autograd.gradcheck(ck.firm_svt, (W, tau, gamma))
    assert torch.autograd.gradgradcheck(ck.firm_svt, (W, tau, gamma))


@pytest.mark.parametrize("spectrum", [(2, 1.2, 0.3), (0.8, 0.8, 0.3), (3, 3, 0.8), (3, 0.8, 0), (0.3, 0.3, 0)])
def test_gradients_at_ties_and_zeros(spectrum):
    """Below tau, between tau and gamma tau, above: ties on each side and zeros are smooth."""
    W = with_spectrum(5, 3, spectrum).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: ck.firm_svt(W, 0.5, 2.0), W)
    assert torch.autograd.gradgradcheck(lambda W: ck.firm_svt(W, 0.5, 2.0), W)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("tau", [0.0, TAU])
def test_gradient_is_finite_and_bounded(spectrum, tau):
    for shape in ((8, 5), (5, 8)):
        W = torch.from_numpy(matrix(shape, spectrum)).requires_grad_()
        G = torch.from_numpy(matrix(shape, "exact ties", seed=5))
        (gradient,) = torch.autograd.grad(ck.firm_svt(W, tau, GAMMA), W, G)
        assert gradient.isfinite().all() and gradient.norm() <= GAMMA / (GAMMA - 1) * G.norm() * (1 + 1e-9)


def test_half_precision_keeps_the_dtype():
    W = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
    ck.firm_svt(W, 0.3, 2.0).float().square().sum().backward()
    assert W.grad.dtype == torch.bfloat16 and W.grad.isfinite().all()


def test_vmap_equals_a_batch():
    W, tau = torch.randn(4, 5, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    firm = lambda W, tau: ck.firm_svt(W, tau, 2.0)  # noqa: E731
    torch.testing.assert_close(vmap(firm)(W, tau), firm(W, tau), rtol=0, atol=1e-13)
    each = vmap(grad(lambda W, tau: firm(W, tau).square().sum()))(W, tau)
    W.requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(firm(W, tau).square().sum(), W)[0], rtol=0, atol=1e-12)


def test_compiles_and_exports_in_one_graph():
    class Shrink(torch.nn.Module):
        def forward(self, W):
            return ck.firm_svt(W, 0.4, 2.0)

    W = torch.randn(6, 5, requires_grad=True)
    wanted = Shrink()(W)
    compiled = torch.compile(Shrink(), fullgraph=True, backend="aot_eager")(W)
    torch.testing.assert_close(compiled, wanted)
    grads = [torch.autograd.grad(P.square().sum(), W)[0] for P in (compiled, wanted)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(torch.export.export(Shrink(), (W.detach(),)).module()(W), wanted)


def test_in_place_compiles():
    weights = [torch.randn(6, 4, 3, 3), torch.randn(5, 7)]
    copies = [W.clone() for W in weights]
    wanted = ck.firm_svt_(copies, 0.5, [2.0, 3.0])
    infos = torch.compile(lambda: ck.firm_svt_(weights, 0.5, [2.0, 3.0]), backend="aot_eager")()
    for W, P, info, other in zip(weights, copies, infos, wanted, strict=True):
        assert torch.equal(W, P) and torch.equal(info.rank, other.rank.cpu()) and info.method == "traced"


# --- every layer in one call ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_routes(route, dtype):
    make, method = ROUTES[route]
    W = make().to(dtype)
    for gamma in (1.5, GAMMA, 50.0) if W.isfinite().all() else ():
        P = W.clone()
        (info,) = ck.firm_svt_([P], 1.0, gamma)
        check(P, exact(W, 1.0, gamma), info, gamma=gamma)
        if dtype == torch.float32:
            assert info.method.startswith(method) and info.reason, info


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("ratio", [1.0, 1.001, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(14, 9), (150, 100), (260, 500)])
def test_thresholds_and_gammas(shape, ratio, gamma):
    k = min(shape)
    for s in (torch.logspace(0, -8, k), torch.linspace(1, 0, k), torch.cat([torch.ones(5), 1e-7 * torch.rand(k - 5)])):
        W, tau = with_spectrum(*shape, s).float(), 1 / ratio
        P = W.clone()
        (info,) = ck.firm_svt_([P], tau, gamma)
        truth = exact(W, tau, gamma)
        error, rounding = P.double() - truth, torch.finfo(P.dtype).eps * float(truth.norm())
        assert float(error.norm()) <= float(info.error_bound)
        assert float(torch.linalg.matrix_norm(error, 2)) <= 1e-3 * tau + rounding


def test_one_tau_and_gamma_per_layer():
    """Small ones of one shape are computed together, and each has its own; so are large ones."""
    shapes = [(12, 9)] * 4 + [(20, 30, 20), (120, 90), (300, 200)]
    weights = [torch.randn(shape) for shape in shapes]
    taus, gammas = [0.5, 2.0, 0.0, 99.0, 3.0, 5.0, 9.0], [1.2, 3.0, 2.0, 2.0, 4.0, 1.05, 2.0]
    before = [W.clone() for W in weights]
    infos = ck.firm_svt_(weights, taus, torch.tensor(gammas), fold=None)
    for W, X, info, tau, gamma in zip(weights, before, infos, taus, gammas, strict=True):
        error = torch.linalg.matrix_norm(W.double() - exact(X, tau, gamma))
        assert (error <= info.error_bound).all(), (X.shape, info.method)
        assert (error <= 1e-3 * tau * X.shape[-1] ** 0.5 + 3e-6 * X.norm()).all()


def test_the_tolerance_is_that_of_the_result():
    """The nearer gamma is to 1, the more F moves: what fp32 does for a large gamma, fp64 does for a small one."""
    methods = []
    for gamma in (1e3, 1.0001):
        W = with_spectrum(300, 200, torch.linspace(0.1, 5, 200)).float()
        truth = exact(W, 1.0, gamma)
        (info,) = ck.firm_svt_([W], 1.0, gamma)
        check(W, truth, info, gamma=gamma)
        methods.append(info.method)
    assert methods[0] == "gram, fp32" and methods[1] != "gram, fp32"


def test_the_bound_of_a_gram_matrix_where_all_is_steep():
    """Every singular value lies between tau and gamma tau, and moves slope = 1001 times as far as rounding moves it."""
    W = with_spectrum(300, 200, torch.linspace(1.00005, 1.00095, 200)).float()
    truth = exact(W, 1.0, 1.001)
    (info,) = ck.firm_svt_([W], 1.0, 1.001, tol=1e-2)
    check(W, truth, info, gamma=1.001, tol=1e-2)
    assert info.method == "gram, fp32"


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_warm_states(wrong):
    """The weights are shrunk, grow again and are disturbed; a wrong state costs time only."""
    state, twin, generator = ck.WarmState(3), ck.WarmState(3), torch.Generator().manual_seed(0)
    W = low_rank(500, 300, 20).float()
    for call in range(4):
        if wrong and call == 3:
            for each in (state, twin):
                torch.manual_seed(0)
                each.bases["layer.0"] = WRONG[wrong](each.bases["layer.0"])
        truth, other = exact(W, 1.0, GAMMA), W.clone()
        (info,) = ck.firm_svt_([W], 1.0, GAMMA, state=state, names=["layer"])
        ck.firm_svt_([other], 1.0, GAMMA, state=twin, names=["layer"])
        check(W, truth, info)
        assert torch.equal(W, other) and (wrong or info.method.startswith("subspace"))
        noise = torch.randn(W.shape, generator=generator)
        W += 0.4 * noise / torch.linalg.matrix_norm(noise, 2)


@pytest.mark.parametrize("shape", [(9, 7), (120, 90), (300, 500)])
def test_around_a_center(shape):
    C = torch.randn(shape)
    W = (C + low_rank(*shape, 5)).float()
    truth = C.double() + exact(W.double() - C.double(), 1.0, GAMMA)
    (info,) = ck.firm_svt_([W], 1.0, GAMMA, center=[C])
    assert float((W - truth).norm()) <= float(info.error_bound) and int(info.rank) == 5


@pytest.mark.parametrize("fold", ["paper", "spatial", "input"])
def test_fold_and_groups(fold):
    W = torch.randn(6, 2, 3, 5, dtype=torch.float64)
    M = ck.folds.to_matrix(W, fold, groups=3)
    wanted = ck.folds.from_matrix(exact(M, 0.8, 2.0), W.shape, fold)
    (info,) = ck.firm_svt_([W], 0.8, 2.0, fold=fold, groups=[3], names=["conv"])
    torch.testing.assert_close(W, wanted, rtol=0, atol=1e-12)
    assert info.name == "conv" and info.rank.shape == (3,)


def test_no_layers_is_fine():
    assert ck.firm_svt_([], 0.1, 2.0) == []


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_in_layer_3_of_5_names_it_and_changes_nothing(bad):
    weights, state = [torch.randn(4, 5) for _ in range(5)], ck.WarmState()
    weights[2][1, 1] = bad
    before = [W.clone() for W in weights]
    with pytest.raises(ValueError, match=r"block\.2.*(NaN|Inf)"):
        ck.firm_svt_(weights, 0.1, 2.0, names=[f"block.{i}" for i in range(5)], state=state)
    for W, B in zip(weights, before, strict=True):
        assert torch.equal(W.view(torch.int32), B.view(torch.int32))
    assert state.calls == 0 and not state.bases


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0, -2.0, math.nan, math.inf, -math.inf])
def test_bad_gamma(gamma):
    W = torch.randn(3, 4)
    before = W.clone()
    with pytest.raises(ValueError, match="gamma: wanted finite numbers > 1; got"):
        ck.firm_svt(W, 0.1, gamma)
    with pytest.raises(ValueError, match="gamma: wanted finite numbers > 1; got"):
        ck.firm_svt_([W, W], 0.1, [2.0, gamma])
    assert torch.equal(W, before)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ck.firm_svt(torch.ones(2, 2), -0.1, 2.0), ValueError, "thresholds >= 0"),
        (lambda: ck.firm_svt(torch.ones(2, 2).int(), 0.1, 2.0), TypeError, "got int32"),
        (lambda: ck.firm_svt(torch.ones(3, 2, 2), 0.1, torch.full((2,), 2.0)), ValueError, r"gamma.*got shape \[2\]"),
        (lambda: ck.firm_svt_([torch.ones(2, 2)], 0.1, [2.0, 3.0]), ValueError, "gamma.*1, one per weight"),
        (lambda: ck.firm_svt_([torch.ones(2, 2)], 0.1, 2.0, tol=0), ValueError, "tol: wanted"),
        (lambda: ck.firm_svt_([torch.ones(2, 2)], 0.1, 2.0, center=[torch.ones(3, 2)]), ValueError, "center"),
        (lambda: ck.firm_svt_([torch.ones(2, 2)], 0.1, 2.0, state={}), TypeError, "WarmState"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
