"""Odd tensors: every dtype, layout and kind that a caller may pass, and those that must be refused."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


class Subclass(Tensor):
    pass


def _inference(W: Tensor) -> Tensor:
    with torch.inference_mode():
        return W.clone()


# How the values of W lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda W: W,
    "transposed": lambda W: W.mT.contiguous().mT,
    "slice": lambda W: torch.cat([W, W], -1)[..., : W.shape[-1]],
    "every other": lambda W: torch.stack([W, W], -1).flatten(-2)[..., ::2],
    "flipped": lambda W: W.flip(-1),
    "negative bit": lambda W: torch._neg_view(-W),
    "channels first": lambda W: W.movedim(-1, 0).contiguous().movedim(0, -1),
    "parameter": nn.Parameter,
    "frozen parameter": lambda W: nn.Parameter(W, requires_grad=False),
    "subclass": lambda W: W.as_subclass(Subclass),
    "inference": _inference,
    "result": lambda W: W.clone().requires_grad_() * 1,
    "expanded": lambda W: W[..., :1, :].expand(W.shape),
}

# What is no weight: from W to what must be refused, and how.
REFUSED: dict[str, tuple[Callable[[Tensor], object], type[Exception]]] = {
    "int": (lambda W: W.long(), TypeError),
    "bool": (lambda W: W > 0, TypeError),
    "complex": (lambda W: torch.complex(W.double(), W.double()), TypeError),
    "sparse": (lambda W: W.to_sparse(), TypeError),
    "list": (lambda W: W.tolist(), TypeError),
    "array": (lambda W: W.double().numpy(), TypeError),
    "meta": (lambda W: W.to("meta"), ValueError),
    "NaN": (lambda W: _with(W, math.nan), ValueError),
    "Inf": (lambda W: _with(W, -math.inf), ValueError),
}


def _with(W: Tensor, value: float) -> Tensor:
    W = W.clone()
    W[(-1,) * W.ndim] = value
    return W


def shape(rng: random.Random, batches: bool = True) -> tuple[int, ...]:
    """Of a matrix or a batch of them; one in eight is empty."""
    sizes = [0, 1, 1, 2, 3, 4, 5, 7] if rng.random() < 0.125 else [1, 1, 2, 3, 4, 5, 7]
    batch = rng.choice([(), (), (rng.choice(sizes),), (2, rng.choice(sizes))]) if batches else ()
    return (*batch, rng.choice(sizes), rng.choice(sizes))


def values(rng: random.Random, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Gaussian, of integers (ties, zeros and singular values met exactly), of low rank, or zero; many scales."""
    W = torch.randn(size, dtype=torch.float64)
    kind = rng.choice(["normal", "normal", "normal", "integers", "low rank", "some rows zero", "zero"])
    if kind == "integers":
        W = W.round()
    elif kind == "low rank":
        W = W[..., :1] * torch.randn(size[-1], dtype=torch.float64)
    elif kind == "some rows zero":
        W = W * (torch.rand(*size[:-1], 1) < 0.5)
    elif kind == "zero":
        W = W * 0
    return (W * 10 ** rng.choice([0, 0, 0, -2, 2])).to(dtype)
