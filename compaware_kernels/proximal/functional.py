"""Proximal operators, functional form: differentiable, batched over ``[..., m, n]``, traceable.

In W and in the thresholds they have first and second derivatives, in reverse and in forward mode (``svt`` and
``firm_svt`` no third, the others any), and all transforms of ``torch.func``: ``grad``, ``vjp``, ``jvp``, ``jacrev``,
``jacfwd``, ``hessian``, ``vmap``.  Where a threshold is met exactly there is no derivative; it counts as below, and as
above at zero.  ``torch.compile``, ``torch.export``, ``make_fx`` and fake tensors trace them.

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
    scale = _unit_scale(W)
    P, s = svt_op(_scaled(W.to(tau.dtype), scale), _scaled_tau(tau, scale))
    P = _scaled(P, 1 / scale).to(W.dtype)
    return (P, _svt_info(P.detach(), s.detach(), scale, tau.detach())) if return_info else P


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
    gamma, scale = checked_tau(gamma, W, "gamma", check_above_one), _unit_scale(W)
    function = FirmThreshold(_scaled_tau(tau, scale), gamma)
    P, s = _sum_of_svt(_scaled(W.to(tau.dtype), scale), function.pieces)
    P = _scaled(P, 1 / scale).to(W.dtype)
    return (P, _svt_info(P.detach(), s.detach(), scale, tau.detach(), function.slope.detach())) if return_info else P


def _sum_of_svt(W: Tensor, pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Linear combination ``sum_i weight_i svt(W, tau_i)`` and its singular values, W in its compute dtype."""
    weights, taus = (torch.stack([x.expand(W.shape[:-2]) for x in each]) for each in zip(*pieces, strict=True))
    taus = taus.clamp_max(torch.finfo(taus.dtype).max)
    P, s = svt_op(W.expand(len(taus), *W.shape), taus)
    return (weights[..., None, None] * P).sum(0), (weights[..., None] * s).sum(0)


def _unit_scale(W: Tensor) -> Tensor:
    """Two powers of two per matrix, ``[2, ..., 1, 1]``, that bring its largest entry near 1: two, as one may overflow.

    1 for ordinary matrices, whose results do not change by a bit. Extreme ones are scaled because a factorization loses
    its accuracy to subnormal numbers, or overflows.
    """
    largest = W.detach().abs().amax((-2, -1), keepdim=True) if W.numel() else W.new_zeros(*W.shape[:-2], 1, 1)
    exponent = -largest.double().log2().floor()
    exponent = torch.where((largest == 0) | (exponent.abs() <= error_bounds.ORDINARY), 0, exponent)
    half = (exponent / 2).floor()
    return torch.stack([half, exponent - half]).exp2().to(compute_dtype(W.dtype))


def _scaled(X: Tensor, scale: Tensor) -> Tensor:
    return X * scale[0] * scale[1]


def _scaled_tau(tau: Tensor, scale: Tensor) -> Tensor:
    """Thresholds of scaled matrices, finite also where they are far above the matrix."""
    return _scaled(tau, scale[..., 0, 0]).clamp_max(torch.finfo(tau.dtype).max)


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


def _svt_info(P: Tensor, s: Tensor, scale: Tensor, tau: Tensor, slope: float | Tensor = 1.0) -> SvtInfo:
    """SvtInfo with the a-priori error bound of ``slope svt(W, .) + (1 - slope) svt(W, .)`` by dense SVDs.

    P, tau: of W.  s ``[..., k]``, in the compute dtype: of the scaled matrix.
    """
    m, n = P.shape[-2:]
    back = 1 / scale[..., 0].double()
    s64 = s.double()
    norm_P = s64.square().sum(-1).sqrt()
    norm_W = norm_P + _scaled(tau.double(), 1 / back[..., 0]) * min(m, n) ** 0.5  # SVT lowers each by at most tau
    bound = (2 * slope - 1) * error_bounds.svd_loss(s.dtype, m, n) * norm_W + torch.finfo(P.dtype).eps * norm_P
    bound = _scaled(bound, back[..., 0]) + error_bounds.storage(P.dtype, 0.0, m * n)
    s = _scaled(s64, back)
    fits = P.isfinite().all(-1).all(-1) & s.isfinite().all(-1)  # else beyond the range of the dtype
    bound = torch.where(fits, bound, torch.inf)
    return SvtInfo(rank=(s > 0).sum(-1), s=s, error_bound=bound)
