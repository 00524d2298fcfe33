"""Matrix products with a few columns, by the faster of the libraries PyTorch brings."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGE = 2**20  # multiplications, below which a call costs more than it saves
COLUMNS = 8  # widths are rounded up to these: few shapes for a library that compiles for each
ROWS = 2**18  # elements taken at a time


@cache
def _onednn() -> bool:
    """Whether fp32 products on the CPU go through oneDNN. Where MKL leaves AVX-512 unused they are 2.2 times as fast
    (AMD EPYC Turin: 171 against 75 GFLOP/s on one core); where it uses it, both are the same."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B, for matrices of the same dtype."""
    work = A.shape[0] * A.shape[1] * B.shape[1]
    if work < LARGE or A.dtype != torch.float32 or A.device.type != "cpu" or not _onednn():
        return A @ B
    if A.stride(0) == 1 and A.shape[0] >= B.shape[1]:  # (B^T A^T)^T keeps the large matrix as it lies
        return torch.ops.mkldnn._linear_pointwise(B.mT, A, None, "none", [], "").mT.contiguous()
    return torch.ops.mkldnn._linear_pointwise(A, B.mT, None, "none", [], "")


def times(X: Tensor, Y: Tensor) -> Tensor:
    """X Y: in fp32 where both are, else in fp64."""
    return product(X, Y) if X.dtype == Y.dtype == torch.float32 else torch.ops.compaware.wide_product(X, Y)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y in fp64."""
    return torch.ops.compaware.wide_product(X.mT, Y)


def without(Y: Tensor, U: Tensor) -> Tensor:
    """(I - U U^T) Y for orthonormal U."""
    return Y - product(U, product(U.mT, Y)) if U.shape[1] else Y
