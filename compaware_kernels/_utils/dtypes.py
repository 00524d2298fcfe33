"""Dtypes that the ops accept, and the dtype each is computed in."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "compute_dtype"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: fp32 for fp16 and bf16, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
