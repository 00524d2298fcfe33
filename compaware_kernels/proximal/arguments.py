"""Arguments of the in-place operators: checked before anything is written, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._utils.memory import overlapping_pairs, view_of
from ..distributed.collectives import synchronize_errors
from ..distributed.dtensor import communication_device, local, process_groups
from ..ops.validation import check_apart, check_center, checked_list
from .error_feedback import check_residuals, error_feedback, warn_if_rounded_away
from .record import Record

__all__ = ["check_biases", "check_memory", "checked", "checked_center", "on_all_ranks", "records_of", "with_residuals"]


def checked(weights, tau, names, what: str = "tau", axes: int = 2, finite: bool = True) -> Tensor:
    """Thresholds fp64 ``[L]``, checked with the local shards of the weights; an error on one rank is raised on all."""
    return on_all_ranks(lambda: checked_list(_local_shards(weights), tau, names, what, axes, finite), weights)


def on_all_ranks(check, weights: Sequence[Tensor]):
    """The result of ``check()``; an error on one rank is raised on every rank that shares a weight."""
    return synchronize_errors(check, process_groups(weights, replicas=False), communication_device(weights))


def check_memory(records: Sequence[Record], parameters: Sequence[object]) -> None:
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

    on_all_ranks(check, tensors) if biased else check()


def checked_center(
    center: Sequence[Tensor] | None, weights: Sequence[Tensor], names: Sequence[str] | None
) -> Sequence[Tensor] | None:
    """The centers, checked; those that share memory with a weight, which is going to change, as copies."""
    if center is None:
        return None
    on_all_ranks(lambda: check_center(_local_shards(center), _local_shards(weights), names), weights)
    pairs = overlapping_pairs([local(t) for t in (*weights, *center)])
    shared = {j - len(weights) for i, j in pairs if i < len(weights) <= j}
    return [C.clone() if i in shared else C for i, C in enumerate(center)]


def _local_shards(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Local shards of the weights; a single tensor, which the checks refuse, is passed through."""
    return weights if isinstance(weights, Tensor) else [local(W) for W in weights]


def with_residuals(records: Sequence[Record], residuals, taus: Sequence[float], count: Callable[[Record], int]):
    """:func:`.error_feedback`, checked; count: how many numbers of a record are shrunk by its tau."""
    if residuals is not None:
        weights, labels = [record.weight for record in records], [record.label for record in records]
        on_all_ranks(lambda: check_residuals(residuals, weights, labels), weights)
    alone = [i for i in range(len(records)) if residuals is None or residuals[i] is None]
    if not torch.compiler.is_compiling():
        steps = [(records[i], taus[i], count(records[i])) for i in alone]
        warn_if_rounded_away(steps, "residuals=[torch.zeros_like(W, dtype=torch.int16) ...] keeps what it cuts off")
    return error_feedback(records, residuals)


def records_of(
    weights: Sequence[Tensor], names: Sequence[str] | None, fold: str | None = "paper", **lists
) -> list[Record]:
    """One record per weight; ``lists``: further fields of :class:`Record`, each a list with one entry per weight."""
    given = {what: values for what, values in lists.items() if values is not None} | ({"name": names} if names else {})
    for what, values in given.items():
        if len(values) != len(weights):
            raise ValueError(f"{what}: wanted {len(weights)}, one per weight; got {len(values)}")
    return [Record(W, index=i, fold=fold, **{what: values[i] for what, values in given.items()})
            for i, W in enumerate(weights)]  # fmt: skip


def check_biases(biases, weights: Sequence[Tensor], names: Sequence[str] | None) -> None:
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
    checked([b for b, _, _ in given], 0.0, [name for _, _, name in given], axes=1)
