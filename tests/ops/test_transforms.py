"""Forward mode, torch.func and tracing of the differentiable functions: the same values as autograd and as a loop."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import compaware_kernels as ck
from compaware_kernels.ops.lowrank import ACTIVATIONS
from compaware_kernels.ops.svt import svt as svt_op

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")  # a fallback of vmap

ops = torch.ops.compaware
PROX = {  # name: function of W and thresholds, number of thresholds
    "soft_threshold": (ck.soft_threshold, 1),
    "group_shrink": (ck.group_shrink, 1),
    "sparse_group_shrink": (ck.sparse_group_shrink, 2),
    "svt": (lambda W, tau: ck.svt(W, tau), 1),
    "firm_svt": (lambda W, tau: ck.firm_svt(W, tau, 2.5), 1),
}
CONV = {
    "paper": {"V": (4, 2, 2, 3), "U": (6, 2, 1, 1)},
    "spatial": {"V": (4, 2, 1, 3), "U": (6, 2, 2, 1)},
    "input": {"V": (4, 2, 1, 1), "U": (6, 2, 2, 3)},
}
GEOMETRY = {"stride": (1, 2), "padding": (1, 1), "dilation": (2, 1), "groups": 2}
LAYERS = {
    "linear": (lambda: ck.LowRankLinear(16, 12, 4), (5, 16)),
    "conv1d": (lambda: ck.LowRankConv1d(16, 16, 3, 4, fold="input"), (2, 16, 9)),
    "conv2d": (lambda: ck.LowRankConv2d(16, 16, 3, 12), (2, 16, 9, 9)),
    "conv3d": (lambda: ck.LowRankConv3d(4, 4, 3, 2), (2, 4, 5, 5, 5)),
    "transposed 1d": (lambda: ck.LowRankConvTranspose1d(4, 4, 3, 2), (2, 4, 5)),
    "transposed 2d": (lambda: ck.LowRankConvTranspose2d(4, 4, 3, 2, groups=2), (2, 4, 5, 5)),
    "transposed 3d": (lambda: ck.LowRankConvTranspose3d(4, 4, 3, 2, fold="spatial"), (2, 4, 5, 5, 5)),
}
prox = pytest.mark.parametrize("name", PROX)


def close(got, wanted, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prox_case(name, batch=()):
    """Function, its arguments, and their positions."""
    f, count = PROX[name]
    taus = [0.3 + 0.4 * normal(*batch, seed=i + 1).sigmoid() for i in range(count)]
    return f, (normal(*batch, 4, 5), *taus), tuple(range(count + 1))


def lowrank_case(fold, activation):
    """Function of x, V, U, bias and residual, and its arguments; ``fold`` "linear" is the linear layer."""
    if fold == "linear":
        shapes, f, rest = ((3, 5), (2, 5), (4, 2), (4,), (3, 4)), ck.lowrank_linear, {}
    else:
        shapes = ((2, 4, 4, 3), CONV[fold]["V"], CONV[fold]["U"], (6,), (2, 6, 4, 2))
        f, rest = ck.lowrank_conv2d, {"fold": fold, **GEOMETRY}
    args = tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes))
    return (lambda x, V, U, bias, r: f(x, V, U, bias, residual=r, activation=activation, **rest)), args


def tuples(x):
    return x if isinstance(x, tuple) else (x,)


def equals_a_loop(f, args, dims=0):
    """vmap of f over three stacked copies of the arguments."""
    dims = dims if isinstance(dims, tuple) else (dims,) * len(args)
    mapped = [torch.stack([x, 0.9 * x, 1.1 * x], dim) if dim is not None else x
              for x, dim in zip(args, dims, strict=True)]  # fmt: skip
    each = [[x.select(dim, i) if dim is not None else x for x, dim in zip(mapped, dims, strict=True)]
            for i in range(3)]  # fmt: skip
    wanted = [torch.stack(results) for results in zip(*(tuples(f(*x)) for x in each), strict=True)]
    close(tuples(vmap(f, dims)(*mapped)), tuple(wanted))


# --- proximal operators ---------------------------------------------------------------------------------------------


@prox
@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrix", "batch"])
def test_jacobians_of_both_modes_are_equal(name, batch):
    f, args, every = prox_case(name, batch)
    wanted = plain_jacobian(f, args)
    for got in (
        jacrev(f, every)(*args),
        jacfwd(f, every)(*args),
        plain_jacobian(f, args, strategy="forward-mode", vectorize=True),
        plain_jacobian(f, args, vectorize=True),
    ):
        close(got, wanted)


@prox
def test_forward_mode_is_the_derivative(name):
    f, (W, *taus), _ = prox_case(name)
    leaves = tuple(x.clone().requires_grad_() for x in (W[:3, :2], *taus))
    check = {"check_batched_grad": True, "check_undefined_grad": False}
    torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_forward_grad=True, **check)
    torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("name", [name for name in PROX if name != "firm_svt"])
def test_ops_have_the_derivatives_of_the_functions(name):
    _, args, every = prox_case(name)
    op, f = getattr(ops, name), PROX[name][0]
    value = (lambda *args: op(*args)[0]) if name == "svt" else op
    for transform in (jacfwd, jacrev):
        close(transform(value, every)(*args), transform(f, every)(*args))
    equals_a_loop(value, args)


@prox
def test_dual_tensors_carry_tangents(name):
    f, (W, *taus), _ = prox_case(name)
    _, wanted = jvp(lambda W: f(W, *taus), (W,), (W.cos(),))
    with forward_ad.dual_level():
        P, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(W, W.cos()), *taus))
        assert tangent is not None and tangent.any()
    close(P, f(W, *taus))
    close(tangent, wanted)


@prox
@pytest.mark.parametrize("of", [
    hessian,
    lambda f, every: jacrev(jacrev(f, every), every),
    lambda f, every: jacfwd(jacfwd(f, every), every),
    lambda f, every: jacrev(jacfwd(f, every), every),
], ids=["forward of reverse", "reverse of reverse", "forward of forward", "reverse of forward"])  # fmt: skip
def test_hessians(name, of):
    f, args, every = prox_case(name)

    def loss(*args):
        return f(*args).pow(3).sum()

    close(of(loss, every)(*args), plain_hessian(loss, args))


@prox
@pytest.mark.parametrize("transform", ["value", "grad", "jacfwd", "jacrev", "hessian"])
def test_vmap_equals_a_loop(name, transform):
    f, args, every = prox_case(name)

    def loss(*args):
        return f(*args).pow(3).sum()

    mapped = {
        "value": f,
        "grad": grad(loss, every),
        "jacfwd": jacfwd(f, every),
        "jacrev": jacrev(f, every),
        "hessian": hessian(loss),
    }[transform]
    equals_a_loop(mapped, args)
    if transform in ("value", "grad"):
        equals_a_loop(mapped, args, (None, *[0] * len(every[1:])))  # W is shared
        equals_a_loop(mapped, args, (1, *[None] * len(every[1:])))  # thresholds are
        equals_a_loop(vmap(mapped), [torch.stack([x, 1.2 * x]) for x in args])


@pytest.mark.parametrize("count", [1, 2, 3], ids=["as many as matrices", "two", "more than matrices"])
def test_vmap_over_batches_with_a_threshold_for_each_or_for_all(count):
    W = normal(3, 2, 4, 5)
    for tau in (torch.rand(3), torch.rand(3, 2), torch.rand(3, 1)):
        if tau.shape == (3, 1):  # one number of any shape, as the op takes it
            equal = torch.stack([ops.group_shrink(*args) for args in zip(W, tau, strict=True)])
            close(vmap(ops.group_shrink)(W, tau), equal)
        else:
            close(vmap(ck.group_shrink)(W, tau), torch.stack([ck.group_shrink(*a) for a in zip(W, tau, strict=True)]))
    close(vmap(lambda W: ck.svt(W, torch.rand(count)[0]), randomness="same")(W).shape, W.shape)


@prox
def test_both_modes_agree_at_kinks_zeros_and_tau_zero(name):
    """Where there is no derivative both take the same one-sided one; nothing is NaN."""
    f, count = PROX[name]
    W = torch.tensor([[0.5, -0.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0]]).double()
    for tau in (0.0, 0.5, 3.0):
        args = (W, *[torch.tensor(tau).double()] * count)
        every = tuple(range(count + 1))
        got = jacfwd(f, every)(*args)
        close(got, jacrev(f, every)(*args))
        assert all(J.isfinite().all() for J in got)
        assert torch.stack([h.isfinite().all() for h in hessian(lambda *a: f(*a).pow(3).sum(), every)(*args)[0]]).all()


@prox
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_keep_their_dtype(name, dtype):
    f, (W, *taus), _ = prox_case(name)
    W, taus = W.to(dtype), [tau.float() for tau in taus]
    P, tangent = jvp(lambda W: f(W, *taus), (W,), (W,))
    _, wanted = jvp(lambda W: f(W, *taus), (W.float(),), (W.float(),))
    assert P.dtype == tangent.dtype == dtype
    close(tangent.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    G = vjp(lambda W: f(W, *taus), W)[1](W)[0]
    assert G.dtype == dtype


def test_singular_values_have_tangents():
    W, tau = normal(5, 3), torch.tensor(0.4).double()
    args, tangents = (W, tau), (normal(5, 3, seed=7), torch.tensor(0.3).double())
    _, got = jvp(svt_op, args, tangents)
    close(got, torch.autograd.functional.jvp(svt_op, args, tangents)[1])

    def loss(W, tau):
        P, s = svt_op(W, tau)
        return P.pow(3).sum() + (s * torch.arange(s.shape[-1])).square().sum()

    wanted = plain_hessian(loss, args)
    close(hessian(loss, (0, 1))(*args), wanted)
    close(jacfwd(jacfwd(loss, (0, 1)), (0, 1))(*args), wanted)


def test_a_third_derivative_is_refused_in_every_mode():
    def loss(W):
        return ck.svt(W, 0.5).pow(3).sum()

    for third in (jacfwd(hessian(loss)), jacrev(jacrev(jacrev(loss))), jacfwd(jacfwd(jacfwd(loss)))):
        with pytest.raises(NotImplementedError, match="svt: wanted a first or a second derivative; got a third"):
            third(normal(3, 3))


def test_vmap_refuses_what_a_call_refuses():
    W = normal(3, 4, 5)
    W[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="W: contains NaN"):
        vmap(ck.soft_threshold, (0, None))(W, torch.tensor(0.3))
    with pytest.raises(ValueError, match="W: contains NaN"):
        vmap(grad(lambda W: ck.group_shrink(W, 0.1).sum()))(W)
    with pytest.raises(ValueError, match=r"tau: wanted finite thresholds >= 0; got \[0.5, -1.0\]"):
        vmap(ck.svt, (None, 0))(normal(4, 5), torch.tensor([0.5, -1.0]))
    with pytest.raises(ValueError, match="gamma: wanted finite numbers > 1"):
        vmap(ck.firm_svt, (None, None, 0))(normal(4, 5), torch.tensor(0.3), torch.tensor([2.0, 1.0]))


# --- tracing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparse_group_shrink", "svt"])
def test_transforms_compile_in_one_graph(name):
    f, (W, *taus), _ = prox_case(name)

    def forward(W):
        return jvp(lambda W: f(W, *taus), (W,), (W.cos(),))[1]

    def reverse(W):
        return grad(lambda W: f(W, *taus).pow(3).sum())(W)

    def mapped(W):
        return vmap(lambda W: f(W, *taus))(torch.stack([W, 2 * W]))

    for each in (forward, reverse, mapped):
        close(torch.compile(each, fullgraph=True, backend="aot_eager")(W), each(W))


@prox
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(name, mode):
    f, args, _ = prox_case(name)
    close(make_fx(f, tracing_mode=mode)(*args)(*args), f(*args))


def test_fake_tensors():
    with FakeTensorMode() as fake:
        W = fake.from_tensor(normal(2, 4, 5))
        for f, count in PROX.values():
            assert f(W, *[torch.rand(2)] * count).shape == W.shape


@prox
def test_autocast_changes_no_bit(name):
    """bf16 products would move a result by a thousand times its error bound."""
    f, (W, *taus), _ = prox_case(name)
    W, taus = W.float().requires_grad_(), [tau.float() for tau in taus]
    wanted = f(W, *taus)
    gradient = torch.autograd.grad(wanted.sum(), W)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = f(W, *taus)
        assert torch.equal(got, wanted) and torch.equal(torch.autograd.grad(got.sum(), W)[0], gradient)


@pytest.mark.parametrize("shape", [(64, 64), (300, 200), (1000, 30)])
@pytest.mark.parametrize("call", [
    lambda weights: ck.truncate_(weights, 3),
    lambda weights: ck.svt_(weights, 3.0),
    lambda weights: ck.spectral_ball_(weights, 3.0),
], ids=["truncate_", "svt_", "spectral_ball_"])  # fmt: skip
def test_autocast_changes_no_bit_in_place(call, shape):
    plain, cast = ([normal(*shape, dtype=torch.float32)] for _ in range(2))
    call(plain)
    with torch.autocast("cpu", torch.bfloat16):
        call(cast)
    assert torch.equal(*plain, *cast)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_changes_no_bit_of_a_dense_layer(name):
    layer = LAYERS[name][0]()
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer.to_dense()
    assert torch.equal(cast.weight, layer.to_dense().weight)


# --- low-rank ops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["linear", *CONV])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_lowrank_derivatives(fold, activation):
    f, args = lowrank_case(fold, activation)
    every = tuple(range(5))
    wanted = plain_jacobian(f, args)
    for got in (jacrev(f, every)(*args), jacfwd(f, every)(*args), plain_jacobian(f, args, vectorize=True)):
        close(got, wanted)

    def loss(x, V, U, bias, r):
        return f(x, V, U, bias, r).square().sum()

    for i in (1, 3):  # V and bias
        one = lambda A, i=i: loss(*args[:i], A, *args[i + 1 :])  # noqa: E731
        close(hessian(one)(args[i]), plain_hessian(one, args[i]))
    for dims in (0, (0, *[None] * 4), (None, 0, 0, None, 0)):
        equals_a_loop(f, args, dims)
        equals_a_loop(grad(loss, every), args, dims)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fold", ["linear", "paper"])
def test_lowrank_forward_mode(fold, activation):
    f, args = lowrank_case(fold, activation)
    tangents = tuple(x.cos() for x in args)
    wanted = torch.autograd.functional.jvp(f, args, tangents)[1]
    close(jvp(f, args, tangents)[1], wanted)
    with forward_ad.dual_level():
        y = f(*map(forward_ad.make_dual, args, tangents))
        close(forward_ad.unpack_dual(y).tangent, wanted)


def test_lowrank_transforms_compile_in_one_graph():
    f, (x, *rest) = lowrank_case("spatial", "gelu")
    for each in (lambda x: jvp(lambda x: f(x, *rest), (x,), (x.cos(),))[1], grad(lambda x: f(x, *rest).square().sum())):
        close(torch.compile(each, fullgraph=True, backend="aot_eager")(x), each(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_ensembles_of_layers(name, mode):
    """vmap over stacked parameters, and per-sample gradients; no data pointer of a batched tensor is read."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    models = [nn.Sequential(make(), nn.ReLU()).double().train(mode == "train") for _ in range(3)]
    x, (parameters, _) = normal(*shape), stack_module_state(models)

    def call(parameters, x):
        return functional_call(models[0], parameters, (x,))

    def loss(parameters, x):
        return call(parameters, x).square().sum()

    close(vmap(call, (0, None))(parameters, x), torch.stack([model(x) for model in models]))
    each = vmap(grad(loss), (0, None))(parameters, x)
    for i, model in enumerate(models):
        wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        close([each[key][i] for key, _ in model.named_parameters()], list(wanted))
    own = {key: p.detach() for key, p in models[0].named_parameters()}
    per_sample = vmap(grad(loss), (None, 0))(own, x[:, None])
    close({key: g.sum(0) for key, g in per_sample.items()}, {key: each[key][0] for key in own})
    close(jvp(models[0], (x,), (x.cos(),))[1], torch.autograd.functional.jvp(models[0], x, x.cos())[1])


@pytest.mark.parametrize("name", LAYERS)
def test_scripting_names_the_way_out(name):
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make(), nn.ReLU()), normal(*shape, dtype=torch.float32)
    kind = type(model[0])
    with pytest.raises(TypeError, match=rf"torch.jit.script: .* got {kind.__name__}: script ck.to_plain\(model\)"):
        torch.jit.script(model)
    assert type(model[0]) is kind
    close(torch.jit.script(ck.to_plain(model))(x), model(x), rtol=1e-5, atol=1e-6)
