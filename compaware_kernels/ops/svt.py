"""Singular value thresholding op ``compaware::svt``: ``P = U max(s - tau, 0) Vh`` of ``W = U diag(s) Vh``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.autocast import without_autocast
from .._utils.dtypes import compute_dtype
from .svt_autograd import svt_backward
from .thresholds import fold, promote, sum_to_tau
from .transforms import register_derivatives, register_vmap

__all__ = ["svt"]


@torch.library.custom_op("compaware::svt", mutates_args=())
def svt(W: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Prox of the nuclear norm: ``P`` ``[..., m, n]`` and its singular values ``[..., min(m, n)]``."""
    X, t = promote(W, tau)
    with without_autocast():
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        s = (s - t[..., 0]).clamp_min(0)
        return ((U * s[..., None, :]) @ Vh).to(W.dtype), s


@svt.register_fake
def _(W, tau):
    s = W.new_empty(*W.shape[:-2], min(W.shape[-2:]), dtype=compute_dtype(W.dtype))
    return W.new_empty(W.shape), s


def _backward(ctx, grad_P: Tensor, grad_s: Tensor) -> tuple[Tensor, Tensor]:
    W, tau = ctx.saved_tensors
    X, t = _per_matrix(W, tau)
    grad_W, grad_t = svt_backward(X, t, grad_P.to(X.dtype), grad_s.to(X.dtype))
    return grad_W.to(W.dtype), sum_to_tau(-grad_t.sum(-1), tau)


def _jvp(inputs, W_t: Tensor, tau_t: Tensor) -> tuple[Tensor, Tensor]:
    D, step = _per_matrix(W_t, tau_t)
    steps = step[..., None].expand(*step.shape, min(D.shape[-2:]))
    P_t, s_t = svt_backward(*_per_matrix(*inputs), D, -steps)
    return P_t.to(W_t.dtype), s_t


def _per_matrix(W: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """W in the compute dtype, and one threshold per matrix."""
    X, t = promote(W, tau)
    return X, t[..., 0, 0].expand(X.shape[:-2])


register_derivatives(svt, _backward, _jvp)
register_vmap(svt, fold)
