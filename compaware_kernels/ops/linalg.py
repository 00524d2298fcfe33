"""Dense linear algebra: batched small SVD, fp64 products of tall matrices, and fp32 products through oneDNN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = [
    "BLOCKS",
    "COLUMNS",
    "ROWS",
    "gram",
    "gram_eigh",
    "inner",
    "product",
    "small_svd",
    "subspace_step",
    "sum_of_squares",
    "times",
    "wide_product",
    "without",
]

LARGE = 2**20  # multiplications; below, the oneDNN call overhead exceeds its gain
COLUMNS = 16  # widths are rounded up to multiples of it: whole vectors, and oneDNN compiles a kernel per shape
WEAK = 16  # directions that subspace_step adds
OUTSIDE = 0.98  # their squared lengths outside of the others; below, they are rounding errors
ROWS = 2**18  # elements per block
BLOCKS = 256  # columns from which a Gram matrix is computed in blocks


@torch.library.custom_op("compaware::small_svd", mutates_args=())
def small_svd(W: Tensor, scaled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``[B, m, n]``, fp32 or fp64: U ``[B, m, k]``, s ``[B, k]`` descending, V ``[B, n, k]``.

    Args:
        scaled: the singular vectors of the shorter side times s, which is faster: ``V diag(s) = W^T U`` if m >= n, else
            ``U diag(s) = W V``; those of the longer side may be zero where s is.
    """
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    U, V = U.contiguous(), Vh.mT.contiguous()
    (V if W.shape[1] >= W.shape[2] else U).mul_(s[:, None, :] if scaled else 1)
    return U, s, V


@small_svd.register_fake
def _(W, scaled=False):
    B, m, n = W.shape
    k = min(m, n)
    return W.new_empty(B, m, k), W.new_empty(B, k), W.new_empty(B, n, k)


