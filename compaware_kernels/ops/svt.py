"""Singular value thresholding op ``compaware::svt``: ``P = U max(s - tau, 0) Vh`` of ``W = U diag(s) Vh``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.dtypes import compute_dtype
from . import svt_autograd
from .thresholds import promote, sum_to_tau

__all__ = ["differentiable_svt", "svt"]


@torch.library.custom_op("compaware::svt", mutates_args=())
def svt(W: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Prox of the nuclear norm: ``P`` ``[..., m, n]`` and its singular values ``[..., min(m, n)]``."""
    X, t = promote(W, tau)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    s = (s - t[..., 0]).clamp_min(0)
    return ((U * s[..., None, :]) @ Vh).to(W.dtype), s


@svt.register_fake
def _(W, tau):
    s = W.new_empty(*W.shape[:-2], min(W.shape[-2:]), dtype=compute_dtype(W.dtype))
    return W.new_empty(W.shape), s


def _svt_backward(ctx, grad_P: Tensor, grad_s: Tensor) -> tuple[Tensor, Tensor]:
    W, tau = ctx.saved_tensors
    X, t = promote(W, tau)
    t = t[..., 0, 0].expand(X.shape[:-2])
    grad_W, grad_t = svt_autograd.first_derivative(X, t, grad_P.to(X.dtype), grad_s.to(X.dtype))
    return grad_W.to(W.dtype), sum_to_tau(grad_t, tau)


def _svt_fold(info, in_dims, W: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """vmap rule: W gets the mapped axis as its first; tau stays one number, or becomes one per matrix."""
    W = W.expand(info.batch_size, *W.shape) if in_dims[0] is None else W.movedim(in_dims[0], 0)
    batch = W.shape[:-2]
    if in_dims[1] is not None:
        tau = tau.movedim(in_dims[1], 0)
        tau = tau.reshape(batch if tau.numel() == batch.numel() else (batch[0], *[1] * len(batch[1:])))
    return W, tau if tau.numel() == 1 else tau.expand(batch)


differentiable_svt = svt_autograd.with_gradient(
    svt, _svt_backward, _svt_fold
)  # the op, also differentiable by torch.func
