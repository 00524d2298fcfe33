"""Shrinkage ops: prox of L1, group lasso and sparse group lasso on rows of ``W`` ``[..., m, n]``, also in place.

In-place ops take a list of weights of different shapes and any strides, with one threshold per weight, and write only
after every result has been computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import transforms
from .thresholds import fold, promote, sum_to_tau

__all__ = [
    "group_shrink",
    "group_shrink_",
    "neuron_shrink_",
    "soft_threshold",
    "soft_threshold_",
    "sparse_group_shrink",
    "sparse_group_shrink_",
]


@torch.library.custom_op("compaware::soft_threshold", mutates_args=())
def soft_threshold(W: Tensor, tau: Tensor) -> Tensor:
    """Soft-thresholding ``sign(W) max(|W| - tau, 0)`` of ``[..., m, n]``, the prox of ``tau ||W||_1``."""
    X, t = promote(W, tau)
    return _soft(X, t).to(W.dtype).contiguous()


@torch.library.custom_op("compaware::group_shrink", mutates_args=())
def group_shrink(W: Tensor, tau: Tensor) -> Tensor:
    """Row-wise shrinkage ``w max(1 - tau / ||w||_2, 0)`` of rows w of ``[..., m, n]``, the prox of group lasso."""
    X, t = promote(W, tau)
    return _group(X, t).to(W.dtype).contiguous()


@torch.library.custom_op("compaware::sparse_group_shrink", mutates_args=())
def sparse_group_shrink(W: Tensor, l1: Tensor, tau: Tensor) -> Tensor:
    """Soft-thresholding by ``l1``, then row-wise shrinkage by ``tau``: prox of sparse group lasso, ``[..., m, n]``."""
    X, a, t = promote(W, l1, tau)
    return _group(_soft(X, a), t).to(W.dtype).contiguous()


def _soft(X: Tensor, t: Tensor) -> Tensor:
    return X - X.clamp(-t, t)  # this form propagates NaN


def _row_norms(X: Tensor) -> Tensor:
    """Norms ``[..., m, 1]`` of rows, each divided by a power of two first, so that no square over- or underflows."""
    if not X.shape[-1]:
        return X.new_zeros(*X.shape[:-1], 1)
    largest = X.detach().abs().amax(-1, keepdim=True)
    unit = torch.where((largest > 0) & largest.isfinite(), largest.log2().floor().exp2(), 1)
    return torch.linalg.vector_norm(X / unit, dim=-1, keepdim=True) * unit


def _group(X: Tensor, t: Tensor) -> Tensor:
    norm = _row_norms(X)
    return X * torch.where(t == 0, 1, torch.where(norm <= t, 0, 1 - t / norm))


# --- derivatives: X [..., m, n], t [..., 1, 1]; the derivative by X is self-adjoint, so one form serves both modes ----


class _Derivative(NamedTuple):
    """Derivative of a stage ``f(X, t)``; where X is at the threshold it counts as below, and at ``t = 0`` as above."""

    by_X: Callable[[Tensor], Tensor]
    by_t: Tensor  # of every element


def _soft_derivative(X: Tensor, t: Tensor) -> _Derivative:
    active = (X.abs() > t) | (t == 0)
    return _Derivative(lambda G: G * active, -X.sign() * active)


def _group_derivative(X: Tensor, t: Tensor) -> _Derivative:
    norm = _row_norms(X)
    above = norm > t
    alive, length = above.to(X.dtype), torch.where(above, norm, 1)
    unit, kept = X / length * alive, t / length
    identity = torch.where(t == 0, torch.ones_like(alive), alive)

    def by_X(G: Tensor) -> Tensor:
        return identity * G - kept * (alive * G - unit * (unit * G).sum(-1, keepdim=True))

    return _Derivative(by_X, -unit)


_SOFT, _GROUP = (_soft, _soft_derivative), (_group, _group_derivative)  # stages: value and derivative


def _derivatives(stages: Sequence, W: Tensor, *taus: Tensor) -> list[_Derivative]:
    """Derivatives of the stages, each where the stages before it have led."""
    (X, *taus), found = promote(W, *taus), []
    for (value, derivative), t in zip(stages, taus, strict=True):
        found.append(derivative(X, t))
        X = value(X, t)
    return found


def _backward(stages: Sequence, ctx, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients by W and the thresholds."""
    W, *taus = ctx.saved_tensors
    (G,), grads = promote(grad), []
    for stage, tau in zip(reversed(_derivatives(stages, W, *taus)), reversed(taus), strict=True):
        grads.append(sum_to_tau((G * stage.by_t).sum((-2, -1)), tau))
        G = stage.by_X(G)
    return G.to(W.dtype), *reversed(grads)


