"""Triton kernels for the CUDA key. Importing this imports no Triton: the first call does, where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from . import lowrank as lowrank_ops
from . import quarantine

OPS = (
    "svt", "small_svd", "wide_product", "soft_threshold", "group_shrink", "sparse_group_shrink", "svt_",
    "firm_svt_", "soft_threshold_", "group_shrink_", "neuron_shrink_", "sparse_group_shrink_",
    "lowrank_pack", "lowrank_conv2d", "lowrank_conv2d_", "lowrank_linear",
)  # fmt: skip
WANTED = (3, 6)


@cache
def missing() -> str:
    """Why no Triton kernel can run here, whatever the arguments; "" if they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return "" if version >= WANTED else f"triton 3.6 or later is wanted; found {triton.__version__}"


def why_not(x: Tensor, V: Tensor, U: Tensor, groups: int = 1, fold: str = "paper") -> str:
    """Why the Triton kernel does not take these arguments, in words; "" if it does."""
    if reason := missing() or quarantine.refused(quarantine.LOW_RANK, x.device):
        return reason
    from . import triton_lowrank

    return triton_lowrank.why_not(x, V, U, groups, fold)


@cache
def _log_once(op: str, reason: str) -> None:
    logging.getLogger("compaware_kernels").info("%s: two steps, not the fused kernel: %s", op, reason)


def _conv2d(x, V, U, bias, residual, packed, stride, padding, dilation, groups, fold, activation) -> Tensor:
    if reason := why_not(x, V, U, groups, fold):
        _log_once("lowrank_conv2d", reason)
        return lowrank_ops.lowrank_two_step(
            x, V, U, bias, residual, stride, padding, dilation, groups, fold, activation
        )
    from . import triton_lowrank

    y = triton_lowrank.lowrank_conv2d(x, V, U, bias, residual, stride, padding, dilation, activation)
    return y.contiguous(memory_format=lowrank_ops.format_of(x, V))


def _linear(x, V, U, bias, residual, packed, activation) -> Tensor:
    if reason := why_not(x, V, U):
        _log_once("lowrank_linear", reason)
        return lowrank_ops.lowrank_linear_two_step(x, V, U, bias, residual, activation)
    from . import triton_lowrank

    return triton_lowrank.lowrank_linear(x, V, U, bias, residual, activation)


KERNELS: dict[str, Callable[..., Tensor]] = {"lowrank_conv2d": _conv2d, "lowrank_linear": _linear}


def register() -> None:
    """Give the ops of low-rank inference their CUDA implementation."""
    for name, kernel in KERNELS.items():
        torch.library.register_kernel(f"compaware::{name}", "cuda", kernel)
