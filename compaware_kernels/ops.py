"""The op table: for every op of ``torch.ops.compaware`` its schema, reference body, fake and gradient, once.

The reference body is plain PyTorch and runs on any device. The C++ library, where it is built, registers faster
bodies for a dispatch key (CPU, CUDA) over it; nothing else changes. The ops check shapes only. Values (finite
weights, non-negative thresholds) are checked by the public functions of :mod:`compaware_kernels.prox`.

Conventions: ``W`` is ``[..., m, n]`` and every ``tau`` holds one number, or one per matrix (``W.shape[:-2]``).
fp16 and bf16 are computed in fp32. In-place ops take a ragged list and one threshold per entry, write nothing
until every result is known, and take weights of any strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import spectral_grad
from ._utils.dtypes import compute_dtype

__all__ = ["schemas"]


def _promote(W: Tensor, *taus: Tensor) -> tuple[Tensor, ...]:
    """W and its thresholds in the compute dtype; thresholds get two trailing axes to broadcast over matrices."""
    dtype, batch = compute_dtype(W.dtype), W.shape[:-2]
    return W.to(dtype), *(tau.to(dtype).reshape(() if tau.numel() == 1 else batch)[..., None, None] for tau in taus)


def _to_tau(grad: Tensor, tau: Tensor) -> Tensor:
    """Sum a per-matrix gradient down to the shape of tau (one number, or one per matrix)."""
    return (grad.sum() if tau.numel() == 1 else grad).reshape(tau.shape).to(tau.dtype)


# --- svt: P = U max(S - tau, 0) V^T ---------------------------------------------------------------------------------


@torch.library.custom_op("compaware::svt", mutates_args=())
def svt(W: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    X, t = _promote(W, tau)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    s = (s - t[..., 0]).clamp_min(0)
    return ((U * s[..., None, :]) @ Vh).to(W.dtype), s


@svt.register_fake
def _(W, tau):
    s = W.new_empty(*W.shape[:-2], min(W.shape[-2:]), dtype=compute_dtype(W.dtype))
    return W.new_empty(W.shape), s


def _svt_backward(ctx, grad_P: Tensor, grad_s: Tensor) -> tuple[Tensor, Tensor]:
    W, tau = ctx.saved_tensors
    X, t = _promote(W, tau)
    t = t[..., 0, 0].expand(X.shape[:-2])
    grad_W, grad_t = spectral_grad.first_derivative(X, t, grad_P.to(X.dtype), grad_s.to(X.dtype))
    return grad_W.to(W.dtype), _to_tau(grad_t, tau)


def _svt_fold(info, in_dims, W: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The mapped axis goes in front of W's; tau stays one number, or becomes one per matrix."""
    W = W.expand(info.batch_size, *W.shape) if in_dims[0] is None else W.movedim(in_dims[0], 0)
    batch = W.shape[:-2]
    if in_dims[1] is not None:
        tau = tau.movedim(in_dims[1], 0)
        tau = tau.reshape(batch if tau.numel() == batch.numel() else (batch[0], *[1] * len(batch[1:])))
    return W, tau if tau.numel() == 1 else tau.expand(batch)


differentiable_svt = spectral_grad.with_gradient(svt, _svt_backward, _svt_fold)  # the op, under torch.func too


# --- small_svd: W = U diag(s) V^T for many small matrices -----------------------------------------------------------


@torch.library.custom_op("compaware::small_svd", mutates_args=())
def small_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``[B, m, n]``, fp32 or fp64: U ``[B, m, k]``, s ``[B, k]`` descending, V ``[B, n, k]``."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return U.contiguous(), s, Vh.mT.contiguous()


@small_svd.register_fake
def _(W):
    B, m, n = W.shape
    k = min(m, n)
    return W.new_empty(B, m, k), W.new_empty(B, k), W.new_empty(B, n, k)


# --- wide_product: X Y in fp64 --------------------------------------------------------------------------------------


