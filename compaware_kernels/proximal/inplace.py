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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import folds
from .._utils.memory import overlapping_pairs, view_of
from .._utils.uninterrupted import uninterrupted
from ..distributed.collectives import synchronize_errors
from ..distributed.dtensor import communication_device, local, process_groups
from ..ops.validation import (
    check_above_one,
    check_apart,
    check_center,
    checked_list,
    one_per_weight,
)
from . import solver
from .cuda import backend as gpu
from .error_feedback import check_residuals, error_feedback, spectrum_size, warn_if_rounded_away
from .record import Record
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
    tau = _checked(weights, tau, names, finite=not gpu.on_gpu(weights))
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
    tau = _checked(weights, tau, names, finite=not gpu.on_gpu(weights))
    gamma = _check_on_all_ranks(lambda: one_per_weight(gamma, len(weights), "gamma", check_above_one), weights)
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
    _checked(weights, 0.0, names)
    if len(sigma_weights) != len(weights):
        raise ValueError(f"sigma_weights: wanted {len(weights)}, one sequence per weight; got {len(sigma_weights)}")
    functions = []
    shapes = [torch.empty(W.shape, device="meta") for W in weights]
    for record, w in zip(_records(shapes, names, fold=fold, groups=groups), sigma_weights, strict=True):
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
    _checked(weights, 0.0, names)
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
    radius = _checked(weights, radius, names, "radius")
    functions = [SoftThreshold(t) for t in radius.tolist()]
    return _shrink(weights, functions, state, tol, fold, groups, names, ball=True)


def _checked(weights, tau, names, what: str = "tau", axes: int = 2, finite: bool = True) -> Tensor:
    """Thresholds fp64 ``[L]``, checked with the local shards of the weights; an error on one rank is raised on all."""
    return _check_on_all_ranks(lambda: checked_list(_local_shards(weights), tau, names, what, axes, finite), weights)


def _check_on_all_ranks(check, weights: Sequence[Tensor]):
    """The result of ``check()``; an error on one rank is raised on every rank that shares a weight."""
    return synchronize_errors(check, process_groups(weights, replicas=False), communication_device(weights))


def _check_apart(records: Sequence[Record], parameters: Sequence[object]) -> None:
    """:func:`check_apart` of the local weights and biases; parameters: of the operator, one per record.

    Weights that are tied on one rank are tied on all, so only biases need a collective call.
    """
    biased = [i for i, record in enumerate(records) if record.bias is not None]
    owners = [*range(len(records)), *biased]
    tensors = [record.weight for record in records] + [records[i].bias for i in biased]
    labels = [record.label for record in records] + [f"bias of {records[i].label}" for i in biased]

    def arguments(i: int) -> tuple:
        record = records[owners[i]]
        others = [view_of(local(t)) for t in (record.center, record.bias) if t is not None]
        return parameters[owners[i]], record.groups, others

    def check() -> None:
        check_apart(_local_shards(tensors), labels, lambda i, j: arguments(i) == arguments(j))

    _check_on_all_ranks(check, tensors) if biased else check()


