"""Proximal operators: values against the fp64 oracle, their mathematical laws, gradients, tracing, bad input."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

import compaware_kernels as ck
from compaware_kernels._utils.dtypes import compute_dtype
from compaware_kernels.ops.backends import TABLE
from tests.helpers import oracle
from tests.helpers.cases import DTYPES, EMPTY, SHAPES, SPECTRA, TAU, matrix
from tests.helpers.marks import slow_but

PROX = {"svt": ck.svt, "group_shrink": ck.group_shrink, "soft_threshold": ck.soft_threshold}
IN_PLACE = {"svt": ck.svt_, "group_shrink": ck.group_shrink_, "soft_threshold": ck.soft_threshold_}
FP64_LOSS = 1e-13  # relative to the largest entry; worst case measured here: 3e-15


def plain(name, W, tau):
    """Result of plain PyTorch in W's dtype (half types through fp32), to which errors are compared."""
    X = W.to(compute_dtype(W.dtype))
    if name == "svt":
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        return ((U * (s - tau).clamp_min(0)) @ Vh).to(W.dtype)
    if name == "group_shrink":
        return (X * (1 - tau / X.norm(dim=-1, keepdim=True)).clamp_min(0).nan_to_num()).to(W.dtype)
    return torch.nn.functional.softshrink(X, tau).to(W.dtype)


def difference(P, truth):
    return np.linalg.norm(P.detach().double().numpy() - truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", PROX)
def test_values_are_as_accurate_as_plain_pytorch(name, spectrum, dtype):
    for shape in SHAPES:
        W = torch.from_numpy(matrix(shape, spectrum)).to(dtype)
        truth = getattr(oracle, name)(W.double().numpy(), TAU)
        P = PROX[name](W, TAU)
        scale = W.double().norm()
        floor = FP64_LOSS * scale if dtype == torch.float64 else torch.finfo(dtype).eps * 1e-2 * scale
        assert P.dtype == dtype and P.shape == W.shape
        assert difference(P, truth) <= 2 * difference(plain(name, W, TAU), truth) + floor, shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_svt_error_bound_holds(spectrum, dtype):
    for shape in SHAPES:
        for tau in (0.0, 1e-3, TAU, 10.0):
            W = torch.from_numpy(matrix(shape, spectrum)).to(dtype)
            P, info = ck.svt(W, tau, return_info=True)
            assert difference(P, oracle.svt(W.double().numpy(), tau)) <= info.error_bound, (shape, tau)


@pytest.mark.parametrize("name", PROX)
def test_batch_equals_one_by_one(name):
    W = torch.from_numpy(matrix((3, 2, 8, 5), "log-spaced to 1e-9"))
    tau = torch.tensor([[0.1, 0.5], [0.0, 2.0], [9.0, 1e-6]])
    P = PROX[name](W, tau)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(P[i, j], PROX[name](W[i, j], float(tau[i, j])), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("name", PROX)
def test_empty(name, shape):
    W = torch.empty(shape)
    assert PROX[name](W, 0.1).shape == W.shape
    IN_PLACE[name]([W], 0.1)


@pytest.mark.parametrize("name", PROX)
@pytest.mark.parametrize("tau", [0.0, 1e-6, TAU, 3.0])
def test_laws(name, tau):
    """Moreau: W = prox(W) + projection on the dual ball. Optimality: no nearby point is better. Non-expansive."""
    rng = np.random.default_rng(1)
    prox = lambda W: PROX[name](torch.from_numpy(W), tau).numpy()  # noqa: E731
    objective = lambda P, W: 0.5 * np.sum((P - W) ** 2) + oracle.penalty(name, P, tau)  # noqa: E731
    for spectrum in SPECTRA:
        W = matrix((12, 7), spectrum, seed=2)
        other = W + 0.1 * rng.standard_normal(W.shape)
        P = prox(W)
        np.testing.assert_allclose(W - P, oracle.project_dual(name, W, tau), atol=1e-12 * max(1, np.abs(W).max()))
        assert np.linalg.norm(P - prox(other)) <= np.linalg.norm(W - other) * (1 + 1e-9)
        for _ in range(5):
            near = P + 1e-2 * rng.standard_normal(P.shape)
            assert objective(P, W) <= objective(near, W) + 1e-12


@pytest.mark.parametrize("name", PROX)
def test_tau_zero_is_identity_and_large_tau_is_exactly_zero(name):
    W = torch.from_numpy(matrix((9, 14), "exact ties"))
    torch.testing.assert_close(PROX[name](W, 0.0), W, rtol=0, atol=1e-14)
    assert not PROX[name](W, 1e3).any()


def test_svt_at_sigma_max_is_zero():
    W = torch.diag(torch.tensor([0.5, 0.25]))
    assert not ck.svt(W, 0.5).any()


def test_svt_info():
    W = torch.from_numpy(matrix((2, 10, 6), "exact ties"))
    P, info = ck.svt(W, 0.4, return_info=True)
    assert info.rank.tolist() == [5, 5]
    torch.testing.assert_close(info.s, torch.linalg.svdvals(P), atol=1e-12, rtol=0)
    assert info.method == "svd" and info.s.shape == (2, 6)


def test_sparse_group_shrink_is_l1_then_group():
    W = torch.randn(2, 20, 30, dtype=torch.float64)
    P = ck.sparse_group_shrink(W, 0.3, torch.tensor([1.0, 4.0]))
    for i, tau in enumerate((1.0, 4.0)):
        np.testing.assert_allclose(P[i].numpy(), oracle.sparse_group_shrink(W[i].numpy(), 0.3, tau), atol=1e-14)


@pytest.mark.parametrize("name", PROX)
@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e5, 1e18])
def test_scale_of_the_weights_does_not_matter(name, scale):
    W = torch.from_numpy(matrix((12, 8), "half zeros")).float()
    P = PROX[name](W * scale, TAU * scale) / scale
    torch.testing.assert_close(P, PROX[name](W, TAU), rtol=1e-5, atol=2e-6)


