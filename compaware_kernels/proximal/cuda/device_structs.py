"""The tables of csrc/cuda/step.h and small.h, as numpy structures: every field has 8 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

PROBES, POWERS = 32, 9
PAIRS, ROOT_PAIRS = 14, 8

DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # DType of csrc/core/shrink.h
GATES = ("clear", "try", "apply", "dense", "restart")
SIGN_PAIR, ROOT_PAIR = len(GATES), len(GATES) + PAIRS
ALL_GATES = ROOT_PAIR + ROOT_PAIRS  # and as many pairs again in a second pass
COEFFICIENTS = ("project", "power", "gram", "scale_sign", "scale_root", "correction", "root_check", "keep")
REPORT = ("norm", "error", "rank", "method", "known", "rho")
METHODS = ("zero", "jacobi, fp32", "jacobi, fp64", "none", "subspace", "products",
           "products: the tolerance was not shown", "refused: NaN or Inf")  # fmt: skip

LAYER = (
    "W", "dtype", "m", "n", "k", "number", "passes", "tau", "slope", "partial", "partials", "report", "s", "gates",
    "awake", "coefficients", "omega", "V", "G", "scratch", "S", "H", "L", "mu", "Qs", "Qv", "Qf", "inside", "scaled",
    "F", "left", "skew_U", "skew_V", "first", "powers", "restart", "diagonal", "sign_check", "root_check",
)  # fmt: skip
SMALL = ("W", "dtype", "m", "n", "row", "col", "tau", "slope", "s", "error", "rank", "method")
CHUNK = ("W", "dtype", "first", "count")


def table(fields: Sequence[str], rows: Sequence[SimpleNamespace], device: torch.device) -> Tensor:
    """int64 ``[rows, fields]``: numbers as they are, tensors as their addresses, what a row does not have as 0."""

    def number(value) -> int:
        return value.data_ptr() if isinstance(value, Tensor) else int(value)

    values = np.array([[number(getattr(row, field, 0)) for field in fields] for row in rows], np.int64)
    return torch.from_numpy(values.reshape(len(rows), len(fields))).to(device)
