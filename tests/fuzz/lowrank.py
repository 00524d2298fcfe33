"""Cases of the low-rank ops and layers: random geometry, dtypes and layouts against fp64, and transforms of torch."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import compaware_kernels as ck
from compaware_kernels.ops.lowrank import ACTIVATIONS, Geometry
from tests.fuzz.prox import close, dot, loop, raises

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "axes reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "flipped": lambda x: x.flip(-1),
    "negative bit": lambda x: torch._neg_view(-x),
    "expanded": lambda x: x[:1].expand(x.shape),
    "parameter": nn.Parameter,
}
# Relative to the largest output. Torch's own bf16 convolutions are wrong on some machines: only that nothing crashes.
LIMIT = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: math.inf}
LINEAR_LIMIT = LIMIT | {torch.bfloat16: 0.1}


def _values(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def _convolution(rng: random.Random) -> tuple[dict, list]:
    """Geometry, and x, V, U, bias and residual in fp64; a kernel that fits its input."""
    G, fold = rng.choice([1, 1, 2, 4, 8, 8, 16]), rng.choice(["paper", "spatial", "input"])
    C, O, r = (rng.choice([1, 1, 2, 3, 4, 8, 20]) for _ in range(3))
    kernel, size = ([rng.randint(1, 7) for _ in range(2)], [rng.choice([1, 2, 5, 9, 16]) for _ in range(2)])
    stride, dilation = ([rng.randint(1, top) for _ in range(2)] for top in (4, 3))
    padding = [rng.choice([0, 0, 1, 2, 5, 7, 9]) for _ in range(2)]
    for i in range(2):
        kernel[i] = min(kernel[i], (size[i] + 2 * padding[i] - 1) // dilation[i] + 1)
    kh, kw = kernel
    V, U = {"paper": ((kh, kw), (1, 1)), "spatial": ((1, kw), (kh, 1)), "input": ((1, 1), (kh, kw))}[fold]
    N = rng.choice([0, 1, 2, 3]) if rng.random() < 0.1 else rng.choice([1, 2, 3])
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": G, "fold": fold}
    args = [_values(N, G * C, *size), _values(G * r, C, *V), _values(G * O, r, *U)]
    return geometry, [*args, _values(G * O), _values(N, G * O, *out)]


def _linear(rng: random.Random) -> tuple[dict, list]:
    C, O, r = (rng.choice([1, 2, 3, 8, 33]) for _ in range(3))
    batch = rng.choice([(), (1,), (5,), (2, 3), (0,), (2, 0, 3), (70,)])
    return {}, [_values(*batch, C), _values(r, C), _values(O, r), _values(O), _values(*batch, O)]


def _plain(x, V, U, bias, residual, geometry: dict, activation: str) -> Tensor:
    """Two steps of plain PyTorch; the truth in fp64."""
    if geometry:
        first, second = Geometry(**geometry, activation="none").parts()
        y = F.conv2d(F.conv2d(x, V, None, *first, geometry["groups"]), U, bias, *second, geometry["groups"])
    else:
        y = F.linear(F.linear(x, V), U, bias)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def op_case(rng: random.Random) -> tuple[str, Callable[[], Iterator[str]]]:
    """``ck.lowrank_conv2d`` or ``ck.lowrank_linear``."""
    name = rng.choice(["lowrank_conv2d", "lowrank_conv2d", "lowrank_linear"])
    geometry, args = (_convolution if name == "lowrank_conv2d" else _linear)(rng)
    activation, dtype = rng.choice(list(ACTIVATIONS)), rng.choice([torch.float32] * 4 + [*LIMIT])
    rest = {**geometry, "activation": activation}
    bias, residual = rng.random() < 0.7, rng.random() < 0.3
    kept = [True, True, True, bias, residual]

    def call(*given: Tensor, **more) -> Tensor:
        every = iter(given)
        x, V, U, b, r = (next(every) if keep else None for keep in kept)
        return getattr(ck, name)(x, V, U, b, residual=r, **rest, **more)

    def truth(*given: Tensor) -> Tensor:
        every = iter(given)
        return _plain(*(next(every) if keep else None for keep in kept), geometry, activation)

    args = [x.to(dtype) for x, keep in zip(args, kept, strict=True) if keep]
    layouts = [rng.choice(list(LAYOUTS)) if rng.random() < 0.5 else "contiguous" for _ in args]
    args = [LAYOUTS[layout](x) for x, layout in zip(args, layouts, strict=True)]
    limit = (LIMIT if geometry else LINEAR_LIMIT)[dtype]
    how = rng.choice(["value", "value", "value", "packed", "no_grad", "backward", "jvp", "vmap", "grad", "refused"])
    about = f"{name}, {how} {dtype} {[list(x.shape) for x in args]} {rest} {layouts}"
    return about, lambda: HOW[how](call, truth, args, limit, rng)


def _near(got: Tensor, truth: Tensor, dtype: torch.dtype, limit: float, what: str) -> Iterator[str]:
    """Relative to the largest element, or to 1, the size of all arguments: sums of them may cancel."""
    if got.numel() and truth.shape == got.shape:
        limit *= max(1.0, 1 / max(1e-30, float(truth.abs().max())))
    yield from close(got, truth.to(dtype), what, limit) if limit < math.inf else ()


def _value(call, truth, args, limit, rng, **more) -> Iterator[str]:
    before = [x.detach().clone() for x in args]
    y = call(*args, **more)
    yield from _near(y.detach(), truth(*(x.detach().double() for x in args)), args[0].dtype, limit, "value")
    if not all(map(torch.equal, before, (x.detach() for x in args))):
        yield "an argument was changed"


def _packed(call, truth, args, limit, rng) -> Iterator[str]:
    """Weights packed before they change."""
    packed = torch.ops.compaware.lowrank_pack(args[1].detach(), args[2].detach(), 1 if args[1].ndim == 2 else
                                              args[0].shape[1] // args[1].shape[1])  # fmt: skip
    if rng.random() < 0.5:
        args = [args[0], args[1].detach() * 2, *args[2:]]
    yield from _value(call, truth, args, limit, rng, packed=packed)


def _no_grad(call, truth, args, limit, rng) -> Iterator[str]:
    with rng.choice([torch.no_grad, torch.inference_mode])():
        yield from _value(call, truth, args, limit, rng)


def _backward(call, truth, args, limit, rng) -> Iterator[str]:
    leaves = [x.detach().clone().requires_grad_() for x in args]
    exact = [x.detach().double().requires_grad_() for x in args]
    y, wanted = call(*leaves), truth(*exact)
    G = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    got = torch.autograd.grad(y, leaves, G)
    for i, (g, w) in enumerate(zip(got, torch.autograd.grad(wanted, exact, G.double()), strict=True)):
        yield from _near(g, w, g.dtype, 20 * limit if leaves[0].dtype != torch.float16 else math.inf, f"gradient {i}")


def _double(args) -> list[Tensor]:
    """Without negative bits, with which forward mode over views fails in torch's own linear layers as well."""
    return [x.detach().double().resolve_neg().contiguous() for x in args]


