"""Dtypes that the ops accept, and the dtype each is computed in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DTYPES", "compute_dtype"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: fp32 for fp16 and bf16, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def nearest_tf32(t: Tensor) -> Tensor:
    """fp32 rounded to the 10 explicit bits of tf32, halves away from zero; NaN stays NaN."""
    bits = t.contiguous().view(torch.int32)
    return torch.where(t.isnan(), t, ((bits + 0x1000) & ~0x1FFF).view(torch.float32))
