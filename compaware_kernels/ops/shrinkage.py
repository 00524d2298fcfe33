"""Shrinkage ops: prox of L1, group lasso and sparse group lasso on rows of ``W`` ``[..., m, n]``, also in place.

In-place ops take a list of weights of different shapes and any strides, with one threshold per weight, and write only
after every result has been computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .thresholds import promote, sum_to_tau

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


def _soft(X: Tensor, t: Tensor) -> Tensor:
    return X - X.clamp(-t, t)  # this form propagates NaN


def _soft_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    W, tau = ctx.saved_tensors
    X, t = promote(W, tau)
    grad_W, grad_t = _soft_vjp(X, t, grad.to(X.dtype))
    return grad_W.to(W.dtype), sum_to_tau(grad_t, tau)


def _soft_vjp(X: Tensor, t: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    active = (X.abs() > t) | (t == 0)
    return G * active, -(G * X.sign() * active).sum((-2, -1))


@torch.library.custom_op("compaware::group_shrink", mutates_args=())
def group_shrink(W: Tensor, tau: Tensor) -> Tensor:
    """Row-wise shrinkage ``w max(1 - tau / ||w||_2, 0)`` of rows w of ``[..., m, n]``, the prox of group lasso."""
    X, t = promote(W, tau)
    return _group(X, t).to(W.dtype).contiguous()


def _group(X: Tensor, t: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return X * torch.where(t == 0, 1, torch.where(norm <= t, 0, 1 - t / norm))


def _group_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    W, tau = ctx.saved_tensors
    X, t = promote(W, tau)
    grad_W, grad_t = _group_vjp(X, t, grad.to(X.dtype))
    return grad_W.to(W.dtype), sum_to_tau(grad_t, tau)


def _group_vjp(X: Tensor, t: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    alive = (norm > t).to(X.dtype)
    unit = X / torch.where(norm > t, norm, 1) * alive
    along = (unit * G).sum(-1, keepdim=True)
    kept = t / torch.where(norm > t, norm, 1)
    identity = torch.where(t == 0, torch.ones_like(alive), alive)
    return identity * G - kept * (alive * G - unit * along), -along.sum((-2, -1))


@torch.library.custom_op("compaware::sparse_group_shrink", mutates_args=())
def sparse_group_shrink(W: Tensor, l1: Tensor, tau: Tensor) -> Tensor:
    """Soft-thresholding by ``l1``, then row-wise shrinkage by ``tau``: prox of sparse group lasso, ``[..., m, n]``."""
    X, a, t = promote(W, l1, tau)
    return _group(_soft(X, a), t).to(W.dtype).contiguous()


def _sparse_group_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    W, l1, tau = ctx.saved_tensors
    X, a, t = promote(W, l1, tau)
    grad_soft, grad_t = _group_vjp(_soft(X, a), t, grad.to(X.dtype))
    grad_W, grad_a = _soft_vjp(X, a, grad_soft)
    return grad_W.to(W.dtype), sum_to_tau(grad_a, l1), sum_to_tau(grad_t, tau)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


for _op, _backward in (
    (soft_threshold, _soft_backward),
    (group_shrink, _group_backward),
    (sparse_group_shrink, _sparse_group_backward),
):
    _op.register_fake(lambda W, *taus: W.new_empty(W.shape))
    _op.register_autograd(_backward, setup_context=_save_inputs)


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
