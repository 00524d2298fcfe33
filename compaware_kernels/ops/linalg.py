"""Small SVDs, products in fp64, and products with a few columns by the faster of the libraries PyTorch brings."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGE = 2**20  # multiplications, below which a call costs more than it saves
COLUMNS = 8  # widths are rounded up to these: few shapes for a library that compiles for each
ROWS = 2**18  # elements taken at a time


@torch.library.custom_op("compaware::small_svd", mutates_args=())
def small_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``[B, m, n]``, fp32 or fp64: U ``[B, m, k]``, s ``[B, k]`` descending, V ``[B, n, k]``."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return U.contiguous(), s, Vh.mT.contiguous()


@small_svd.register_fake
def _(W):
    B, m, n = W.shape
    k = min(m, n)
    return W.new_empty(B, m, k), W.new_empty(B, k), W.new_empty(B, n, k)


@torch.library.custom_op("compaware::wide_product", mutates_args=())
def wide_product(X: Tensor, Y: Tensor) -> Tensor:
    """X ``[m, n]`` times Y ``[n, p]``, each fp32 or fp64, in fp64; X is converted a few rows at a time."""
    step, Y = max(1, 2**18 // max(1, len(Y))), Y.double()
    return torch.cat([part.double() @ Y for part in X.split(step)]) if len(X) else Y.new_empty(0, Y.shape[1])


@wide_product.register_fake
def _(X, Y):
    return Y.new_empty(X.shape[0], Y.shape[1], dtype=torch.float64)


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
    return product(X, Y) if X.dtype == Y.dtype == torch.float32 else wide_product(X, Y)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """X^T Y in fp64."""
    return wide_product(X.mT, Y)


def without(Y: Tensor, U: Tensor) -> Tensor:
    """(I - U U^T) Y for orthonormal U."""
    return Y - product(U, product(U.mT, Y)) if U.shape[1] else Y
