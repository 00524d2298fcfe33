"""Cases of the differentiable proximal operators: odd tensors, thresholds, and all transforms of torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import compaware_kernels as ck
from compaware_kernels._utils.dtypes import compute_dtype
from tests.fuzz import tensors
from tests.helpers import oracle

GAMMA = 2.5
PROX: dict[str, tuple[Callable, Callable, int]] = {  # name: function, fp64 truth of one matrix, number of thresholds
    "soft_threshold": (ck.soft_threshold, oracle.soft_threshold, 1),
    "group_shrink": (ck.group_shrink, oracle.group_shrink, 1),
    "sparse_group_shrink": (ck.sparse_group_shrink, oracle.sparse_group_shrink, 2),
    "svt": (lambda W, tau: ck.svt(W, tau), oracle.svt, 1),
    "firm_svt": (lambda W, tau: ck.firm_svt(W, tau, GAMMA), lambda W, tau: oracle.firm_svt(W, tau, GAMMA), 1),
}
BAD_TAU = [-1.0, math.nan, math.inf, torch.tensor(-0.1), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])]


def case(rng: random.Random) -> tuple[str, Callable[[], Iterator[str]]]:
    name = rng.choice(list(PROX))
    f, truth, count = PROX[name]
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, *tensors.HALF])
    W, layout = tensors.values(rng, tensors.shape(rng), dtype), rng.choice(list(tensors.LAYOUTS))
    if rng.random() < 0.15:
        return _refused(name, f, count, W, rng)
    W = tensors.LAYOUTS[layout](W)
    taus = [_tau(W, rng) for _ in range(count)]
    if W.is_inference():  # torch saves none for a gradient
        taus = [tau.detach() if isinstance(tau, Tensor) else tau for tau in taus]
    if rng.random() < 0.3 or W.is_inference() or layout == "subclass":
        return f"{name}, {dtype} {layout} {list(W.shape)}", lambda: _value(f, truth, W, taus)
    args = (W.detach().clone(), *(torch.as_tensor(tau, dtype=compute_dtype(dtype)).detach() for tau in taus))
    kind = rng.choice(["first", "first", "second", "vmap", "vmap", "trace"])
    if kind == "first":
        how = rng.choice(list(FIRST) if W.numel() else list(FIRST)[:6])  # torch has no Jacobian of nothing
        body = lambda: _first(f, FIRST[how], args)  # noqa: E731
    elif kind == "second":
        how, args = rng.choice(list(SECOND)[: 4 if W.numel() > 20 else None]), tuple(x.double() for x in args)
        body = lambda: _second(f, SECOND[how], args)  # noqa: E731
    elif kind == "vmap":
        how = rng.choice(list(MAPPED))
        dims = [rng.choice([None, *range(x.ndim + 1)]) for x in args]
        dims[0] = 0 if dims == [None] * len(dims) else dims[0]
        body = lambda: loop(MAPPED[how](f), args, dims)  # noqa: E731
    else:
        how = "compile" if rng.random() < 0.03 else rng.choice([name for name in TRACED if name != "compile"])  # slow
        body = lambda: _equal(f, TRACED[how](f, args), args)  # noqa: E731
    return f"{name}, {kind} {how} of {dtype} {list(W.shape)}, tau {[list(x.shape) for x in args[1:]]}", body


def _tau(W: Tensor, rng: random.Random) -> object:
    """A valid threshold, of every form; often one that elements, rows or singular values meet exactly."""
    size = float(W.detach().abs().max()) if W.numel() else 1.0
    number = rng.choice([0.0, 0.3 * size, size, rng.random() * size, 2 * size * max(W.shape[-2:], default=1), 0.5, 1.0])
    form = rng.choice(["number", "int", "numpy", "0-d", "0-d", "fp64", "half", "leaf", "one", "batch", "batch"])
    return {
        "number": lambda: number,
        "int": lambda: int(number),
        "numpy": lambda: np.float64(number),
        "0-d": lambda: torch.tensor(number),
        "fp64": lambda: torch.tensor(number, dtype=torch.float64),
        "half": lambda: torch.tensor(min(number, 6e4), dtype=torch.float16),
        "leaf": lambda: torch.tensor(number, requires_grad=True),
        "one": lambda: torch.full(W.shape[:-2], number),
        "batch": lambda: torch.rand(W.shape[:-2]) * number,
    }[form]()


def _refused(name, f, count, W, rng) -> tuple[str, Callable[[], Iterator[str]]]:
    """A weight or a threshold that must be refused, by the documented error, alone and in a batch of vmap."""
    if rng.random() < 0.4 or not W.numel():
        bad, kind, weight, mapped = rng.choice(BAD_TAU), ValueError, W, False
        taus = [0.1] * (count - 1) + [bad]
        if isinstance(bad, Tensor) and bad.shape == W.shape[:-2]:
            taus[-1] = -1.0
        what = f"tau {bad}"
    else:
        what = rng.choice(list(tensors.REFUSED))
        make, kind = tensors.REFUSED[what]
        weight, taus, mapped = make(W), [0.1] * count, what in ("NaN", "Inf") and rng.random() < 0.5

    def body() -> Iterator[str]:
        call = (lambda: vmap(lambda W: f(W, *taus))(torch.stack([W, weight]))) if mapped else lambda: f(weight, *taus)
        yield from raises(call, kind)

    return f"{name}, refused {what}{', vmap' * mapped} {list(W.shape)} {W.dtype}", body


def raises(call: Callable, *kinds: type[Exception]) -> Iterator[str]:
    """A violation unless the call raises one of these, whatever its message."""
    try:
        call()
    except kinds:
        return
    except Exception as error:
        yield f"wanted {kinds[0].__name__}; got {type(error).__name__}: {str(error)[:150]}"
    else:
        yield f"wanted {kinds[0].__name__}; got a result"


# --- values ---------------------------------------------------------------------------------------------------------


def _per_matrix(W: Tensor, tau: object) -> list[float]:
    tau = torch.as_tensor(tau, dtype=compute_dtype(W.dtype)).detach().double()
    return tau.expand(W.shape[:-2]).flatten().tolist()


def true_value(truth: Callable, W: Tensor, taus: list) -> Tensor:
    """fp64 truth of a batch of matrices."""
    X = W.detach().as_subclass(Tensor).resolve_neg().double()
    each = zip(
        X.reshape(math.prod(X.shape[:-2]), *X.shape[-2:]).numpy(), *(_per_matrix(W, t) for t in taus), strict=True
    )
    results = [torch.from_numpy(truth(*args)) for args in each] if X.numel() else []
    return torch.stack(results).reshape(X.shape) if results else X.clone()


def _value(f, truth, W: Tensor, taus: list) -> Iterator[str]:
    before = W.detach().clone()
    P = f(W, *taus)
    if P.shape != W.shape or P.dtype != W.dtype:
        yield f"{P.dtype} {list(P.shape)} of {W.dtype} {list(W.shape)}"
        return
    if not torch.equal(before.as_subclass(Tensor), W.detach().as_subclass(Tensor)):
        yield "the argument was changed"
    exact = true_value(truth, W, taus)
    if P.numel():
        size, compute = float(before.double().abs().max()), torch.finfo(compute_dtype(W.dtype)).eps
        error = float((P.detach().as_subclass(Tensor).double() - exact).abs().max())
        if not error <= (100 * compute + 2 * torch.finfo(W.dtype).eps) * size + torch.finfo(W.dtype).tiny:
            yield f"off by {error:.3g} of {size:.3g}"


# --- derivatives: numbers <J d, G> and <H d, e>, against central differences in fp64 ----------------------------------


def dot(xs, ys) -> Tensor:
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


def _dual(f, args, d, G) -> Tensor:
    with forward_ad.dual_level():
        return (forward_ad.unpack_dual(f(*map(forward_ad.make_dual, args, d))).tangent * G).sum()


def _backward(f, args, d, G) -> Tensor:
    leaves = [x.clone().requires_grad_() for x in args]
    (f(*leaves) * G).sum().backward()
    return dot([x.grad for x in leaves], d)


def _jacobian(transform) -> Callable:
    def number(f, args, d, G):
        every = [J.double() for J in transform(f, tuple(range(len(args))))(*args)]
        return sum(G.reshape(-1).double() @ J.reshape(G.numel(), x.numel()) @ x.reshape(-1).double()
                   for J, x in zip(every, d, strict=True))  # fmt: skip

    return number


FIRST: dict[str, Callable] = {
    "backward": _backward,
    "grad": lambda f, args, d, G: dot(grad(lambda *a: (f(*a) * G).sum(), tuple(range(len(args))))(*args), d),
    "vjp": lambda f, args, d, G: dot(vjp(f, *args)[1](G), d),
    "jvp": lambda f, args, d, G: (jvp(f, args, d)[1] * G).sum(),
    "dual": _dual,
    "jacfwd": _jacobian(jacfwd),
    "jacrev": _jacobian(jacrev),
    "jacobian": _jacobian(lambda f, every: lambda *args: torch.autograd.functional.jacobian(f, args, vectorize=True)),
}


def _double_backward(L, args, d, e) -> Tensor:
    leaves = [x.clone().requires_grad_() for x in args]
    first = torch.autograd.grad(L(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(dot(first, d), leaves, allow_unused=True)
    return dot([torch.zeros_like(x) if g is None else g for g, x in zip(second, leaves, strict=True)], e)


def _whole(transform) -> Callable:
    def number(L, args, d, e):
        H = transform(L, tuple(range(len(args))))(*args)
        return sum(x.reshape(-1) @ h.reshape(x.numel(), y.numel()) @ y.reshape(-1)
                   for row, x in zip(H, d, strict=True) for h, y in zip(row, e, strict=True))  # fmt: skip

    return number


SECOND: dict[str, Callable] = {  # the first four form no matrix
    "double backward": _double_backward,
    "jvp of grad": lambda L, args, d, e: dot(jvp(grad(L, tuple(range(len(args)))), args, d)[1], e),
    "grad of jvp": lambda L, args, d, e: dot(
        grad(lambda *a: jvp(L, a, d)[1], tuple(range(len(args))))(*args), e),
    "jvp of jvp": lambda L, args, d, e: jvp(lambda *a: jvp(L, a, d)[1], args, e)[1],
    "hessian": _whole(hessian),
    "jacfwd of jacfwd": _whole(lambda L, every: jacfwd(jacfwd(L, every), every)),
    "jacrev of jacfwd": _whole(lambda L, every: jacrev(jacfwd(L, every), every)),
}  # fmt: skip


def _directions(args) -> tuple[Tensor, ...]:
    return tuple(torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in args)


def _differences(L: Callable, args, d) -> tuple[float, float]:
    """Derivative of L along d in fp64, and what two step sizes leave open: large at a kink."""
    args, d = ([x.double() for x in each] for each in (args, d))
    size = max(float(x.abs().max()) for x in args if x.numel()) or 1.0

    def at(h: float) -> float:
        return float(L(*(x + h * y for x, y in zip(args, d, strict=True))))

    h = 2.5e-6 * size
    here, ahead, back = at(0), at(h), at(-h)
    narrow, wide = (ahead - back) / (2 * h), (at(4 * h) - at(-4 * h)) / (8 * h)
    return narrow, max(abs(wide - narrow), 1e-3 * abs(ahead + back - 2 * here) / h)


def _agrees(got: Tensor, L, args, d, scale: float, eps: float, what: str) -> Iterator[str]:
    """A violation if the number is far from central differences, where those are sure; NaN and Inf are one anywhere."""
    if not math.isfinite(float(got)):
        yield f"{what} is {float(got)}"
    elif min((float(t.min()) for t in args[1:] if t.numel()), default=1.0) > 1e-4 * scale > 0:
        wanted, open_ = _differences(L, args, d)
        if open_ < 1e-7 * (abs(wanted) + 1) and not abs(float(got) - wanted) <= 1e-5 * (abs(wanted) + 1) + eps:
            yield f"{what} is {float(got):.8g}; differences give {wanted:.8g}"


def _first(f, number, args) -> Iterator[str]:
    d, G = _directions(args), torch.randn(args[0].shape, dtype=torch.float64).to(args[0].dtype)
    got = number(f, args, d, G.clone())
    if args[0].numel():
        eps = 30 * torch.finfo(args[0].dtype).eps * float(G.double().norm() * sum(x.double().norm() for x in d))
        scale = float(args[0].double().abs().max())
        yield from _agrees(got, lambda *a: (f(*a) * G.double()).sum(), args, d, scale, eps * 10, "<J d, G>")


def _second(f, number, args) -> Iterator[str]:
    def L(*a):
        return f(*a).pow(3).sum()

    d, e = _directions(args), _directions(args)
    got = number(L, args, d, e)
    if args[0].numel():
        first = lambda *a: FIRST["grad"](lambda *b: f(*b).pow(3), tuple(a), d, torch.ones_like(a[0]))  # noqa: E731
        scale = float(args[0].abs().max())
        yield from _agrees(got, first, args, e, scale, 1e-6 * scale, "<H d, e>")


# --- vmap and tracing -----------------------------------------------------------------------------------------------

MAPPED: dict[str, Callable] = {
    "value": lambda f: f,
    "grad": lambda f: grad(lambda *a: f(*a).sin().sum(), 0),
    "grad of all": lambda f: lambda *a: grad(lambda *b: f(*b).sin().sum(), tuple(range(len(a))))(*a),
    "jvp": lambda f: lambda *a: jvp(f, a, tuple(x.cos() for x in a)),
    "jacfwd": lambda f: jacfwd(f),
    "jacrev": lambda f: jacrev(f),
    "vmap": lambda f: lambda *a: vmap(f)(*(torch.stack([x, 2 * x, x / 2]) for x in a)),
}


def loop(f: Callable, args, dims, tolerance: float = 0.0) -> Iterator[str]:
    """vmap of f over three copies of each argument with an axis to map; the others are shared."""
    mapped = [x if dim is None else torch.stack([x, 2 * x, x / 2], dim) for x, dim in zip(args, dims, strict=True)]
    pick = lambda i: [x if dim is None else x.select(dim, i) for x, dim in zip(mapped, dims, strict=True)]  # noqa: E731
    got, each = vmap(f, tuple(dims))(*mapped), [f(*pick(i)) for i in range(3)]
    got, each = (got,) if isinstance(got, Tensor) else got, [(x,) if isinstance(x, Tensor) else x for x in each]
    each = [torch.stack(results) for results in zip(*each, strict=True)]
    size = max((float(x.abs().max()) for x in each if x.numel()), default=0.0)  # sums in one of them may cancel
    for x, wanted in zip(got, each, strict=True):
        yield from close(x, wanted, "vmap", tolerance, size)


def close(got: Tensor, wanted: Tensor, what: str, tolerance: float = 0.0, least: float = 0.0) -> Iterator[str]:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        yield f"{what}: {got.dtype} {list(got.shape)}; wanted {wanted.dtype} {list(wanted.shape)}"
    elif got.numel():
        size, error = (
            max(least, float(wanted.double().abs().max())),
            float((got.double() - wanted.double()).abs().max()),
        )
        info = torch.finfo(got.dtype)  # and a few of its smallest numbers
        if not error <= (tolerance or 1e3 * info.eps) * size + 8 * info.smallest_normal * info.eps:
            yield f"{what}: off by {error:.3g} of {size:.3g}"


def _compiled(f, args) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")(*args)


TRACED: dict[str, Callable] = {
    "make_fx": lambda f, args: make_fx(f)(*args)(*args),
    "make_fx fake": lambda f, args: make_fx(f, tracing_mode="fake")(*args)(*args),
    "functionalize": lambda f, args: functionalize(f)(*args),
    "checkpoint": lambda f, args: checkpoint(f, *args, use_reentrant=False),
    "no_grad": lambda f, args: torch.no_grad()(f)(*args),
    "inference_mode": lambda f, args: torch.inference_mode()(f)(*args),
    "autocast": lambda f, args: torch.autocast("cpu", torch.bfloat16)(f)(*args),
    "compile": _compiled,
}


def _equal(f, got: Tensor, args) -> Iterator[str]:
    yield from close(got, f(*args), "value")
