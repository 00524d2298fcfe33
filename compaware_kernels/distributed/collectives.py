"""Collective calls: errors raised on all ranks, tensors as bytes, all-to-all exchanges, resharding of matrices."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_to_all", "as_bytes", "columns_to_rows", "from_bytes", "rows_to_columns",
           "synchronize_errors"]  # fmt: skip

T = TypeVar("T")
TensorSpec = tuple[torch.Size, torch.dtype]  # of a tensor to receive


def synchronize_errors(
    function: Callable[[], T], groups: Sequence[dist.ProcessGroup], device: torch.device | None = None
) -> T:
    """Call ``function`` on every rank of ``groups``; if it raises on any of them, all raise the first rank's error.

    Args:
        function: makes no collective call over ``groups``, in which the others would wait for a rank that has raised.
        groups: without any, the function is just called.
        device: where the flags that are communicated live; default: the CPU.

    Raises:
        Exception: a built-in type as the failing rank raised it, any other as RuntimeError; with its text.
    """
    if not groups:
        return function()
    result = error = None
    try:
        result = function()
    except Exception as raised:  # whatever it is, the others must not wait for this rank
        error = raised
    failed = torch.tensor(int(error is not None), device=device)
    for group in groups:
        dist.all_reduce(failed, dist.ReduceOp.MAX, group)
    errors = [] if error is None else [(type(error).__name__, str(error))]
    for group in groups if failed else ():
        parts = [None] * group.size()
        dist.all_gather_object(parts, errors, group=group)
        errors = [each for part in parts for each in part]
    if failed:
        kind, text = errors[0]
        raise getattr(builtins, kind, RuntimeError)(text) from error
    return result


def as_bytes(t: Tensor) -> Tensor:
    """The elements of a tensor as bytes, uint8 ``[numel x itemsize]``."""
    return t.contiguous().view(-1).view(torch.uint8)


def from_bytes(message: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`as_bytes`; a copy, because a slice of a message may not be aligned for ``dtype``."""
    return message.clone().view(dtype).view(shape)


def all_to_all(
    sent: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[TensorSpec]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Tensor]]:
    """Send a list of tensors to every rank of the group and receive one from each, in one message per pair.

    Args:
        sent: by receiving rank.
        expected: by sending rank, shapes and dtypes of the tensors to receive.

    Returns:
        the tensors received, by sending rank.
    """
    messages = [torch.cat([as_bytes(t) for t in each]) if each else torch.empty(0, dtype=torch.uint8, device=device)
                for each in sent]  # fmt: skip
    counts = [[math.prod(shape) * dtype.itemsize for shape, dtype in each] for each in expected]
    totals = [sum(each) for each in counts]
    received = torch.empty(sum(totals), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(messages), totals, [len(m) for m in messages], group=group)
    return [
        [from_bytes(part, *spec) for part, spec in zip(message.split(sizes), specs, strict=True)]
        for message, sizes, specs in zip(received.split(totals), counts, expected, strict=True)
    ]


def columns_to_rows(M: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reshard a matrix: column shard ``[a, b_j]`` -> row shard ``[a_j, b]``, the rows split evenly over the group."""
    widths, heights = _all_gather_int(M.shape[1], group, M.device), _even_split(len(M), group.size())
    mine = heights[group.rank()]
    expected = [[(torch.Size((mine, width)), M.dtype)] for width in widths]
    received = all_to_all([[part] for part in M.split(heights)], expected, group, M.device)
    return torch.cat([part for (part,) in received], 1)


def rows_to_columns(X: Tensor, shape: torch.Size, group: dist.ProcessGroup) -> Tensor:
    """Inverse of :func:`columns_to_rows`: row shard ``[a_j, b]`` -> column shard of ``shape`` ``[a, b_j]``."""
    widths, heights = _all_gather_int(shape[1], group, X.device), _even_split(shape[0], group.size())
    expected = [[(torch.Size((height, shape[1])), X.dtype)] for height in heights]
    received = all_to_all([[part] for part in X.split(widths, 1)], expected, group, X.device)
    return torch.cat([part for (part,) in received])


def _all_gather_int(number: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """The number of every rank of the group, by rank."""
    mine = torch.tensor([number], device=device)
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts).tolist()


def _even_split(size: int, count: int) -> list[int]:
    return [size // count + (i < size % count) for i in range(count)]
