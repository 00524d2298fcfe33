"""Threshold broadcasting: tau, one number or one per matrix, against ``W`` ``[..., m, n]``, and its gradient."""

from __future__ import annotations

from torch import Tensor

from .._utils.dtypes import compute_dtype

__all__ = ["promote", "sum_to_tau"]


def promote(W: Tensor, *taus: Tensor) -> tuple[Tensor, ...]:
    """W and thresholds in the compute dtype; thresholds as ``[..., 1, 1]``, to broadcast over matrices."""
    dtype, batch = compute_dtype(W.dtype), W.shape[:-2]
    return W.to(dtype), *(tau.to(dtype).reshape(() if tau.numel() == 1 else batch)[..., None, None] for tau in taus)


def sum_to_tau(grad: Tensor, tau: Tensor) -> Tensor:
    """Gradient with respect to tau from the gradient per matrix: summed if tau is one number."""
    return (grad.sum() if tau.numel() == 1 else grad).reshape(tau.shape).to(tau.dtype)
