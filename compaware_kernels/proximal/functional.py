"""Proximal operators, functional form: differentiable, batched over ``[..., m, n]``, traceable.

In W and in the thresholds they have first and second derivatives, in reverse and in forward mode (``svt`` and
``firm_svt`` no third, the others any), and all transforms of ``torch.func``: ``grad``, ``vjp``, ``jvp``, ``jacrev``,
``jacfwd``, ``hessian``, ``vmap``.  Where a threshold is met exactly there is no derivative; it counts as below, and as
above at zero.  ``torch.compile``, ``torch.export``, ``make_fx`` and fake tensors trace each as one op.

Every function raises:

* ``TypeError``: not a tensor, or not fp64, fp32, bf16 or fp16;
* ``ValueError``: fewer axes than a matrix has, a threshold that is negative, not finite or of the wrong shape, a
  ``gamma`` that is not finite or not above 1, NaN or Inf in W; under ``vmap``, in any of the batch.  Values are not
  checked while a compiler traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .._utils.dtypes import compute_dtype
from ..ops.svt import svt as svt_op
from ..ops.validation import (
    check_above_one,
    checked,
    checked_tau,
)
from . import error_bounds
from .spectral_functions import FirmThreshold
from .svt_info import SvtInfo

__all__ = ["firm_svt", "group_shrink", "soft_threshold", "sparse_group_shrink", "svt"]


@overload
def svt(W: Tensor, tau: float | Tensor, *, return_info: Literal[False] = False) -> Tensor: ...


@overload
def svt(W: Tensor, tau: float | Tensor, *, return_info: Literal[True]) -> tuple[Tensor, SvtInfo]: ...


def svt(W: Tensor, tau: float | Tensor, *, return_info: bool = False) -> Tensor | tuple[Tensor, SvtInfo]:
    """Singular value soft-thresholding, the proximal operator of ``tau ||W||_*``.

    ``prox(W) = argmin_P 1/2 ||P - W||_F^2 + tau ||P||_* = U max(S - tau, 0) V^T``,  ``W = U S V^T``

    Args:
        W: ``[..., m, n]``, fp64, fp32, bf16 or fp16 (half types are computed in fp32).
        tau: threshold >= 0, in the units of W: a number, or a tensor of shape ``W.shape[:-2]``.
        return_info: also return a :class:`SvtInfo`.

    Returns:
        ``P`` ``[..., m, n]`` in the dtype of W, and the info if asked for.

    Twice differentiable in W and tau, in both modes, with finite gradients at repeated and at zero singular values; the
    third derivative raises NotImplementedError.

    Source: Cai, Candes & Shen, SIAM J. Optim. 20(4), 2010, theorem 2.1; Alvarez & Salzmann, NIPS 2017, 3.2.
    """
    W, tau = checked(W, tau)
    P, s = svt_op(W, tau)
    return (P, _svt_info(s.detach(), W, tau.detach())) if return_info else P


@overload
def firm_svt(
    W: Tensor, tau: float | Tensor, gamma: float | Tensor, *, return_info: Literal[False] = False
) -> Tensor: ...


@overload
def firm_svt(
    W: Tensor, tau: float | Tensor, gamma: float | Tensor, *, return_info: Literal[True]
) -> tuple[Tensor, SvtInfo]: ...


def firm_svt(
    W: Tensor, tau: float | Tensor, gamma: float | Tensor, *, return_info: bool = False
) -> Tensor | tuple[Tensor, SvtInfo]:
    """Firm singular value thresholding: as :func:`svt`, but singular values above ``gamma tau`` are kept unchanged.

    ``F(W) = U f(S) V^T``, ``f(s) = max(min(gamma / (gamma - 1) (s - tau), s), 0)``,  ``W = U S V^T``:  0 up to tau, s
    above gamma tau.  It is the proximal operator of the minimax concave penalty (MCP) of the singular values, computed
    by two SVTs: ``F(W) = (gamma svt(W, tau) - svt(W, gamma tau)) / (gamma - 1)``.

    Args:
        W: ``[..., m, n]``, fp64, fp32, bf16 or fp16 (half types are computed in fp32).
        tau: threshold >= 0, in the units of W: a number, or a tensor of shape ``W.shape[:-2]``.
        gamma: > 1, shaped as tau; gamma -> infinity gives :func:`svt`, gamma -> 1 hard thresholding.
        return_info: also return a :class:`SvtInfo`.

    Returns:
        ``P`` ``[..., m, n]`` in the dtype of W, and the info if asked for.

    Twice differentiable in W, tau and gamma, as :func:`svt`, except where a singular value equals tau or gamma tau.

    Source: Gao & Bruce, WaveShrink with firm shrinkage, Statistica Sinica 7, 1997; Zhang, Nearly unbiased variable
    selection under minimax concave penalty, Ann. Stat. 38(2), 2010.
    """
    W, tau = checked(W, tau)
    function = FirmThreshold(tau, checked_tau(gamma, W, "gamma", check_above_one))
    P, s = _sum_of_svt(W, function.pieces)
    return (P, _svt_info(s.detach(), W, tau.detach(), function.slope.detach())) if return_info else P


def _sum_of_svt(W: Tensor, pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Linear combination ``sum_i weight_i svt(W, tau_i)`` and its singular values, in the compute dtype of W."""
    X, batch = W.to(compute_dtype(W.dtype)), W.shape[:-2]
    weights, taus = (torch.stack([x.expand(batch) for x in each]) for each in zip(*pieces, strict=True))
    taus = taus.clamp_max(torch.finfo(taus.dtype).max)
    P, s = svt_op(X.expand(len(taus), *X.shape), taus)
    return (weights[..., None, None] * P).sum(0).to(W.dtype), (weights[..., None] * s).sum(0)