# --- in place, every layer in one call ------------------------------------------------------------------------------


def ragged(dtype=torch.float32):
    torch.manual_seed(0)
    weights = [torch.randn(s) for s in ((6, 4, 3, 3), (5, 7), (8, 3, 5), (4, 2, 3, 2, 2), (9, 4, 3, 3))]
    weights[4] = weights[4].to(memory_format=torch.channels_last)
    return [w.to(dtype) for w in weights]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROX)
def test_in_place_equals_out_of_place(name, dtype):
    weights, taus = ragged(dtype), [0.1, 0.5, 0.0, 2.0, 0.3]
    wanted = [PROX[name](W.flatten(1), t).reshape(W.shape) for W, t in zip(weights, taus, strict=True)]
    strides = [W.stride() for W in weights]
    IN_PLACE[name](weights, taus)
    for W, P, stride in zip(weights, wanted, strides, strict=True):
        # svt_ and svt differ in route: 40 roundings of the dtype, of the largest entry; measured: 10
        half = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0
        torch.testing.assert_close(W, P, rtol=0, atol=40 * torch.finfo(compute_dtype(dtype)).eps + half)
        assert W.stride() == stride


def test_sparse_group_shrink_in_place():
    weights = ragged(torch.float64)
    wanted = [oracle.sparse_group_shrink(W.flatten(1).numpy(), 0.2, 0.7).reshape(W.shape) for W in weights]
    ck.sparse_group_shrink_(weights, 0.2, 0.7)
    for W, P in zip(weights, wanted, strict=True):
        np.testing.assert_allclose(W.numpy(), P, atol=1e-14)


