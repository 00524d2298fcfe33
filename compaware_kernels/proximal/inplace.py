"""Proximal operators, in-place form: all layers of a network, a ragged list of weights, updated all or nothing.

Every function raises, before anything is changed:

* ``TypeError``: not a list of tensors, or not dense fp64, fp32, bf16 or fp16; a threshold that is not a real number; a
  state that is not a :class:`WarmState`;
* ``ValueError``: fewer axes than a matrix has, a threshold that is negative, not finite or of the wrong shape, a
  ``gamma`` that is not finite or not above 1, NaN or Inf in a weight (named by its layer), a tolerance that is not
  a positive number, a center that does not match its weight, a state or a center under ``torch.compile``.  Values are
  not checked while ``torch.compile`` traces;
* ``ValueError``: a weight that cannot be written (on the meta device, made in inference mode, expanded) or that shares
  memory with another one.  The same weight may be in the list twice, with the same arguments.

Signals that arrive within a call, as that of Ctrl-C, are handled when it has ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import folds
from .._utils.uninterrupted import uninterrupted
from ..ops.validation import (
    check_above_one,
    one_per_weight,
)
from . import solver
from .arguments import (
    check_biases,
    check_memory,
    checked,
    checked_center,
    on_all_ranks,
    records_of,
    with_residuals,
)
from .cuda import backend as gpu
from .error_feedback import spectrum_size
from .shrinkage import shrink_elements_, shrink_elements_and_rows_, shrink_neurons_
from .spectral_functions import FirmThreshold, SoftThreshold, Truncate, WeightedThreshold
from .svt_info import SvtInfo
from .warm_state import WarmState

__all__ = [
    "firm_svt_",
    "group_shrink_",
    "soft_threshold_",
    "sparse_group_shrink_",
    "spectral_ball_",
    "svt_",
    "truncate_",
    "weighted_svt_",
]


@uninterrupted
@torch.no_grad()
def svt_(
    weights: Sequence[Tensor],
    tau: float | Sequence[float] | Tensor,
    *,
    state: WarmState | None = None,
    tol: float = 1e-3,
    center: Sequence[Tensor] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    fold: str | None = "paper",
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[SvtInfo]:
    """Singular value soft-thresholding of a list of layer weights, in place: prox of the nuclear norm.

    ``W <- C + prox(W - C)``, ``prox(X) = U max(S - tau, 0) V^T``, ``X = U S V^T``

    Each matrix takes the route that is fastest for its shape, rank and tolerance; the report names the route and
    bounds the error.

    Args:
        weights: layer weights, ragged.  Linear ``[O, I]`` and convolution ``[O, C/G, *K]`` weights are folded to
            matrices by ``fold``; with ``fold=None`` each weight is taken as it is, ``[..., m, n]``.
        tau: threshold >= 0: a number, or one per layer.
        state: warm start, kept from one call to the next; it makes later calls cheaper.  Layers are identified by
            name, or by their position in the list if no names are given.
        tol: tolerance of the result, relative to tau, in the spectral norm, before rounding to the dtype of the
            weight.  Estimated from random probes; ``error_bound`` of the report is the bound.
        center: ``C``, one tensor per weight (default: 0): the prox of ``tau ||W - C||_*``.
        residuals: for many small steps on bf16 and fp16 weights: what rounding cuts off of a result is kept here and
            added back at the next call, so that shrinkage below an ulp accumulates as in fp32. One tensor per weight,
            kept by the caller, updated in place: ``torch.zeros_like(W, dtype=torch.int16)`` at first, None for fp32 and
            fp64. Two bytes per number; during the call there is an fp32 copy of these weights. Report and error bound
            are those of the weight with its residual, see :mod:`compaware_kernels.proximal.error_feedback`.
        groups: the convolutions' groups, one per layer (default: all 1).
        names: layer names, for error messages, the report and the state.

    Returns:
        one :class:`SvtInfo` per layer, its tensors of shape ``[G, ...]`` (or the batch shape with ``fold=None``).

    All or nothing: if any layer is refused, all weights and the state stay unchanged.

    Sources: as :func:`svt`; with a center: Alvarez & Salzmann, NIPS 2017, and Moreau's translation rule.
    """
    tau = checked(weights, tau, names, finite=not gpu.on_gpu(weights))
    if torch.compiler.is_compiling():
        return _traced("svt_", weights, [tau], state, tol, center, residuals, fold, groups, names)
    functions = [SoftThreshold(t) for t in tau.tolist()]
    return _shrink(weights, functions, state, tol, fold, groups, names, center, residuals)


@uninterrupted
@torch.no_grad()
def firm_svt_(
    weights: Sequence[Tensor],
    tau: float | Sequence[float] | Tensor,
    gamma: float | Sequence[float] | Tensor,
    *,
    state: WarmState | None = None,
    tol: float = 1e-3,
    center: Sequence[Tensor] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    fold: str | None = "paper",
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[SvtInfo]:
    """Firm singular value thresholding of a list of layer weights, in place: :func:`firm_svt`.

    ``W <- C + F(W - C)``, ``F(X) = U max(min(gamma / (gamma - 1) (S - tau), S), 0) V^T``, ``X = U S V^T``

    Args:
        gamma: > 1: a number, or one per layer.

    Other arguments, report and errors as :func:`svt_`; all or nothing.  F has the Lipschitz constant
    ``gamma / (gamma - 1)``, so the decomposition is computed to a tolerance smaller by this factor.

    Sources: as :func:`firm_svt`.
    """
    tau = checked(weights, tau, names, finite=not gpu.on_gpu(weights))
    gamma = on_all_ranks(lambda: one_per_weight(gamma, len(weights), "gamma", check_above_one), weights)
    if torch.compiler.is_compiling():
        return _traced("firm_svt_", weights, [tau, gamma], state, tol, center, residuals, fold, groups, names)
    functions = [FirmThreshold(*each) for each in zip(tau.tolist(), gamma.tolist(), strict=True)]
    return _shrink(weights, functions, state, tol, fold, groups, names, center, residuals)


@uninterrupted
def weighted_svt_(
    weights: Sequence[Tensor],
    sigma_weights: Sequence[Sequence[float] | Tensor],
    *,
    state: WarmState | None = None,
    tol: float = 1e-3,
    fold: str | None = "paper",
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[SvtInfo]:
    """Weighted singular value thresholding of a list of layer weights, in place: ``max(sigma_i - w_i, 0)``.

    The proximal operator of ``sum_i w_i sigma_i(W)`` with ``0 <= w_1 <= w_2 <= ...`` (larger singular values are
    shrunk less; other orders are refused, as the formula would not give the minimizer).

    Args:
        sigma_weights: per layer ``[min(m, n)]`` weights, ascending, in the units of the singular values.

    Other arguments as :func:`svt_`; ``tol`` is relative to w_1 (fp64 throughout if w_1 = 0).  The operator is
    discontinuous where singular values with different weights coincide: there ``error_bound`` is inf.

    Source: Gu, Zhang, Zuo & Feng, CVPR 2014.
    """
    checked(weights, 0.0, names)
    if len(sigma_weights) != len(weights):
        raise ValueError(f"sigma_weights: wanted {len(weights)}, one sequence per weight; got {len(sigma_weights)}")
    functions = []
    shapes = [torch.empty(W.shape, device="meta") for W in weights]
    for record, w in zip(records_of(shapes, names, fold=fold, groups=groups), sigma_weights, strict=True):
        W = record.matrices()
        w = torch.as_tensor(w, dtype=torch.float64, device="cpu")
        if w.shape != (min(W.shape[-2:]),) or not (w.isfinite().all() and (w >= 0).all() and (w.diff() >= 0).all()):
            what = record.name or f"sigma_weights[{record.index}]"
            raise ValueError(f"{what}: wanted {min(W.shape[-2:])} weights, 0 <= w_1 <= w_2 <= ...; got {w.tolist()}")
        functions.append(WeightedThreshold(w))
    return _shrink(weights, functions, state, tol, fold, groups, names)


@uninterrupted
def truncate_(
    weights: Sequence[Tensor],
    rank: int | Sequence[int],
    *,
    state: WarmState | None = None,
    tol: float = 1e-3,
    fold: str | None = "paper",
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[SvtInfo]:
    """Truncated SVD of a list of layer weights, in place: projection on the matrices of rank at most ``rank``.

    ``W <- sum_{i <= rank} sigma_i u_i v_i^T``

    Args:
        rank: a number >= 0, or one per layer.

    Other arguments as :func:`svt_`; ``tol`` is relative to sigma_rank.  The projection is unique only if
    ``sigma_rank > sigma_{rank+1}``: if rounding cannot separate the two, ``error_bound`` is inf.

    Source: Eckart & Young, Psychometrika 1(3), 1936.
    """
    checked(weights, 0.0, names)
    ranks = [rank] * len(weights) if isinstance(rank, int) else list(rank)
    if len(ranks) != len(weights) or any(not isinstance(r, int) or r < 0 for r in ranks):
        raise ValueError(f"rank: wanted a whole number >= 0, or {len(weights)}, one per weight; got {rank!r}")
    return _shrink(weights, [Truncate(r) for r in ranks], state, tol, fold, groups, names)


@uninterrupted
def spectral_ball_(
    weights: Sequence[Tensor],
    radius: float | Sequence[float] | Tensor,
    *,
    state: WarmState | None = None,
    tol: float = 1e-3,
    fold: str | None = "paper",
    groups: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> list[SvtInfo]:
    """Projection of a list of layer weights, in place, on the spectral norm ball of radius ``radius``.

    ``W <- U min(S, radius) V^T = W - svt(W, radius)``  (Moreau decomposition)

    Args:
        radius: a number >= 0, or one per layer.

    Other arguments as :func:`svt_`; ``tol`` is relative to the radius.

    Source: Moreau, Bull. Soc. Math. France 93, 1965; Parikh & Boyd, Proximal Algorithms, 2014, 6.7.2.
    """
    radius = checked(weights, radius, names, "radius")
    functions = [SoftThreshold(t) for t in radius.tolist()]
    return _shrink(weights, functions, state, tol, fold, groups, names, ball=True)


@torch.no_grad()
def _shrink(
    weights, functions, state, tol, fold, groups, names, center=None, residuals=None, ball=False
) -> list[SvtInfo]:
    if not (isinstance(tol, float | int) and 0 < tol < math.inf):
        raise ValueError(f"tol: wanted a number > 0; got {tol!r}")
    if state is not None and not isinstance(state, WarmState):
        raise TypeError(f"state: wanted a WarmState; got {type(state).__name__}")
    center = checked_center(center, weights, names)
    records = records_of(weights, names, fold=fold, groups=groups, center=center)
    check_memory(records, functions)
    taus = [0.0 if ball or function.ramp is None else function.floor for function in functions]
    with with_residuals(records, residuals, taus, spectrum_size):
        infos = solver.shrink_(records, functions, tol=tol, state=state, ball=ball)
    if state:
        state.advance()
    return infos


def _traced(op: str, weights, parameters, state, tol, center, residuals, fold, groups, names) -> list[SvtInfo]:
    """The step as one custom op ``compaware::<op>``, traceable by torch.compile; no state, center or residuals."""
    if state is not None or center is not None or residuals is not None:
        raise ValueError(f"{op}: state, center and residuals are not available inside torch.compile")
    mats = [record.matrices() for record in records_of(weights, names, fold=fold, groups=groups)]
    spectra, bounds = getattr(torch.ops.compaware, op)(mats, *parameters, tol)
    for W, M in zip(weights, mats, strict=True):
        if fold is not None:
            W.copy_(folds.from_matrix(M, W.shape, fold))
    batches = [M.shape[:-2] for M in mats]
    sizes = [batch.numel() * min(M.shape[-2:]) for batch, M in zip(batches, mats, strict=True)]
    bounds = bounds.split([batch.numel() for batch in batches])
    parts = zip(spectra.split(sizes), bounds, mats, names or [None] * len(mats), strict=True)
    infos = []
    for s, bound, M, name in parts:
        s = s.reshape(*M.shape[:-2], min(M.shape[-2:]))
        infos.append(SvtInfo((s > 0).sum(-1), s, bound.reshape(M.shape[:-2]), "traced", "", name))
    return infos


@uninterrupted
@torch.no_grad()
def group_shrink_(
    weights: Sequence[Tensor],
    tau: float | Sequence[float] | Tensor,
    *,
    biases: Sequence[Tensor | None] | None = None,
    residuals: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Group lasso shrinkage of the rows (neurons) ``W[o]`` of a list of weights ``[O, ...]``, in place.

    ``w <- max(1 - tau / ||w||_2, 0) w``, ``w = W[o]`` or, with its bias, ``w = (W[o], b[o])``.

    Args:
        biases: per layer ``[O]``, of the dtype of the weight and sharded as its rows, or None.
        residuals: as of :func:`svt_`; of the weights, not of the biases.

    Other arguments and errors as :func:`svt_`; all or nothing.
    """
    check_biases(biases, weights, names)
    tau = checked(weights, tau, names)
    records = records_of(weights, names, bias=biases)
    check_memory(records, tau.tolist())
    with with_residuals(records, residuals, tau.tolist(), lambda record: len(record.weight)):
        shrink_neurons_(records, tau)