def _jvp(stages: Sequence, inputs: Sequence[Tensor], W_t: Tensor, *taus_t: Tensor) -> Tensor:
    """Tangent of the result from those of W and the thresholds."""
    D, *steps = promote(W_t, *taus_t)
    for stage, step in zip(_derivatives(stages, *inputs), steps, strict=True):
        D = stage.by_X(D) + stage.by_t * step
    return D.to(W_t.dtype)


for _op, _stages in (
    (soft_threshold, (_SOFT,)),
    (group_shrink, (_GROUP,)),
    (sparse_group_shrink, (_SOFT, _GROUP)),
):
    _op.register_fake(lambda W, *taus: W.new_empty(W.shape))
    transforms.register_derivatives(_op, partial(_backward, _stages), partial(_jvp, _stages))
    transforms.register_vmap(_op, fold)


@torch.library.custom_op("compaware::soft_threshold_", mutates_args={"weights"})
def soft_threshold_(weights: Sequence[Tensor], tau: Tensor) -> None:
    """soft_threshold in place on L weights; tau ``[L]``."""
    _write(weights, [soft_threshold._opoverload(W, t) for W, t in _pairs(weights, tau)])


@torch.library.custom_op("compaware::group_shrink_", mutates_args={"weights"})
def group_shrink_(weights: Sequence[Tensor], tau: Tensor) -> None:
    """group_shrink in place on L weights; tau ``[L]``."""
    _write(weights, [group_shrink._opoverload(W, t) for W, t in _pairs(weights, tau)])


@torch.library.custom_op("compaware::neuron_shrink_", mutates_args={"weights", "biases"})
def neuron_shrink_(weights: Sequence[Tensor], biases: Sequence[Tensor], tau: Tensor) -> None:
    """group_shrink in place on L weights and biases ``[..., m]``: each row's group is ``[w, b]``; tau ``[L]``."""
    rows = [torch.cat([W, b[..., None]], -1) for W, b in zip(weights, biases, strict=True)]
    shrunk = [group_shrink._opoverload(R, t) for R, t in _pairs(rows, tau)]
    _write([*weights, *biases], [*(P[..., :-1] for P in shrunk), *(P[..., -1] for P in shrunk)])


@torch.library.custom_op("compaware::sparse_group_shrink_", mutates_args={"weights"})
def sparse_group_shrink_(weights: Sequence[Tensor], l1: Tensor, tau: Tensor) -> None:
    """sparse_group_shrink in place on L weights; l1 and tau ``[L]``."""
    taus = zip(_pairs(weights, l1), _pairs(weights, tau), strict=True)
    _write(weights, [sparse_group_shrink._opoverload(W, a, t) for (W, a), (_, t) in taus])


def _pairs(weights: Sequence[Tensor], tau: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(W, t.to(W.device)) for W, t in zip(weights, tau.unbind(), strict=True)]


def _write(weights: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    for W, P in zip(weights, results, strict=True):
        W.copy_(P)


for _op in (soft_threshold_, group_shrink_, neuron_shrink_, sparse_group_shrink_):
    _op.register_fake(lambda *args: None)