def _jvp(call, truth, args, limit, rng) -> Iterator[str]:
    args = tuple(_double(args))
    tangents = tuple(x.cos() for x in args)
    yield from close(jvp(call, args, tangents)[1], jvp(truth, args, tangents)[1], "jvp", 1e-10)


def _vmap(call, truth, args, limit, rng) -> Iterator[str]:
    args = _double(args)
    dims = [rng.choice([None, *range(x.ndim + 1)]) for x in args]
    dims[0] = 0 if dims == [None] * len(dims) else dims[0]
    f = rng.choice([call, grad(lambda *a: call(*a).sin().sum(), tuple(range(len(args))))])
    yield from loop(f, args, dims, 1e-10)


def _grad(call, truth, args, limit, rng) -> Iterator[str]:
    args, d = _double(args), [x.cos() for x in _double(args)]
    every = tuple(range(len(args)))
    number = lambda f: dot(grad(lambda *a: f(*a).square().sum(), every)(*args), d)  # noqa: E731
    yield from close(number(call), number(truth), "grad", 1e-10)
    if args[0].numel():
        hvp = lambda f: dot(jvp(grad(lambda *a: f(*a).square().sum(), every), tuple(args), tuple(d))[1], d)  # noqa: E731
        yield from close(hvp(call), hvp(truth), "jvp of grad", 1e-9)


