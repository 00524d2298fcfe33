"""Error feedback for bf16 and fp16 weights: what rounding cuts off in a call is kept and added back in the next one.

A proximal step that changes a weight by less than half an ulp would be rounded away, each time anew. The weight W and
its residual E, int16, together hold the result X of the operator:

    ``W = round(X)``,   ``E = round(2^16 (X - W) / ulp(W))``,   ``X ~ W + 2^-16 E ulp(W)``

with 8 + 16 = 24 significant bits for bf16, those of fp32, and 27 for fp16. As E counts in ulps of the present weight,
a residual moves a weight that the optimizer has changed, or the user has replaced, by at most half of its ulp.

Sources: Kalamkar et al., SC 2020 (bf16 weights split from fp32 ones); Zamirai et al., arXiv 2010.06192, 2020 (error
feedback in bf16 training).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..distributed.dtensor import is_dtensor, local
from ..ops.validation import check_apart, check_writable
from .record import Record

__all__ = ["HALF", "check_residuals", "error_feedback", "residual", "spectrum_size", "warn_if_rounded_away", "widened"]

HALF = (torch.bfloat16, torch.float16)
STEPS = 1 << 16  # of a residual in an ulp: E is less than half an ulp, the most that rounding cuts off
MOST = (1 << 15) - 1  # so that W = round(W + E), to the bit
LEAST_ULP = 2.0**-100  # of weights near 0 in bf16; fp32 cannot divide by smaller ones
_warned: set[str] = set()  # what has been warned of
_seen: set[str] = set()  # what has been looked at once on a GPU, where looking synchronizes


def widened(W: Tensor, E: Tensor, steps: int = STEPS) -> Tensor:
    """``W + E`` in fp32, in new memory; W half, E int16 in units of ``ulp(W) / steps``. A DTensor if W is one."""
    X = W.float()
    local(X).add_(local(E) * (_ulp(local(W)) / steps))
    return X


def residual(X: Tensor, W: Tensor, steps: int = STEPS) -> Tensor:
    """Residual int16 of the fp32 result X that is stored as W, of a half dtype, in units of ``ulp(W) / steps``."""
    return (X - W.float()).div_(_ulp(W)).mul_(steps).round_().clamp_(-MOST, MOST).to(torch.int16)


def _ulp(W: Tensor) -> Tensor:
    """Distance of each element of W, of a half dtype, to the next larger magnitude, fp32."""
    info = torch.finfo(W.dtype)
    power = (W.float().view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |W|)
    return power.clamp_min_(info.smallest_normal).mul_(info.eps).clamp_min_(LEAST_ULP)


def check_residuals(residuals: Sequence[Tensor | None], weights: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise unless there is one residual per weight: int16 and of its shape, or None; None for fp32 and fp64.

    Raises:
        TypeError: not a list of tensors and None.
        ValueError: another number, dtype, shape or device, or memory that is shared.
    """
    if isinstance(residuals, Tensor) or not all(E is None or isinstance(E, Tensor) for E in residuals):
        raise TypeError("residuals: wanted a list of int16 tensors or None, one per weight")
    if len(residuals) != len(weights):
        raise ValueError(f"residuals: wanted {len(weights)}, one per weight; got {len(residuals)}")
    for E, W, name in zip(residuals, weights, names, strict=True):
        if E is None:
            continue
        if W.dtype not in HALF:
            raise ValueError(f"residual of {name}: wanted None for {W.dtype}; got a tensor")
        if E.dtype != torch.int16 or E.shape != W.shape or E.device != W.device or is_dtensor(E) != is_dtensor(W):
            raise ValueError(f"residual of {name}: wanted torch.int16 {list(W.shape)} on {W.device}, distributed as "
                             f"the weight; got {E.dtype} {list(E.shape)} on {E.device}")  # fmt: skip
    given = [(local(E), f"residual of {name}") for E, name in zip(residuals, names, strict=True) if E is not None]
    for E, label in given:
        check_writable(E, label)
    check_apart([E for E, _ in given], [label for _, label in given])


@contextmanager
def error_feedback(records: Sequence[Record], residuals: Sequence[Tensor | None] | None) -> Iterator[None]:
    """Context manager: the records hold fp32 weights ``W + E``, written back at its end as new weights and residuals.

    Args:
        residuals: one per record, None for weights to leave as they are; or None for all of them.
    """
    halves = [(record, record.weight, E) for record, E in zip(records, residuals or (), strict=bool(residuals))
              if E is not None]  # fmt: skip
    for record, W, E in halves:
        record.weight = widened(W, E)
    yield
    for record, W, E in halves:
        W.copy_(record.weight)
        local(E).copy_(residual(local(record.weight), local(W)))


def spectrum_size(record: Record) -> int:
    """Number of singular values of the weight as a matrix, or as a batch of them."""
    W = record.weight
    m, n = W.shape[-2:] if record.fold is None else (len(W), W.shape[1:].numel())
    return W.numel() // max(m, n, 1)


def warn_if_rounded_away(steps: Sequence[tuple[Record, float, int]], do: str) -> None:
    """Warn once if the change of a half-precision weight is below an ulp, so that rounding may cancel it.

    An operator that shrinks ``count`` singular values, rows or elements by tau moves W by at most ``tau sqrt(count)``
    in the Frobenius norm. Measured for the SVT of random matrices in both dtypes: where that is at least
    ``eps ||W||_F``, 0.98 to 1.00 of the shrinkage arrives; at half of it up to 1.17, at a quarter 0.2 to 0.5.

    Args:
        steps: (record, tau, count).
        do: what to do about it; the warning is given once per text. Weights on a GPU are looked at in the first call.
    """
    on_cpu = all(local(record.weight).device.type == "cpu" for record, _, _ in steps)
    if do in _warned or (not on_cpu and do in _seen):
        return
    _seen.add(do)
    for record, tau, count in steps:
        W = local(record.weight)
        if W.dtype not in HALF or not tau > 0:
            continue
        ulp = torch.finfo(W.dtype).eps * float(torch.linalg.vector_norm(W, dtype=torch.float32))
        if tau * math.sqrt(count) < ulp:
            _warned.add(do)
            warnings.warn(f"{record.label}: tau = {tau:.2g} is small against the rounding of {str(W.dtype)[6:]} "
                          f"(eps ||W||_F = {ulp:.2g}), which cancels much of the shrinkage; {do}",
                          stacklevel=2)  # fmt: skip
            return
