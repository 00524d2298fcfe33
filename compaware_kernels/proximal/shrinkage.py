"""Group lasso and L1 shrinkage of the local shards of a list of weights, in place; arguments are not validated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.dtensor import column_groups, local
from .record import Record

__all__ = ["Send", "shrink_elements_", "shrink_elements_and_rows_", "shrink_neurons_"]

Send = Callable[[Tensor], Tensor]  # moves thresholds, fp64 [L] on the CPU, to where the op reads them


def _identity(tau: Tensor) -> Tensor:
    return tau


def shrink_neurons_(records: Sequence[Record], tau: Tensor, send: Send = _identity) -> None:
    """Group lasso shrinkage of the rows of L weights ``[O, ...]``: ``w <- max(1 - tau / ||w||_2, 0) w``.

    Args:
        records: w is a row of the weight, with its bias if the record has one.
        tau: fp64 ``[L]`` on the CPU, one per record.
        send: moves thresholds to the device; defaults to leaving them on the CPU.
    """
    alone, with_bias = [], []
    for i, record in enumerate(records):
        if groups := column_groups(record.weight):
            _shrink_column_shards_(local(record.weight), _local_bias(record), float(tau[i]), groups)
        else:
            (alone if record.bias is None else with_bias).append(i)
    if alone:
        _apply_rows(torch.ops.compaware.group_shrink_, [local(records[i].weight) for i in alone], send(tau[alone]))
    if with_bias:
        _shrink_with_biases_([records[i] for i in with_bias], send(tau[with_bias]))


def shrink_elements_(weights: Sequence[Tensor], tau: Tensor) -> None:
    """Soft thresholding of L weights, elementwise: ``w <- sign(w) max(|w| - tau, 0)``; tau fp64 ``[L]``."""
    _apply_rows(torch.ops.compaware.soft_threshold_, [local(W) for W in weights], tau)


def shrink_elements_and_rows_(weights: Sequence[Tensor], l1: Tensor, tau: Tensor) -> None:
    """Sparse group lasso shrinkage of L weights: :func:`shrink_elements_` by l1, then :func:`shrink_neurons_` by tau.

    One fused pass, unless columns are sharded. l1, tau: fp64 ``[L]``.
    """
    if any(map(column_groups, weights)):
        shrink_elements_(weights, l1)
        shrink_neurons_([Record(W) for W in weights], tau)
    else:
        _apply_rows(torch.ops.compaware.sparse_group_shrink_, [local(W) for W in weights], l1, tau)


def _local_bias(record: Record) -> Tensor | None:
    return None if record.bias is None else local(record.bias)


def _shrink_with_biases_(records: Sequence[Record], tau: Tensor) -> None:
    """Group lasso shrinkage of rows ``[W | b]``, in the wider dtype if weight and bias differ."""
    pairs = [(local(record.weight), local(record.bias)) for record in records]
    wide = [torch.promote_types(W.dtype, b.dtype) for W, b in pairs]
    weights = [W.to(dtype) for (W, _), dtype in zip(pairs, wide, strict=True)]
    biases = [b.to(dtype).resolve_neg() for (_, b), dtype in zip(pairs, wide, strict=True)]
    _apply_rows(lambda rows, tau: torch.ops.compaware.neuron_shrink_(rows, biases, tau), weights, tau)
    for parts, results in zip(pairs, zip(weights, biases, strict=True), strict=True):
        for part, result in zip(parts, results, strict=True):
            if result is not part:
                part.copy_(result)


def _shrink_column_shards_(W: Tensor, bias: Tensor | None, tau: float, groups: Sequence[dist.ProcessGroup]) -> None:
    """Group lasso shrinkage of rows ``[W | bias]``; W ``[m, n_j, ...]`` is a column shard of the weight."""
    squares = torch.linalg.vector_norm(W.flatten(1), dim=1, dtype=torch.float64).square()
    for group in groups:
        dist.all_reduce(squares, group=group)
    lengths = squares if bias is None else squares + bias.double().square()
    scale = (1 - tau / lengths.sqrt().clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)
    for part in (W, bias):
        if part is not None:
            part.copy_(part.double() * scale.reshape(-1, *[1] * (part.ndim - 1)))


def _apply_rows(op, weights: Sequence[Tensor], *taus: Tensor) -> None:
    """Run an in-place op on the weights as matrices ``[O, rest]``; copy back those that are not views."""
    matrices = [W.resolve_neg().reshape(W.shape[0] if W.ndim else 1, W.shape[1:].numel()) for W in weights]
    op(matrices, *taus)
    for W, M in zip(weights, matrices, strict=True):
        if M.data_ptr() != W.data_ptr():
            W.copy_(M.reshape(W.shape))