@torch.library.custom_op("compaware::gram_eigh", mutates_args=())
def gram_eigh(X: Sequence[Tensor], floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenpairs above floor ``[L]`` of ``X^T X``, or ``X X^T`` if that is smaller, k x k, in fp64; X ``[m, n]``.

    Returns the eigenvalues, descending, then zeros, ``[L, K]`` with K the largest k; the eigenvectors, as the first
    rows of k x k numbers for each matrix, one after the other; and the residuals ``||G V - V diag(w)||_F`` ``[L]``.
    """
    values, vectors, residuals = floor.new_zeros(len(X), max((min(x.shape) for x in X), default=0)), [], []
    for x, above, out in zip(X, floor, values, strict=True):
        x = x.double() if x.shape[0] >= x.shape[1] else x.mT.double()
        G = x.mT @ x
        w, V = torch.linalg.eigh(G)
        residuals.append(torch.linalg.vector_norm(G @ V - V * w))
        out[: len(w)] = torch.where(w > above, w, 0).flip(0)
        vectors.append(V.flip(1).mT.flatten())
    empty = floor.new_empty(0)
    return values, torch.cat([empty, *vectors]), torch.stack(residuals) if residuals else empty


@gram_eigh.register_fake
def _(X, floor):
    sizes = [min(x.shape) for x in X]
    shapes = (len(X), max(sizes, default=0)), (sum(k * k for k in sizes),), (len(X),)
    return tuple(map(floor.new_empty, shapes))


@torch.library.custom_op("compaware::wide_product", mutates_args=())
def wide_product(X: Tensor, Y: Tensor) -> Tensor:
    """Product in fp64 of X ``[m, n]`` and Y ``[n, p]``, each fp32 or fp64; X is converted in row blocks."""
    step, Y = max(1, 2**18 // max(1, len(Y))), Y.double()
    return torch.cat([part.double() @ Y for part in X.split(step)]) if len(X) else Y.new_empty(0, Y.shape[1])


@wide_product.register_fake
def _(X, Y):
    return Y.new_empty(X.shape[0], Y.shape[1], dtype=torch.float64)


@torch.library.custom_op("compaware::subspace_step", mutates_args=())
def subspace_step(X: Tensor, V: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of subspace iteration on X ``[m, n]`` from V ``[n, k]``, fp32, and a second one where it matters.

    Returns B ``[n, c]``, near orthonormal: a basis of the columns of ``X^T X V``, and what ``X^T X`` adds to WEAK of
    them, those that X lengthens least but above the threshold, as they converge last; ``Y = X B`` ``[m, c]``; and in
    fp64 the Gram matrices ``[c, c]`` of B and of Y. No columns if those of ``X^T X V`` are nearly dependent.
    """
    B = torch.linalg.qr(product(X.mT, torch.nn.functional.normalize(product(X, V), dim=0))).Q
    Y = product(X, B)
    lengths = torch.linalg.vector_norm(Y, dim=0)
    weak = lengths.masked_fill(lengths <= threshold, torch.inf).argsort()[: min(WEAK, int((lengths > threshold).sum()))]
    more = without(product(X.mT, Y[:, weak] / lengths[weak]), B)
    more = without(torch.linalg.qr(more).Q, B)
    more = more[:, : more.shape[1] * int((more.square().sum(0) > OUTSIDE).all())]
    B, Y = torch.cat([B, more], 1), torch.cat([Y, product(X, more)], 1)
    return B, Y, inner(B, B), inner(Y, Y)


@subspace_step.register_fake
def _(X, V, threshold):
    columns = torch.library.get_ctx().new_dynamic_size()
    gram = V.new_empty(columns, columns, dtype=torch.float64)
    return V.new_empty(X.shape[1], columns), V.new_empty(X.shape[0], columns), gram, gram.clone()


@torch.library.custom_op("compaware::sum_of_squares", mutates_args=())
def sum_of_squares(W: Tensor) -> Tensor:
    """Sum of squares of a contiguous W, fp32 or fp64: a scalar in fp64, on its device."""
    return W.double().square().sum()


sum_of_squares.register_fake(lambda W: W.new_empty((), dtype=torch.float64))


@cache
def _onednn() -> bool:
    """Whether fp32 products on the CPU go through oneDNN: on CPUs with AVX-512.

    Where MKL does not use AVX-512, oneDNN is 2.2 times as fast (AMD EPYC Turin: 171 against 75 GFLOP/s on one core);
    where it does, both are equally fast.
    """
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product(A: Tensor, B: Tensor) -> Tensor:
    """Product ``A B`` of ``[m, n]`` and ``[n, p]`` of the same dtype; large fp32 products on the CPU through oneDNN.

    Where p < m the result is column-major, which oneDNN takes without a copy in the next product.
    """
    work = A.shape[0] * A.shape[1] * B.shape[1]
    if work < LARGE or A.dtype != torch.float32 or A.device.type != "cpu" or not _onednn():
        return A @ B
    if B.shape[1] < A.shape[0]:
        return torch.ops.mkldnn._linear_pointwise(B.mT, A, None, "none", [], "").mT
    return torch.ops.mkldnn._linear_pointwise(A, B.mT, None, "none", [], "")


def gram(X: Tensor) -> Tensor:
    """Gram matrix ``X^T X`` ``[n, n]`` of X ``[m, n]``, in its dtype; of a large one, one triangle, in blocks."""
    n = X.shape[1]
    if n < BLOCKS:
        return product(X.mT, X)
    rows = X.mT.contiguous()  # oneDNN is a thousand times slower where rows are not contiguous
    half = n // 2 // COLUMNS * COLUMNS
    A, B, G = rows[:half].mT, rows[half:].mT, X.new_empty(n, n)
    G[:half, :half], G[half:, half:], G[:half, half:] = gram(A), gram(B), product(A.mT, B)
    G[half:, :half] = G[:half, half:].mT
    return G


def times(X: Tensor, Y: Tensor) -> Tensor:
    """Product ``X Y``, in fp32 if both are fp32, else in fp64."""
    return product(X, Y) if X.dtype == Y.dtype == torch.float32 else wide_product(X, Y)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """Inner product ``X^T Y`` in fp64."""
    return wide_product(X.mT, Y)


def without(Y: Tensor, U: Tensor) -> Tensor:
    """Projection ``(I - U U^T) Y`` onto the orthogonal complement of orthonormal columns U."""
    return Y - product(U, product(U.mT, Y)) if U.shape[1] else Y
