"""Cases of the in-place proximal operators: lists of odd tensors, updated all or nothing, within their bounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

import compaware_kernels as ck
from tests.fuzz import tensors
from tests.fuzz.prox import GAMMA, raises, true_value
from tests.helpers import oracle

WRITABLE = [name for name in tensors.LAYOUTS if name not in ("expanded", "inference", "result")]


def _ball(W, radius):
    return W - oracle.svt(W, radius)


def _truncate(W, rank):
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * s[:rank] @ Vh[:rank]


OPS: dict[str, tuple[Callable, Callable]] = {  # name: call of weights and one parameter each, fp64 truth of one matrix
    "svt_": (lambda weights, taus: ck.svt_(weights, taus, fold=None), oracle.svt),
    "firm_svt_": (lambda weights, taus: ck.firm_svt_(weights, taus, GAMMA, fold=None),
                  lambda W, tau: oracle.firm_svt(W, tau, GAMMA)),
    "spectral_ball_": (lambda weights, taus: ck.spectral_ball_(weights, taus, fold=None), _ball),
    "truncate_": (lambda weights, ranks: ck.truncate_(weights, ranks, fold=None), _truncate),
    "soft_threshold_": (lambda weights, taus: ck.soft_threshold_(weights, taus), oracle.soft_threshold),
    "group_shrink_": (lambda weights, taus: ck.group_shrink_(weights, taus), oracle.group_shrink),
    "sparse_group_shrink_": (lambda weights, taus: ck.sparse_group_shrink_(weights, taus, taus),
                             lambda W, tau: oracle.sparse_group_shrink(W, tau, tau)),
}  # fmt: skip


def case(rng: random.Random) -> tuple[str, Callable[[], Iterator[str]]]:
    name = rng.choice(list(OPS))
    dtypes = [
        rng.choice([torch.float64, torch.float32, torch.float32, *tensors.HALF]) for _ in range(rng.randint(0, 3))
    ]
    spectral = name in ("svt_", "firm_svt_", "spectral_ball_", "truncate_")
    weights = [tensors.values(rng, tensors.shape(rng, batches=spectral), dtype) for dtype in dtypes]
    layouts = [rng.choice(WRITABLE) for _ in weights]
    weights = [tensors.LAYOUTS[layout](W) for W, layout in zip(weights, layouts, strict=True)]
    sizes = [float(W.detach().abs().max()) if W.numel() else 1.0 for W in weights]
    parameters = [rng.choice([0.0, 0.3 * size, size, rng.random() * size, 20 * size]) for size in sizes]
    if name == "truncate_":
        parameters = [rng.randint(0, min(W.shape[-2:]) + 1) for W in weights]
    about = f"{name}, {[(str(W.dtype)[6:], list(W.shape), how) for W, how in zip(weights, layouts, strict=True)]}"
    if weights and rng.random() < 0.3:
        return _refused(name, about, weights, parameters, rng)
    around = rng.choice([None, None, "autocast", "inference_mode", "no_grad"])

    def body() -> Iterator[str]:
        call, truth = OPS[name]
        exact = [_true(truth, W, p) for W, p in zip(weights, parameters, strict=True)]
        if around is None:
            infos = call(weights, parameters)
        else:
            context = torch.autocast("cpu", torch.bfloat16) if around == "autocast" else getattr(torch, around)()
            with context:
                infos = call(weights, parameters)
        for i, (W, wanted) in enumerate(zip(weights, exact, strict=True)):
            yield from _within(W, wanted, infos[i] if infos else None, sizes[i], f"weights[{i}]")

    return f"{about} {parameters} {around or ''}", body


def _true(truth: Callable, W: Tensor, parameter: float) -> Tensor:
    return true_value(lambda W, _: truth(W, parameter), W, [0.0])  # thresholds stay fp64 in these ops


def _plain(W: Tensor) -> Tensor:
    return W.detach().as_subclass(Tensor).resolve_neg().double()


def _within(W: Tensor, wanted: Tensor, info, size: float, name: str) -> Iterator[str]:
    """Within the bound that was reported; of an op without report, within rounding."""
    if not W.numel():
        return
    error, noise = torch.linalg.matrix_norm(_plain(W) - wanted), 1e-13 * size * W.numel() ** 0.5
    rounding = 4 * torch.finfo(W.dtype).eps * size * W.numel() ** 0.5 + torch.finfo(W.dtype).tiny
    bound = info.error_bound if info else torch.full_like(error, rounding)
    if not bool((error <= bound.reshape(error.shape) + noise).all()):
        yield f"{name}: off by {float(error.max()):.3g}, bound {float(bound.max()):.3g}"
    if info and not torch.equal((info.s > 0).sum(-1), info.rank):
        yield f"{name}: rank is not the number of positive singular values"


def _refused(name, about, weights, parameters, rng) -> tuple[str, Callable[[], Iterator[str]]]:
    """One weight or parameter of the list must be refused, and then no weight is changed."""
    i = rng.randrange(len(weights))
    what = rng.choice(["parameter", "count", "vmap", *tensors.REFUSED, "expanded", "inference"])
    parameters, given, kind = list(parameters), list(weights), ValueError
    W = weights[i].detach().as_subclass(Tensor).resolve_neg()
    if what == "parameter" or (not W.numel() and what in (*tensors.REFUSED, "expanded")):
        parameters[i] = -1 if name == "truncate_" else rng.choice([-0.5, float("nan"), float("inf")])
    elif what == "count":
        parameters += [parameters[0]] * (2 if len(parameters) == 0 else 1)
        kind = None if len(parameters) == 1 else ValueError
    elif what in tensors.REFUSED:
        make, kind = tensors.REFUSED[what]
        given[i] = make(W)
    elif what in ("expanded", "inference"):
        given[i] = tensors.LAYOUTS[what](W)
        kind = None if what == "expanded" and W.shape[-2] < 2 else ValueError

    def body() -> Iterator[str]:
        before = [_plain(W).clone() for W in weights]
        if what == "vmap":
            one = lambda W: (OPS[name][0]([W], parameters[:1]), W)[1]  # noqa: E731
            yield from raises(lambda: vmap(one)(torch.stack([W, W])), ValueError, TypeError)
        elif kind:
            yield from raises(lambda: OPS[name][0](given, parameters), kind)
        if not all(map(torch.equal, before, map(_plain, weights))):
            yield "refused, but a weight was changed"

    return f"{name}, refused {what} at {i}, {about} {parameters}", body
