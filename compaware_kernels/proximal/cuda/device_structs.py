"""Device tables: rows of 8-byte fields that mirror the structs of csrc/cuda/step.h."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ..._utils.constants import constant, enumerators, members

__all__ = [
    "ALL_GATES",
    "CHUNK",
    "COEFFICIENTS",
    "DTYPES",
    "GATES",
    "LAYER",
    "METHODS",
    "PAIRS",
    "POWERS",
    "PROBES",
    "REPORT",
    "ROOT_PAIR",
    "ROOT_PAIRS",
    "SIGN_PAIR",
    "SMALL",
    "table",
]

PROBES, POWERS = constant("kProbes"), constant("kPowers")
PAIRS, ROOT_PAIRS = constant("kPairs"), constant("kRootPairs")

_TORCH = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES = {_TORCH[name]: code for code, name in enumerate(enumerators("DType"))}
GATES = enumerators("Gate")
SIGN_PAIR, ROOT_PAIR = len(GATES), len(GATES) + PAIRS
ALL_GATES = ROOT_PAIR + ROOT_PAIRS  # a second pass (firm thresholding) has as many pairs again
COEFFICIENTS = enumerators("Coefficient")
REPORT = enumerators("Report")
_METHOD_TEXT = {
    "zero": "zero", "jacobi32": "jacobi, fp32", "jacobi64": "jacobi, fp64", "nothing": "none", "subspace": "subspace",
    "full": "products", "unsure": "products: the tolerance was not shown", "refused": "refused: NaN or Inf",
}  # fmt: skip
METHODS = tuple(_METHOD_TEXT[name] for name in enumerators("Method"))  # code -> SvtInfo.method

LAYER, SMALL, CHUNK = members("Layer"), members("Small"), members("Chunk")


def table(fields: Sequence[str], rows: Sequence[SimpleNamespace], device: torch.device) -> Tensor:
    """Table int64 ``[rows, fields]`` on the device: numbers by value, tensors by address, missing attributes as 0."""

    def number(value) -> int:
        return value.data_ptr() if isinstance(value, Tensor) else int(value)

    values = np.array([[number(getattr(row, field, 0)) for field in fields] for row in rows], np.int64)
    return torch.from_numpy(values.reshape(len(rows), len(fields))).to(device)