def _refused(call, truth, args, limit, rng) -> Iterator[str]:
    i = rng.randrange(1, 3)
    wrong = [x.detach() for x in args]
    wrong[i] = rng.choice([
        lambda x: torch.cat([x, x], 1),
        lambda x: x.long(),
        lambda x: x[None],
        lambda x: x[..., 0],
        lambda x: x.to(torch.float64 if x.dtype != torch.float64 else torch.float32),
    ])(wrong[i])  # fmt: skip
    yield from raises(lambda: call(*wrong), RuntimeError, ValueError, TypeError)
    yield from raises(lambda: call(*(x.detach() for x in args), **{"packed": "no"}), RuntimeError, TypeError)


HOW: dict[str, Callable] = {
    "value": _value,
    "packed": _packed,
    "no_grad": _no_grad,
    "backward": _backward,
    "jvp": _jvp,
    "vmap": _vmap,
    "grad": _grad,
    "refused": _refused,
}


# --- layers ---------------------------------------------------------------------------------------------------------


def layer_case(rng: random.Random) -> tuple[str, Callable[[], Iterator[str]]]:
    """A layer in training or in eval mode, against its dense layer in fp64; ensembles of it under vmap."""
    axes, transposed = rng.choice([0, 1, 2, 2, 2, 3]), rng.random() < 0.4
    place = {"dtype": rng.choice([torch.float32, torch.float32, torch.float64])}
    if axes == 0:
        C, O = rng.choice([1, 5, 16, 40]), rng.choice([1, 5, 16, 40])
        make = lambda: ck.LowRankLinear(C, O, rng.randint(1, min(C, O)), bias=rng.random() < 0.7, **place)  # noqa: E731
        shape = rng.choice([(C,), (3, C), (0, C), (2, 4, C)])
    else:
        kind = getattr(ck, f"LowRankConv{'Transpose' * transposed}{axes}d")
        G = rng.choice([1, 1, 2, 8])
        C, O, k = G * rng.choice([1, 2, 16]), G * rng.choice([1, 2, 16]), [rng.randint(1, 4) for _ in range(axes)]
        options = {"stride": rng.randint(1, 3), "padding": rng.randint(0, 3), "groups": G, "bias": rng.random() < 0.7,
                   "fold": rng.choice(["paper", "spatial", "input"])}  # fmt: skip
        if transposed:
            options["padding"] = min(options["padding"], min(k) - 1)
        make = lambda: kind(C, O, tuple(k), 1, **options, **place)  # noqa: E731
        shape = (rng.choice([1, 2]), C, *(rng.choice([4, 5, 8]) for _ in range(axes)))
    layer, how = make().train(rng.random() < 0.3), rng.choice(["value", "value", "no_grad", "vmap", "jvp", "script"])
    x = LAYOUTS[rng.choice(list(LAYOUTS))](_values(*shape).to(place["dtype"]))

    def body() -> Iterator[str]:
        dense, limit = copy.deepcopy(layer.to_dense()).double(), LIMIT[x.dtype]
        exact = dense(x.detach().double())
        if how == "vmap":
            models = [copy.deepcopy(layer) for _ in range(3)]
            for i, model in enumerate(models):
                model.first.weight.data.mul_(1 + i)
            parameters, _ = stack_module_state(models)
            f = lambda p, x: functional_call(layer, p, (x,))  # noqa: E731
            wanted = torch.stack([model.to_dense().double()(x.detach().double()) for model in models])
            yield from _near(vmap(f, (0, None))(parameters, x).detach(), wanted, x.dtype, limit, "ensemble")
        elif how == "jvp":
            _, wanted = jvp(dense, (x.detach().double(),), (x.detach().double(),))
            y, tangent = jvp(layer, (x.detach(),), (x.detach(),))
            yield from _near(y.detach(), exact, x.dtype, limit, "value")
            yield from _near(tangent.detach(), wanted, x.dtype, limit, "tangent")
        elif how == "script":
            yield from raises(lambda: torch.jit.script(nn.Sequential(layer)), TypeError)
        else:
            with torch.set_grad_enabled(how == "value"):
                yield from _near(layer(x).detach(), exact, x.dtype, limit, "value")

    return f"layer, {how} {layer} {list(x.shape)} {x.stride()}", body