@pytest.mark.parametrize("fold", ["paper", "spatial", "input"])
def test_svt_in_place_uses_the_fold_and_the_groups(fold):
    W = torch.randn(6, 2, 3, 5, dtype=torch.float64)
    M = ck.folds.to_matrix(W, fold, groups=3)
    wanted = ck.folds.from_matrix(ck.svt(M, 0.8), W.shape, fold)
    (info,) = ck.svt_([W], 0.8, fold=fold, groups=[3], names=["conv"])
    torch.testing.assert_close(W, wanted, rtol=0, atol=1e-13)
    assert info.name == "conv" and info.rank.shape == (3,) and info.s.shape == (3, min(M.shape[-2:]))


def test_svt_in_place_without_fold_takes_batches_of_matrices():
    W = torch.randn(4, 3, 5, 6)
    wanted = ck.svt(W, 0.5)
    ck.svt_([W], 0.5, fold=None)
    torch.testing.assert_close(W, wanted)


def test_in_place_on_parameters_keeps_them_trainable():
    W = torch.nn.Parameter(torch.randn(4, 5))
    ck.svt_([W], 0.5)
    assert W.requires_grad and W.grad_fn is None


def test_empty_list():
    assert ck.svt_([], 0.1) == []
    ck.group_shrink_([], 0.1)


def test_vectors_are_soft_thresholded():
    b = torch.tensor([1.0, -0.2, -3.0])
    assert ck.soft_threshold(b, 0.5).tolist() == [0.5, 0.0, -2.5]
    ck.soft_threshold_([b], 0.5)
    assert b.tolist() == [0.5, 0.0, -2.5]


# --- gradients and tracing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (1, 3), (3, 1), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("name", PROX)
def test_gradients(name, shape):
    torch.manual_seed(3)
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tau = torch.full(shape[:-2], 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PROX[name], (W, tau))
    assert torch.autograd.gradgradcheck(PROX[name], (W, tau))


def test_gradient_of_sparse_group_shrink():
    W = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    taus = [torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(ck.sparse_group_shrink, (W, *taus))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("tau", [0.0, TAU])
def test_gradient_is_finite_and_bounded_at_ties_and_zeros(spectrum, tau):
    """prox is non-expansive, so its derivative has at most norm 1, also where singular values coincide or vanish."""
    for shape in ((8, 5), (5, 8)):
        W = torch.from_numpy(matrix(shape, spectrum)).requires_grad_()
        G = torch.from_numpy(matrix(shape, "exact ties", seed=5))
        (grad,) = torch.autograd.grad(ck.svt(W, tau), W, G)
        assert grad.isfinite().all() and grad.norm() <= G.norm() * (1 + 1e-9)
        if tau == 0.0:
            torch.testing.assert_close(grad, G, rtol=0, atol=1e-9)


def test_gradients_in_half_precision_keep_the_dtype():
    W = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
    ck.svt(W, 0.3).float().square().sum().backward()
    assert W.grad.dtype == torch.bfloat16 and W.grad.isfinite().all()


@pytest.mark.parametrize("dtype", slow_but([torch.float32], DTYPES), ids=str)
@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("lowrank")])
def test_opcheck(name, dtype):
    op = getattr(torch.ops.compaware, name).default
    torch.manual_seed(0)
    compute = compute_dtype(dtype)
    weights = [torch.randn(3, 4).to(dtype), torch.randn(2, 5, 3).to(dtype), torch.randn(4, 6).to(dtype).mT]
    given = {
        "weights": weights if name not in ("svt_", "firm_svt_") else [W.contiguous() for W in weights],
        "W": torch.randn(2, 5, 4).to(compute if name == "small_svd" else dtype).requires_grad_(),
        "tau": torch.tensor([0.1, 0.2], dtype=compute),
        "tol": 1e-3,
        "gamma": torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64),
        "biases": [torch.randn(W.shape[:-1]).to(dtype) for W in weights],
    }
    given["l1"] = given["tau"]
    if name.endswith("_"):
        given["tau"] = given["l1"] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    given["floor"], given["scaled"] = torch.tensor([0.1, 0.2], dtype=torch.float64), True
    if name in ("small_svd", "wide_product", "sum_of_squares", "subspace_step"):
        given["W"], given["V"], given["threshold"] = given["W"].detach().to(compute), torch.randn(4, 2), 0.5
        given["X"], given["Y"] = torch.randn(5, 4).to(compute), torch.randn(4, 3, dtype=torch.float64)
    if name == "subspace_step":
        given["X"] = torch.randn(5, 4)
    if name == "gram_eigh":
        given["X"] = [torch.randn(5, 4).to(compute), torch.randn(2, 3).to(compute)]
    opcheck(op, tuple(given[argument.name] for argument in op._schema.arguments))


