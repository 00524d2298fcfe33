"""First and second derivatives of svt: at ties and zeros, under vmap and torch.func, compiled and exported."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.func import jacrev, vmap
from torch.library import opcheck

import compaware_kernels as ck
from compaware_kernels._utils.dtypes import compute_dtype
from compaware_kernels.ops.svt import svt
from tests.helpers.cases import DTYPES, SPECTRA, TAU, matrix

SMOOTH = {  # three singular values different from TAU, where P is smooth
    "distinct": (2.0, 1.2, 0.3),
    "all above": (2.0, 1.2, 0.8),
    "ties above": (1.5, 1.5, 0.3),
    "ties below": (1.5, 0.3, 0.3),
    "ties on both sides": (1.5, 1.5, 0.0),
    "all equal": (1.5, 1.5, 1.5),
    "zeros": (1.5, 0.0, 0.0),
    "all below": (0.4, 0.4, 0.1),
    "all zero": (0.0, 0.0, 0.0),
}
SHAPES = {"square": (3, 3), "tall": (5, 3), "wide": (3, 4)}


def exact(shape, s, seed=0):
    """Permuted diagonal matrix: its ties and zeros are exact in floating point."""
    W = torch.zeros(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (torch.randperm(n, generator=generator)[: len(s)] for n in shape[-2:])
    W[..., rows, cols] = torch.tensor(s, dtype=torch.float64)
    return W


def rotated(shape, s, seed=0):
    """Random singular vectors: ties and zeros up to rounding, as they occur in practice."""
    torch.manual_seed(seed)
    Q, R = (torch.linalg.qr(torch.randn(*shape[:-2], n, n, dtype=torch.float64)).Q for n in shape[-2:])
    return Q @ exact(shape, s) @ R


def leaves(W, tau):
    return W.clone().requires_grad_(), torch.as_tensor(tau, dtype=torch.float64).clone().requires_grad_()


def newton_schulz(Y, steps):
    """Polar factor of Y: all nonzero singular values become 1."""
    for _ in range(steps):
        Y = 1.5 * Y - 0.5 * Y @ Y.mT @ Y
    return Y


def polynomial_svt(W, tau):
    """svt without a decomposition, so that autograd can go through it any number of times, also at ties and zeros.

    With the projection onto the singular vectors above tau, ``Q = (1 + sign(W W^T - tau^2)) / 2``, and the polar
    factor: ``svt(W) = Q W - tau polar(Q W)``; sign and polar by Newton-Schulz (Higham, 2008, 5.3 and 8.3).
    """
    identity = torch.eye(W.shape[-2], dtype=W.dtype)
    A = W @ W.mT - tau**2 * identity
    above = (identity + newton_schulz(A / A.detach().norm(), 60)) / 2 @ W
    return above - tau * newton_schulz(above / W.detach().norm().clamp_min(1), 25)


def second_order(f, W, tau, G, H, h):
    """Of <f, G>: the gradient, and the gradients of its derivative along (H, h)."""
    W, tau = leaves(W, tau)
    G = G.clone().requires_grad_()
    first = grad((f(W, tau) * G).sum(), (W, tau), create_graph=True)
    return *first, *grad((first[0] * H).sum() + first[1] * h, (W, tau, G))


# --- against finite differences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [exact, rotated])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SMOOTH)
def test_derivatives_of_P_by_W_and_tau(spectrum, shape, build):
    inputs = leaves(build(SHAPES[shape], SMOOTH[spectrum]), TAU)
    assert gradcheck(lambda W, tau: svt(W, tau)[0], inputs)
    assert gradgradcheck(lambda W, tau: svt(W, tau)[0], inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["distinct", "all above"])
def test_derivatives_of_P_and_s_by_W_and_tau(spectrum, shape):
    inputs = leaves(rotated(SHAPES[shape], SMOOTH[spectrum]), TAU)
    assert gradcheck(svt, inputs)
    assert gradgradcheck(svt, inputs)


@pytest.mark.parametrize("build", [exact, rotated])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SMOOTH)
def test_derivatives_of_the_sum_of_s_at_ties(spectrum, shape, build):
    """Singular values that coincide have no derivatives of their own, but their sum has."""
    inputs = leaves(build(SHAPES[shape], SMOOTH[spectrum]), TAU)
    assert gradcheck(lambda W, tau: svt(W, tau)[1].sum(), inputs)
    assert gradgradcheck(lambda W, tau: svt(W, tau)[1].sum(), inputs)


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 2, 3), (1, 1), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("tau", [0.5, (0.4, 0.9)], ids=["shared", "per matrix"])
def test_derivatives_batched(shape, tau):
    torch.manual_seed(1)
    inputs = leaves(torch.randn(shape, dtype=torch.float64), tau if len(shape) == 3 else 0.5)
    assert gradcheck(svt, inputs)
    assert gradgradcheck(svt, inputs)


# --- against autograd through polynomials ---------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name not in ("exact ties", "tau +- 1 ulp")])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7), (20, 3)], ids=str)
def test_derivatives_equal_those_of_polynomials(shape, spectrum):
    spectra = (spectrum, "half zeros", "rank 1")
    W, H, G = (torch.from_numpy(matrix(shape, name, seed)) for seed, name in enumerate(spectra))
    h = 0.7
    got = second_order(lambda W, tau: svt(W, tau)[0], W, TAU, G, H, h)
    for ours, wanted in zip(got, second_order(polynomial_svt, W, TAU, G, H, h), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-8)


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [exact, rotated])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SMOOTH)
def test_at_tau_zero_svt_is_the_identity(spectrum, shape, build):
    W, G, H = build(SHAPES[shape], SMOOTH[spectrum]), *torch.randn(2, *SHAPES[shape], dtype=torch.float64)
    grad_W, _, second_W, _, grad_G = second_order(lambda W, tau: svt(W, tau)[0], W, 0.0, G, H, 0.0)
    torch.testing.assert_close(grad_W, G, rtol=0, atol=1e-13)
    torch.testing.assert_close(grad_G, H, rtol=0, atol=1e-13)
    assert not second_W.any()


def test_above_sigma_max_every_derivative_is_exactly_zero():
    W, G, H = torch.randn(3, 6, 4, dtype=torch.float64)
    assert not any(x.any() for x in second_order(lambda W, tau: svt(W, tau)[0], W, 100.0, G, H, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("tau", [0.0, TAU, 2.0])
def test_derivatives_are_finite_everywhere_and_keep_the_dtype(spectrum, tau, dtype):
    """Also at singular values equal to tau, where there is no derivative, and for both outputs."""
    for shape in ((6, 4), (4, 6), (5, 5)):
        W, G = (torch.from_numpy(matrix(shape, name)).to(dtype) for name in (spectrum, "half zeros"))
        W.requires_grad_()
        P, s = svt(W, torch.tensor(tau, dtype=compute_dtype(dtype)))
        (first,) = grad((P * G).sum() + s.square().sum(), W, create_graph=True)
        (second,) = grad((first * G).sum(), W)
        assert first.dtype == second.dtype == dtype and first.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10])
def test_second_derivative_scales_like_one_over_W(scale):
    W, G, H = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = lambda W, tau: svt(W, tau)[0]  # noqa: E731
    scaled, unit = second_order(f, W * scale, TAU * scale, G, H, 0.3), second_order(f, W, TAU, G, H, 0.3)
    for ours, wanted, power in zip(scaled, unit, (0, 0, 1, 1, 0), strict=True):
        torch.testing.assert_close(ours * scale**power, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0)], ids=str)
def test_derivatives_of_empty_matrices_are_empty(shape):
    W = torch.empty(shape, dtype=torch.float64)
    assert second_order(lambda W, tau: svt(W, tau)[0], W, 0.3, W, W, 0.3)[2].shape == W.shape


def test_a_third_derivative_is_refused():
    W, tau = leaves(torch.randn(3, 3), 0.5)
    (first,) = grad(svt(W, tau)[0].pow(3).sum(), W, create_graph=True)
    (second,) = grad(first.sum(), W, create_graph=True)
    with pytest.raises(NotImplementedError, match="first or a second derivative; got a third"):
        second.sum().backward()


# --- torch.func -----------------------------------------------------------------------------------------------------


def loss(W, tau):
    P, s = svt(W, tau)
    return P.pow(3).sum() + (s * torch.arange(s.shape[-1])).square().sum()


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def samples():
    torch.manual_seed(2)
    return torch.randn(4, 2, 5, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.1


def loop(f, *batches):
    outputs = [f(*args) for args in zip(*batches, strict=True)]
    return tuple(torch.stack(x) for x in zip(*outputs, strict=True))


@pytest.mark.parametrize("call", [svt, torch.ops.compaware.svt], ids=["function", "op"])
def test_vmap_equals_a_loop(call):
    W, tau = samples()
    per_matrix = torch.stack([tau, tau / 2], 1)
    close(vmap(call)(W, tau), loop(call, W, tau))
    close(vmap(call)(W, per_matrix), loop(call, W, per_matrix))
    close(vmap(call, in_dims=(3, None), out_dims=0)(W.movedim(0, 3), tau[0]), loop(call, W, [tau[0]] * 4))
    close(vmap(call, in_dims=(0, None))(W, per_matrix[0]), loop(call, W, [per_matrix[0]] * 4))
    close(vmap(call, in_dims=(None, 0))(W[0], tau), loop(call, [W[0]] * 4, tau))
    close(vmap(vmap(call, in_dims=(0, None)))(W, tau), loop(call, W, tau))


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_of_the_gradient_equals_a_loop(dims):
    W, tau = samples()
    each = W if dims[0] == 0 else [W[0]] * 4, tau if dims[1] == 0 else [tau[0]] * 4
    args = W if dims[0] == 0 else W[0], tau if dims[1] == 0 else tau[0]
    gradient = torch.func.grad(loss, argnums=(0, 1))
    close(vmap(gradient, in_dims=dims)(*args), loop(lambda W, t: grad(loss(*(x := leaves(W, t))), x), *each))


def test_vmap_of_jacobians_and_hessians_equals_a_loop():
    W, tau = samples()[0][:, 0], samples()[1]
    hessian = lambda W, tau: jacrev(torch.func.grad(loss, argnums=(0, 1)), argnums=(0, 1))(W, tau)  # noqa: E731
    plain = lambda W, tau: torch.autograd.functional.hessian(loss, (W, tau))  # noqa: E731
    for row, got in enumerate(vmap(hessian)(W, tau)):
        close(got, loop(lambda W, tau, row=row: plain(W, tau)[row], W, tau))
    jacobian = lambda W, tau: torch.autograd.functional.jacobian(svt, (W, tau))  # noqa: E731
    for row, got in enumerate(vmap(jacrev(svt, argnums=(0, 1)))(W, tau)):
        close(got, loop(lambda W, tau, row=row: jacobian(W, tau)[row], W, tau))


def test_the_svd_is_shared_by_all_rows_of_a_jacobian(monkeypatch):
    W, tau = samples()[0][0, 0], samples()[1][0]
    shapes, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda X, **options: shapes.append(X.shape) or svd(X, **options))
    jacrev(lambda W: svt(W, tau)[0])(W)
    assert shapes == [(5, 3), (1, 5, 3)]


# --- tracing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.4, torch.tensor([0.1, 0.4])], ids=["shared", "per matrix"])
def test_forward_and_backward_compile_in_one_graph(tau):
    W = torch.randn(2, 6, 5, requires_grad=True)
    f = lambda W: ck.svt(W, tau).square().sum()  # noqa: E731
    torch.compile(f, fullgraph=True, backend="aot_eager")(W).backward()
    torch.testing.assert_close(W.grad, grad(f(W), W)[0])


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="needs a newer torch")
def test_a_gradient_taken_inside_compiles_in_one_graph():
    W = torch.randn(6, 5, requires_grad=True)
    f = lambda W: grad(ck.svt(W, 0.4).square().sum(), W)[0]  # noqa: E731
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(W), f(W))


def test_compiles_for_any_batch():
    f = torch.compile(lambda W, tau: ck.svt(W, tau).sum(), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        W, tau = torch.randn(batch, 4, 5, requires_grad=True), torch.rand(batch, requires_grad=True)
        got = grad(f(W, tau), (W, tau))
        torch.testing.assert_close(got, grad(ck.svt(W, tau).sum(), (W, tau)))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_for_any_batch_with_its_gradient(strict):
    class Shrink(torch.nn.Module):
        def forward(self, W, tau):
            return ck.svt(W, tau)

    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Shrink(), (torch.randn(2, 4, 6), torch.rand(2)), dynamic_shapes=({0: batch}, {0: batch}), strict=strict
    )
    W, tau = torch.randn(5, 4, 6, requires_grad=True), torch.rand(5)
    P = program.module()(W, tau)
    torch.testing.assert_close(P, ck.svt(W, tau))
    torch.testing.assert_close(grad(P.sum(), W), grad(ck.svt(W, tau).sum(), W))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 4, 5), (4, 4)], ids=str)
def test_opcheck(shape, dtype):
    W, G, H = torch.randn(3, *shape, dtype=dtype)
    g, tau, h = (torch.rand((*shape[:-2], *k), dtype=dtype) for k in ((4,), (), (4,)))
    opcheck(torch.ops.compaware.svt_backward.default, tuple(x.clone().requires_grad_() for x in (W, tau, G, g)))
    opcheck(torch.ops.compaware.svt_double_backward.default, (W, tau, G, g, H, h))
