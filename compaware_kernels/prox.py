"""Weights -> shrunk weights: the proximal operators.

``svt``, ``group_shrink``, ``soft_threshold`` and ``sparse_group_shrink`` are functions of (batches of) matrices:
differentiable, batched, traceable by ``torch.compile``.  The forms that end in ``_`` take a network's layers as a
ragged list and change them in place in one call: all of them, or none if anything is wrong.

Every function raises, before anything is changed:

* ``TypeError``: not a tensor, or not fp64, fp32, bf16 or fp16;
* ``ValueError``: fewer axes than a matrix has, a threshold that is negative, not finite or of the wrong shape,
  NaN or Inf in a weight (named by its layer).  Values are not checked while ``torch.compile`` traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import folds, ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SvtInfo:
    """What one SVT did.

    Attributes:
        rank: singular values above tau, per matrix, int64 ``W.shape[:-2]``.
        s: singular values of the result, descending, ``[..., min(m, n)]``.
        error_bound: an upper bound of ``||computed - exact||_F``, fp64 ``W.shape[:-2]``.  A-priori: a dense SVD is
            the exact one of a matrix within ``p(m, n) eps ||W||_2`` (LAPACK Users' Guide, 4.9), here with
            ``p = 2 sqrt(k) max(m, n)`` in the Frobenius norm, k = min(m, n); SVT is non-expansive; rounding the
            result to its dtype comes on top.
        method: the route taken.
        name: the layer's name, where names were given.
    """

    rank: Tensor
    s: Tensor
    error_bound: Tensor
    method: str = "svd"
    name: str | None = None


def svt(W: Tensor, tau: float | Tensor, *, return_info: bool = False) -> Tensor | tuple[Tensor, SvtInfo]:
    """Singular value soft-thresholding, the proximal operator of ``tau ||W||_*``.

    ``prox(W) = argmin_P 1/2 ||P - W||_F^2 + tau ||P||_* = U max(S - tau, 0) V^T``,  ``W = U S V^T``

    Args:
        W: ``[..., m, n]``, fp64, fp32, bf16 or fp16 (half types are computed in fp32).
        tau: threshold >= 0, in the units of W: a number, or a tensor of shape ``W.shape[:-2]``.
        return_info: also return a :class:`SvtInfo`.

    Returns:
        ``P`` ``[..., m, n]`` in the dtype of W, and the info if asked for.

    Differentiable in W and tau, with finite gradients at repeated and at zero singular values.

    Source: Cai, Candes & Shen, SIAM J. Optim. 20(4), 2010, theorem 2.1; Alvarez & Salzmann, NIPS 2017, 3.2.
    """
    W, tau = _checked(W, tau)
    P, s = torch.ops.compaware.svt(W, tau)
    return (P, _svt_info(s.detach(), W, tau.detach())) if return_info else P


def group_shrink(W: Tensor, tau: float | Tensor) -> Tensor:
    """Row-wise shrinkage, the proximal operator of the group lasso ``tau sum_i ||w_i||_2`` over the rows of W.

    ``prox(w) = max(1 - tau / ||w||_2, 0) w``

    Args:
        W: ``[..., m, n]``: m groups of n parameters.
        tau: threshold >= 0: a number, or a tensor of shape ``W.shape[:-2]``.

    Source: Yuan & Lin, J. R. Stat. Soc. B 68(1), 2006; for neurons: Alvarez & Salzmann, NIPS 2016, eq. 8.
    """
    return torch.ops.compaware.group_shrink(*_checked(W, tau))


def soft_threshold(W: Tensor, tau: float | Tensor) -> Tensor:
    """Elementwise shrinkage, the proximal operator of ``tau ||W||_1``:  ``prox(w) = sign(w) max(|w| - tau, 0)``.

    Args:
        W: any shape; ``[..., m, n]`` where tau is a tensor.
        tau: threshold >= 0: a number, or a tensor of shape ``W.shape[:-2]``.

    Source: Donoho, IEEE Trans. Inf. Theory 41(3), 1995.
    """
    if isinstance(W, Tensor) and W.ndim < 2:
        return soft_threshold(W.reshape(1, -1), tau).reshape(W.shape)
    return torch.ops.compaware.soft_threshold(*_checked(W, tau))


def sparse_group_shrink(W: Tensor, l1: float | Tensor, tau: float | Tensor) -> Tensor:
    """The proximal operator of the sparse group lasso ``l1 ||W||_1 + tau sum_i ||w_i||_2``: L1 first, then rows.

    ``prox(W) = group_shrink(soft_threshold(W, l1), tau)``

    Args:
        W: ``[..., m, n]``: m groups of n parameters.
        l1, tau: thresholds >= 0: a number, or a tensor of shape ``W.shape[:-2]``.

    Source: Friedman, Hastie & Tibshirani, arXiv 1001.0736, 2010; Alvarez & Salzmann, NIPS 2016, eq. 9.
    """
    W, l1 = _checked(W, l1, "l1")
    return torch.ops.compaware.sparse_group_shrink(W, l1, _checked_tau(tau, W))


@torch.no_grad()
def svt_(
    weights: Sequence[Tensor],
    tau: float | Sequence[float] | Tensor,
    *,
    fold: str | None = "paper",
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[SvtInfo]:
    """Singular value soft-thresholding of every layer, in place, in one call.

    Args:
        weights: layer weights, ragged.  Linear ``[O, I]`` and convolution ``[O, C/G, *K]`` weights are folded to
            matrices by ``fold``; with ``fold=None`` each weight is taken as it is, ``[..., m, n]``.
        tau: threshold >= 0: a number, or one per layer.
        groups: the convolutions' groups, one per layer (default: all 1).
        names: layer names for errors and the report.

    Returns:
        one :class:`SvtInfo` per layer, its tensors of shape ``[G, ...]`` (or the batch shape with ``fold=None``).

    All or nothing: if any layer is refused, every weight is as it was.
    """
    tau = _checked_list(weights, tau, names)
    groups = [1] * len(weights) if groups is None else groups
    if len(groups) != len(weights):
        raise ValueError(f"groups must have one entry per weight: wanted {len(weights)}, got {len(groups)}")
    mats = [W if fold is None else folds.to_matrix(W, fold, g) for W, g in zip(weights, groups, strict=True)]
    spectra = torch.ops.compaware.svt_(mats, tau)
    for W, M in zip(weights, mats, strict=True):
        if M.data_ptr() != W.data_ptr():  # the fold had to copy
            W.copy_(folds.from_matrix(M, W.shape, fold))
    sizes = [M.shape[:-2].numel() * min(M.shape[-2:]) for M in mats]
    parts = zip(spectra.split(sizes), mats, tau, names or [None] * len(mats), strict=True)
    return [_svt_info(s.reshape(*M.shape[:-2], min(M.shape[-2:])), M, t, name) for s, M, t, name in parts]


@torch.no_grad()
def group_shrink_(
    weights: Sequence[Tensor], tau: float | Sequence[float] | Tensor, *, names: Sequence[str] | None = None
) -> None:
    """Group lasso shrinkage of every layer's rows (neurons: ``W[o]``, whatever the trailing axes), in place.

    ``W[o] <- max(1 - tau / ||W[o]||_2, 0) W[o]``.  Arguments and errors as :func:`svt_`; all or nothing.
    """
    tau = _checked_list(weights, tau, names)
    _apply_rows(torch.ops.compaware.group_shrink_, weights, tau)


@torch.no_grad()
def soft_threshold_(
    weights: Sequence[Tensor], tau: float | Sequence[float] | Tensor, *, names: Sequence[str] | None = None
) -> None:
    """Elementwise soft-thresholding of every tensor, in place; arguments and errors as :func:`svt_`, all or nothing."""
    tau = _checked_list(weights, tau, names, axes=0)
    _apply_rows(torch.ops.compaware.soft_threshold_, weights, tau)


@torch.no_grad()
def sparse_group_shrink_(
    weights: Sequence[Tensor],
    l1: float | Sequence[float] | Tensor,
    tau: float | Sequence[float] | Tensor,
    *,
    names: Sequence[str] | None = None,
) -> None:
    """Sparse group lasso shrinkage of every layer, in place: L1 with ``l1``, then rows with ``tau``; all or nothing."""
    l1, tau = _checked_list(weights, l1, names, "l1"), _checked_list(weights, tau, names)
    _apply_rows(torch.ops.compaware.sparse_group_shrink_, weights, l1, tau)


def _apply_rows(op, weights: Sequence[Tensor], *taus: Tensor) -> None:
    """Run an in-place row op on the weights seen as [O, rest] matrices, writing back where that is not a view."""
    mats = [W.reshape(W.shape[0] if W.ndim else 1, -1) if W.numel() else W.reshape(0, 1) for W in weights]
    op(mats, *taus)
    for W, M in zip(weights, mats, strict=True):
        if M.data_ptr() != W.data_ptr():
            W.copy_(M.reshape(W.shape))


def _svt_info(s: Tensor, W: Tensor, tau: Tensor, name: str | None = None) -> SvtInfo:
    m, n = W.shape[-2:]
    k, s64 = min(m, n), s.double()
    norm_P = s64.square().sum(-1).sqrt()
    norm_W = norm_P + tau.double() * k**0.5  # every discarded singular value is at most tau
    eps = torch.finfo(ops.compute_dtype(W.dtype)).eps
    bound = 2 * k**0.5 * max(m, n) * eps * norm_W + torch.finfo(W.dtype).eps * norm_P
    if W.dtype != torch.float64:  # subnormals round absolutely
        bound = bound + (m * n) ** 0.5 * torch.finfo(W.dtype).smallest_normal * torch.finfo(W.dtype).eps
    return SvtInfo(rank=(s > 0).sum(-1), s=s, error_bound=bound, name=name)


# --- checks ---------------------------------------------------------------------------------------------------------


def _checked(W: Tensor, tau: float | Tensor, what: str = "tau") -> tuple[Tensor, Tensor]:
    _check_weight(W, "W")
    return W, _checked_tau(tau, W, what)


def _check_weight(W: Tensor, name: str, axes: int = 2) -> None:
    if not isinstance(W, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor; got {type(W).__name__}")
    if W.dtype not in DTYPES:
        raise TypeError(f"{name}: wanted dtype {', '.join(str(d)[6:] for d in DTYPES)}; got {str(W.dtype)[6:]}")
    if W.ndim < axes:
        raise ValueError(f"{name}: wanted a matrix or a batch of them, [..., m, n]; got shape {list(W.shape)}")
    if not torch.compiler.is_compiling() and W.numel() and not _largest(W).isfinite():
        raise ValueError(f"{name}: contains {'NaN' if W.isnan().any() else 'Inf'}; nothing was changed")


def _largest(W: Tensor) -> Tensor:
    """max |w|: NaN and Inf come through, and unlike a 2-norm it cannot overflow."""
    return torch.linalg.vector_norm(W.detach(), float("inf"))


def _checked_tau(tau: float | Tensor, W: Tensor, what: str = "tau") -> Tensor:
    t = torch.as_tensor(tau, dtype=ops.compute_dtype(W.dtype), device=W.device)
    if t.ndim and t.shape != W.shape[:-2]:
        raise ValueError(f"{what}: wanted one number, or shape {list(W.shape[:-2])}; got shape {list(t.shape)}")
    _check_values(t, what)
    return t


def _check_values(t: Tensor, what: str) -> None:
    if not torch.compiler.is_compiling() and not (t.isfinite() & (t >= 0)).all():
        raise ValueError(f"{what}: wanted finite thresholds >= 0; got {t.tolist()}")


def _checked_list(
    weights: Sequence[Tensor],
    tau: float | Sequence[float] | Tensor,
    names: Sequence[str] | None,
    what: str = "tau",
    axes: int = 2,
) -> Tensor:
    """Check every weight, and return the thresholds as an fp64 tensor [L] on the CPU."""
    if isinstance(weights, Tensor):
        raise TypeError("weights: wanted a list of tensors, one per layer; got one tensor (put it in a list)")
    if names is not None and len(names) != len(weights):
        raise ValueError(f"names: wanted {len(weights)}, one per weight; got {len(names)}")
    for i, W in enumerate(weights):
        _check_weight(W, names[i] if names else f"weights[{i}]", axes)
    t = torch.as_tensor(tau, dtype=torch.float64, device="cpu")
    if t.ndim and t.shape != (len(weights),):
        raise ValueError(f"{what}: wanted one number, or {len(weights)}, one per weight; got shape {list(t.shape)}")
    _check_values(t, what)
    return t.expand(len(weights)).contiguous()