def _unshared(center: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """The centers; those that share memory with a weight, which is going to change, as copies."""
    pairs = overlapping_pairs([local(t) for t in (*weights, *center)])
    shared = {j - len(weights) for i, j in pairs if i < len(weights) <= j}
    return [C.clone() if i in shared else C for i, C in enumerate(center)]


def _local_shards(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Local shards of the weights; a single tensor, which the checks refuse, is passed through."""
    return weights if isinstance(weights, Tensor) else [local(W) for W in weights]


@torch.no_grad()
def _shrink(
    weights, functions, state, tol, fold, groups, names, center=None, residuals=None, ball=False
) -> list[SvtInfo]:
    if not (isinstance(tol, float | int) and 0 < tol < math.inf):
        raise ValueError(f"tol: wanted a number > 0; got {tol!r}")
    if state is not None and not isinstance(state, WarmState):
        raise TypeError(f"state: wanted a WarmState; got {type(state).__name__}")
    if center is not None:
        _check_on_all_ranks(lambda: check_center(_local_shards(center), _local_shards(weights), names), weights)
        center = _unshared(center, weights)
    records = _records(weights, names, fold=fold, groups=groups, center=center)
    _check_apart(records, functions)
    taus = [0.0 if ball or function.ramp is None else function.floor for function in functions]
    with _with_residuals(records, residuals, taus, spectrum_size):
        infos = solver.shrink_(records, functions, tol=tol, state=state, ball=ball)
    if state:
        state.advance()
    return infos


def _with_residuals(records: Sequence[Record], residuals, taus: Sequence[float], count: Callable[[Record], int]):
    """:func:`.error_feedback`, checked; count: how many numbers of a record are shrunk by its tau."""
    if residuals is not None:
        weights, labels = [record.weight for record in records], [record.label for record in records]
        _check_on_all_ranks(lambda: check_residuals(residuals, weights, labels), weights)
    alone = [i for i in range(len(records)) if residuals is None or residuals[i] is None]
    if not torch.compiler.is_compiling():
        steps = [(records[i], taus[i], count(records[i])) for i in alone]
        warn_if_rounded_away(steps, "residuals=[torch.zeros_like(W, dtype=torch.int16) ...] keeps what it cuts off")
    return error_feedback(records, residuals)


def _records(
    weights: Sequence[Tensor], names: Sequence[str] | None, fold: str | None = "paper", **lists
) -> list[Record]:
    """One record per weight; ``lists``: further fields of :class:`Record`, each a list with one entry per weight."""
    given = {what: values for what, values in lists.items() if values is not None} | ({"name": names} if names else {})
    for what, values in given.items():
        if len(values) != len(weights):
            raise ValueError(f"{what}: wanted {len(weights)}, one per weight; got {len(values)}")
    return [Record(W, index=i, fold=fold, **{what: values[i] for what, values in given.items()})
            for i, W in enumerate(weights)]  # fmt: skip


def _traced(op: str, weights, parameters, state, tol, center, residuals, fold, groups, names) -> list[SvtInfo]:
    """The step as one custom op ``compaware::<op>``, traceable by torch.compile; no state, center or residuals."""
    if state is not None or center is not None or residuals is not None:
        raise ValueError(f"{op}: state, center and residuals are not available inside torch.compile")
    mats = [record.matrices() for record in _records(weights, names, fold=fold, groups=groups)]
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
    _check_biases(biases, weights, names)
    tau = _checked(weights, tau, names)
    records = _records(weights, names, bias=biases)
    _check_apart(records, tau.tolist())
    with _with_residuals(records, residuals, tau.tolist(), lambda record: len(record.weight)):
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
    tau = _checked(weights, tau, names, axes=0)
    records = _records(weights, names)
    _check_apart(records, tau.tolist())
    with _with_residuals(records, residuals, tau.tolist(), lambda record: record.weight.numel()):
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
    l1, tau = _checked(weights, l1, names, "l1"), _checked(weights, tau, names)
    records = _records(weights, names)
    _check_apart(records, list(zip(l1.tolist(), tau.tolist(), strict=True)))
    with _with_residuals(records, residuals, tau.tolist(), lambda record: len(record.weight)):
        shrink_elements_and_rows_([record.weight for record in records], l1, tau)


def _check_biases(biases, weights: Sequence[Tensor], names: Sequence[str] | None) -> None:
    """Raise unless every bias given is finite and ``[O]``, with the dtype and device of its weight ``[O, ...]``."""
    if biases is None:
        return
    if len(biases) != len(weights):
        raise ValueError(f"biases: wanted {len(weights)}, one per weight; got {len(biases)}")
    names = names or [f"biases[{i}]" for i in range(len(biases))]
    given = [(b, W, name) for b, W, name in zip(biases, weights, names, strict=True) if b is not None]
    for b, W, name in given:
        if b.shape != W.shape[:1] or b.dtype != W.dtype or b.device != W.device:
            raise ValueError(f"{name}: wanted a bias {W.dtype} {list(W.shape[:1])} on {W.device}; "
                             f"got {b.dtype} {list(b.shape)} on {b.device}")  # fmt: skip
    _checked([b for b, _, _ in given], 0.0, [name for _, _, name in given], axes=1)
