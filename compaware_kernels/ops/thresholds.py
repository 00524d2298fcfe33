"""Thresholds, one number or one per matrix, as tensors that broadcast over ``W`` ``[..., m, n]``."""

from __future__ import annotations

from torch import Tensor

from .._utils.dtypes import compute_dtype


def promote(W: Tensor, *taus: Tensor) -> tuple[Tensor, ...]:
    """W and its thresholds in the compute dtype; thresholds get two trailing axes to broadcast over matrices."""
    dtype, batch = compute_dtype(W.dtype), W.shape[:-2]
    return W.to(dtype), *(tau.to(dtype).reshape(() if tau.numel() == 1 else batch)[..., None, None] for tau in taus)


def sum_to_tau(grad: Tensor, tau: Tensor) -> Tensor:
    """Sum a per-matrix gradient down to the shape of tau (one number, or one per matrix)."""
    return (grad.sum() if tau.numel() == 1 else grad).reshape(tau.shape).to(tau.dtype)
