"""Collective calls of several processes: one check for all, tensors as bytes, and all-to-all exchanges."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Kind = tuple[torch.Size, torch.dtype]  # of a tensor that is to come


def agreed(check: Callable[[], T], groups: Sequence[dist.ProcessGroup], device: torch.device | None = None) -> T:
    """Run ``check`` on every process; what it raises on one, the first of them, all raise."""
    if not groups:
        return check()
    result = error = None
    try:
        result = check()
    except Exception as raised:  # whatever it is, the others must not wait for this process
        error = raised
    failed = torch.tensor(int(error is not None), device=device)
    for group in groups:
        dist.all_reduce(failed, dist.ReduceOp.MAX, group)
    words = [] if error is None else [(type(error).__name__, str(error))]
    for group in groups if failed else ():
        parts = [None] * group.size()
        dist.all_gather_object(parts, words, group=group)
        words = [each for part in parts for each in part]
    if failed:
        kind, text = words[0]
        raise getattr(builtins, kind, RuntimeError)(text) from error
    return result


def as_bytes(t: Tensor) -> Tensor:
    """The numbers of t, uint8 ``[bytes]``."""
    return t.contiguous().view(-1).view(torch.uint8)


def from_bytes(message: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`as_bytes`; a copy, since a part of a message need not begin where a number of dtype can."""
    return message.clone().view(dtype).view(shape)


def all_to_all(
    sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Kind]], group: dist.ProcessGroup, device: torch.device
) -> list[list[Tensor]]:
    """Send a list of tensors to every rank of the group and receive one from each, in one message per pair.

    Args:
        sent: by receiving rank.
        expected: by sending rank, shapes and dtypes of what comes.
    """
    messages = [torch.cat([as_bytes(t) for t in each]) if each else torch.empty(0, dtype=torch.uint8, device=device)
                for each in sent]  # fmt: skip
    counts = [[math.prod(shape) * dtype.itemsize for shape, dtype in each] for each in expected]
    totals = [sum(each) for each in counts]
    received = torch.empty(sum(totals), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, torch.cat(messages), totals, [len(m) for m in messages], group=group)
    return [
        [from_bytes(part, *kind) for part, kind in zip(whole.split(sizes), kinds, strict=True)]
        for whole, sizes, kinds in zip(received.split(totals), counts, expected, strict=True)
    ]


def rows_from_columns(M: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reshard a matrix: ``[a, b_j]``, its columns sharded over the group -> ``[a_j, b]``, its rows sharded evenly."""
    widths, heights = all_gather_int(M.shape[1], group, M.device), _even_shares(len(M), group.size())
    mine = heights[group.rank()]
    expected = [[(torch.Size((mine, width)), M.dtype)] for width in widths]
    received = all_to_all([[part] for part in M.split(heights)], expected, group, M.device)
    return torch.cat([part for (part,) in received], 1)


def columns_from_rows(X: Tensor, shape: torch.Size, group: dist.ProcessGroup) -> Tensor:
    """The inverse of :func:`rows_from_columns`: ``[a_j, b]`` -> ``[a, b_j]``, which is ``shape``."""
    widths, heights = all_gather_int(shape[1], group, X.device), _even_shares(shape[0], group.size())
    expected = [[(torch.Size((height, shape[1])), X.dtype)] for height in heights]
    received = all_to_all([[part] for part in X.split(widths, 1)], expected, group, X.device)
    return torch.cat([part for (part,) in received])


def all_gather_int(number: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """The number that each rank has."""
    mine = torch.tensor([number], device=device)
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts).tolist()


def _even_shares(size: int, count: int) -> list[int]:
    return [size // count + (i < size % count) for i in range(count)]