@pytest.mark.parametrize("name", PROX)
def test_compiles_without_graph_breaks(name):
    W = torch.randn(6, 5, requires_grad=True)
    compiled = torch.compile(lambda W: PROX[name](W, 0.4).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(W).backward()
    (wanted,) = torch.autograd.grad(PROX[name](W, 0.4).square().sum(), W)
    torch.testing.assert_close(W.grad, wanted)


def test_exports():
    class Shrink(torch.nn.Module):
        def forward(self, W):
            return ck.svt(W, 0.3)

    W = torch.randn(4, 6)
    torch.testing.assert_close(torch.export.export(Shrink(), (W,)).module()(W), ck.svt(W, 0.3))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PROX)
def test_nan_in_layer_3_of_5_names_it_and_changes_nothing(name, bad):
    weights = [torch.randn(4, 5) for _ in range(5)]
    weights[2][1, 1] = bad
    before = [W.clone() for W in weights]
    with pytest.raises(ValueError, match=r"block\.2.*(NaN|Inf)"):
        IN_PLACE[name](weights, 0.1, names=[f"block.{i}" for i in range(5)])
    for W, B in zip(weights, before, strict=True):
        assert torch.equal(W.view(torch.int32), B.view(torch.int32))


@pytest.mark.parametrize(
    ("W", "tau", "error", "words"),
    [
        (torch.ones(2, 2, dtype=torch.int32), 0.1, TypeError, "float32.*got int32"),
        (torch.ones(2, 2, dtype=torch.complex64), 0.1, TypeError, "got complex64"),
        ([[1.0]], 0.1, TypeError, "wanted a torch.Tensor; got list"),
        (torch.ones(2, 2), -0.1, ValueError, "thresholds >= 0"),
        (torch.ones(2, 2), float("nan"), ValueError, "finite"),
        (torch.ones(3, 2, 2), torch.ones(2), ValueError, r"shape \[3\]; got shape \[2\]"),
        (torch.full((2, 2), torch.nan), 0.1, ValueError, "NaN"),
    ],
)
@pytest.mark.parametrize("name", PROX)
def test_bad_input(name, W, tau, error, words):
    with pytest.raises(error, match=words):
        PROX[name](W, tau)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((torch.ones(2, 2), 0.1), {}, TypeError, "list of tensors"),
        (([torch.ones(2, 2)], [0.1, 0.2]), {}, ValueError, "1, one per weight"),
        (([torch.ones(2, 2)], -1.0), {}, ValueError, "thresholds >= 0"),
        (([torch.ones(4)], 0.1), {}, ValueError, r"weights\[0\].*got shape \[4\]"),
        (([torch.ones(2, 2)], 0.1), {"fold": "origami"}, ValueError, "paper, spatial, input; got 'origami'"),
        (([torch.ones(3, 2)], 0.1), {"groups": [2]}, ValueError, "a divisor of the 3 output channels"),
        (([torch.ones(3, 2)], 0.1), {"groups": [1, 1]}, ValueError, "wanted 1, one per weight; got 2"),
        (([torch.ones(3, 2)], 0.1), {"names": []}, ValueError, "wanted 1"),
    ],
)
def test_bad_lists(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        ck.svt_(*args, **kwargs)