@uninterrupted
@torch.no_grad()
def soft_threshold_(
    weights: Sequence[Tensor],
    tau: float | Sequence[float] | Tensor,
    *,
    residuals: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Elementwise soft-thresholding of every tensor, in place; arguments and errors as :func:`svt_`, all or nothing."""
    tau = checked(weights, tau, names, axes=0)
    records = records_of(weights, names)
    check_memory(records, tau.tolist())
    with with_residuals(records, residuals, tau.tolist(), lambda record: record.weight.numel()):
        shrink_elements_([record.weight for record in records], tau)


@uninterrupted
@torch.no_grad()
def sparse_group_shrink_(
    weights: Sequence[Tensor],
    l1: float | Sequence[float] | Tensor,
    tau: float | Sequence[float] | Tensor,
    *,
    residuals: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Sparse group lasso shrinkage of a list of weights, in place: L1 by ``l1``, rows by ``tau``; all or nothing."""
    l1, tau = checked(weights, l1, names, "l1"), checked(weights, tau, names)
    records = records_of(weights, names)
    check_memory(records, list(zip(l1.tolist(), tau.tolist(), strict=True)))
    with with_residuals(records, residuals, tau.tolist(), lambda record: len(record.weight)):
        shrink_elements_and_rows_([record.weight for record in records], l1, tau)