@torch.library.custom_op("compaware::wide_product", mutates_args=())
def wide_product(X: Tensor, Y: Tensor) -> Tensor:
    """X ``[m, n]`` times Y ``[n, p]``, each fp32 or fp64, in fp64; X is converted a few rows at a time."""
    step, Y = max(1, 2**18 // max(1, len(Y))), Y.double()
    return torch.cat([part.double() @ Y for part in X.split(step)]) if len(X) else Y.new_empty(0, Y.shape[1])


@wide_product.register_fake
def _(X, Y):
    return Y.new_empty(X.shape[0], Y.shape[1], dtype=torch.float64)


# --- soft_threshold: sign(w) max(|w| - tau, 0) ----------------------------------------------------------------------


@torch.library.custom_op("compaware::soft_threshold", mutates_args=())
def soft_threshold(W: Tensor, tau: Tensor) -> Tensor:
    X, t = _promote(W, tau)
    return _soft(X, t).to(W.dtype).contiguous()


def _soft(X: Tensor, t: Tensor) -> Tensor:
    return X - X.clamp(-t, t)  # in this form NaN stays NaN


def _soft_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    W, tau = ctx.saved_tensors
    X, t = _promote(W, tau)
    grad_W, grad_t = _soft_vjp(X, t, grad.to(X.dtype))
    return grad_W.to(W.dtype), _to_tau(grad_t, tau)


def _soft_vjp(X: Tensor, t: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    active = (X.abs() > t) | (t == 0)
    return G * active, -(G * X.sign() * active).sum((-2, -1))


# --- group_shrink: max(1 - tau / ||w||_2, 0) w, for every row w -----------------------------------------------------


@torch.library.custom_op("compaware::group_shrink", mutates_args=())
def group_shrink(W: Tensor, tau: Tensor) -> Tensor:
    X, t = _promote(W, tau)
    return _group(X, t).to(W.dtype).contiguous()


def _group(X: Tensor, t: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return X * torch.where(t == 0, 1, torch.where(norm <= t, 0, 1 - t / norm))


def _group_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    W, tau = ctx.saved_tensors
    X, t = _promote(W, tau)
    grad_W, grad_t = _group_vjp(X, t, grad.to(X.dtype))
    return grad_W.to(W.dtype), _to_tau(grad_t, tau)


def _group_vjp(X: Tensor, t: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    alive = (norm > t).to(X.dtype)
    unit = X / torch.where(norm > t, norm, 1) * alive
    along = (unit * G).sum(-1, keepdim=True)
    kept = t / torch.where(norm > t, norm, 1)
    identity = torch.where(t == 0, torch.ones_like(alive), alive)
    return identity * G - kept * (alive * G - unit * along), -along.sum((-2, -1))


# --- sparse_group_shrink: group_shrink(soft_threshold(W, l1), tau) --------------------------------------------------


@torch.library.custom_op("compaware::sparse_group_shrink", mutates_args=())
def sparse_group_shrink(W: Tensor, l1: Tensor, tau: Tensor) -> Tensor:
    X, a, t = _promote(W, l1, tau)
    return _group(_soft(X, a), t).to(W.dtype).contiguous()


def _sparse_group_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    W, l1, tau = ctx.saved_tensors
    X, a, t = _promote(W, l1, tau)
    grad_soft, grad_t = _group_vjp(_soft(X, a), t, grad.to(X.dtype))
    grad_W, grad_a = _soft_vjp(X, a, grad_soft)
    return grad_W.to(W.dtype), _to_tau(grad_a, l1), _to_tau(grad_t, tau)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


for _op, _backward in (
    (soft_threshold, _soft_backward),
    (group_shrink, _group_backward),
    (sparse_group_shrink, _sparse_group_backward),
):
    _op.register_fake(lambda W, *taus: W.new_empty(W.shape))
    _op.register_autograd(_backward, setup_context=_save_inputs)


# --- in-place forms: every layer in one call ------------------------------------------------------------------------


@torch.library.custom_op("compaware::svt_", mutates_args={"weights"})
def svt_(weights: Sequence[Tensor], tau: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Returns the shrunk singular values and the error bounds of all matrices, concatenated, fp64, on their device."""
    from .prox import svt_  # the engine, which is built on these ops

    infos, like = svt_(weights, tau, tol=tol, fold=None), weights[0] if weights else tau
    empty = like.new_empty(0, dtype=torch.float64)
    found = ([getattr(info, what).flatten().to(like.device) for info in infos] for what in ("s", "error_bound"))
    return tuple(torch.cat([empty, *parts]) for parts in found)


@svt_.register_fake
def _(weights, tau, tol):
    batches = [W.shape[:-2].numel() for W in weights]
    spectra = sum(count * min(W.shape[-2:]) for W, count in zip(weights, batches, strict=True))
    like = weights[0] if weights else tau
    return like.new_empty(spectra, dtype=torch.float64), like.new_empty(sum(batches), dtype=torch.float64)


@torch.library.custom_op("compaware::soft_threshold_", mutates_args={"weights"})
def soft_threshold_(weights: Sequence[Tensor], tau: Tensor) -> None:
    _write(weights, [soft_threshold._opoverload(W, t) for W, t in _pairs(weights, tau)])


@torch.library.custom_op("compaware::group_shrink_", mutates_args={"weights"})
def group_shrink_(weights: Sequence[Tensor], tau: Tensor) -> None:
    _write(weights, [group_shrink._opoverload(W, t) for W, t in _pairs(weights, tau)])


@torch.library.custom_op("compaware::neuron_shrink_", mutates_args={"weights", "biases"})
def neuron_shrink_(weights: Sequence[Tensor], biases: Sequence[Tensor], tau: Tensor) -> None:
    """group_shrink_ of rows [w, b]: a bias per row, ``[..., m]``, belongs to its group."""
    rows = [torch.cat([W, b[..., None]], -1) for W, b in zip(weights, biases, strict=True)]
    shrunk = [group_shrink._opoverload(R, t) for R, t in _pairs(rows, tau)]
    _write([*weights, *biases], [*(P[..., :-1] for P in shrunk), *(P[..., -1] for P in shrunk)])


@torch.library.custom_op("compaware::sparse_group_shrink_", mutates_args={"weights"})
def sparse_group_shrink_(weights: Sequence[Tensor], l1: Tensor, tau: Tensor) -> None:
    taus = zip(_pairs(weights, l1), _pairs(weights, tau), strict=True)
    _write(weights, [sparse_group_shrink._opoverload(W, a, t) for (W, a), (_, t) in taus])


def _pairs(weights: Sequence[Tensor], tau: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(W, t.to(W.device)) for W, t in zip(weights, tau.unbind(), strict=True)]


def _write(weights: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    for W, P in zip(weights, results, strict=True):
        W.copy_(P)


for _op in (soft_threshold_, group_shrink_, neuron_shrink_, sparse_group_shrink_):
    _op.register_fake(lambda *args: None)


schemas: dict[str, str] = {
    op._name.removeprefix("compaware::"): str(op._opoverload._schema)
    for op in (
        svt, small_svd, wide_product, soft_threshold, group_shrink, sparse_group_shrink,
        svt_, soft_threshold_, group_shrink_, neuron_shrink_, sparse_group_shrink_,
    )
}  # fmt: skip
