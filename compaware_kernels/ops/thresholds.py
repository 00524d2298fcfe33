"""Threshold broadcasting: tau, one number or one per matrix, against ``W`` ``[..., m, n]``, its gradient, and vmap."""

from __future__ import annotations

from torch import Tensor

from .._utils.dtypes import compute_dtype

__all__ = ["fold", "promote", "sum_to_tau"]


def promote(W: Tensor, *taus: Tensor) -> tuple[Tensor, ...]:
    """W and thresholds in the compute dtype; thresholds as ``[..., 1, 1]``, to broadcast over matrices."""
    dtype, batch = compute_dtype(W.dtype), W.shape[:-2]
    return W.to(dtype), *(tau.to(dtype).reshape(() if tau.numel() == 1 else batch)[..., None, None] for tau in taus)


def sum_to_tau(grad: Tensor, tau: Tensor) -> Tensor:
    """Gradient with respect to tau from the gradient per matrix: summed if tau is one number."""
    return (grad.sum() if tau.numel() == 1 else grad).reshape(tau.shape).to(tau.dtype)


def fold(info, in_dims, W: Tensor, *taus: Tensor) -> tuple[Tensor, ...]:
    """vmap rule of an op of W and thresholds: W gets the mapped axis as its first, every tau one number per matrix."""
    W = W.expand(info.batch_size, *W.shape) if in_dims[0] is None else W.movedim(in_dims[0], 0)
    batch, folded = W.shape[:-2], []
    for tau, dim in zip(taus, in_dims[1:], strict=True):
        each = tau[None] if dim is None else tau.movedim(dim, 0)
        matrices = [1] * (len(batch) - 1) if each.shape[1:].numel() == 1 else batch[1:]
        folded.append(each.reshape(len(each), *matrices).expand(batch))
    return W, *folded