def group_shrink(W: Tensor, tau: float | Tensor) -> Tensor:
    """Row-wise shrinkage, the proximal operator of the group lasso ``tau sum_i ||w_i||_2`` over the rows of W.

    ``prox(w) = max(1 - tau / ||w||_2, 0) w``

    Args:
        W: ``[..., m, n]``: m groups of n parameters.
        tau: threshold >= 0: a number, or a tensor of shape ``W.shape[:-2]``.

    Source: Yuan & Lin, J. R. Stat. Soc. B 68(1), 2006; for neurons: Alvarez & Salzmann, NIPS 2016, eq. 8.
    """
    return torch.ops.compaware.group_shrink(*checked(W, tau))


def soft_threshold(W: Tensor, tau: float | Tensor) -> Tensor:
    """Elementwise shrinkage, the proximal operator of ``tau ||W||_1``:  ``prox(w) = sign(w) max(|w| - tau, 0)``.

    Args:
        W: any shape; ``[..., m, n]`` where tau is a tensor.
        tau: threshold >= 0: a number, or a tensor of shape ``W.shape[:-2]``.

    Source: Donoho, IEEE Trans. Inf. Theory 41(3), 1995.
    """
    if isinstance(W, Tensor) and W.ndim < 2:
        return soft_threshold(W.reshape(1, -1), tau).reshape(W.shape)
    return torch.ops.compaware.soft_threshold(*checked(W, tau))


def sparse_group_shrink(W: Tensor, l1: float | Tensor, tau: float | Tensor) -> Tensor:
    """Elementwise, then row-wise shrinkage: prox of the sparse group lasso ``l1 ||W||_1 + tau sum_i ||w_i||_2``.

    ``prox(W) = group_shrink(soft_threshold(W, l1), tau)``

    Args:
        W: ``[..., m, n]``: m groups of n parameters.
        l1, tau: thresholds >= 0: a number, or a tensor of shape ``W.shape[:-2]``.

    Source: Friedman, Hastie & Tibshirani, arXiv 1001.0736, 2010; Alvarez & Salzmann, NIPS 2016, eq. 9.
    """
    W, l1 = checked(W, l1, "l1")
    return torch.ops.compaware.sparse_group_shrink(W, l1, checked_tau(tau, W))


def _svt_info(s: Tensor, W: Tensor, tau: Tensor, slope: float | Tensor = 1.0) -> SvtInfo:
    """SvtInfo with the a-priori error bound of ``slope svt(W, .) + (1 - slope) svt(W, .)`` by dense SVDs."""
    m, n = W.shape[-2:]
    k, s64 = min(m, n), s.double()
    norm_P = s64.square().sum(-1).sqrt()
    norm_W = norm_P + tau.double() * k**0.5  # SVT lowers a singular value by at most tau
    loss = (2 * slope - 1) * error_bounds.svd_loss(compute_dtype(W.dtype), m, n)
    bound = loss * norm_W + torch.finfo(W.dtype).eps * norm_P
    if W.dtype != torch.float64:  # subnormals have an absolute rounding error
        bound = bound + (m * n) ** 0.5 * torch.finfo(W.dtype).smallest_normal * torch.finfo(W.dtype).eps
    return SvtInfo(rank=(s > 0).sum(-1), s=s, error_bound=bound)
