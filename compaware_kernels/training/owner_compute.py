"""Sharded layers, each gathered by one process, shrunk there, and scattered again: one all-to-all there, and one back.

Of an m x n layer a process sends ``2 m n (p - 1) / p^2`` numbers, where all p own as much: from about 8 processes on
less than shrinking it where it lies takes. The price is that owners hold whole layers, and alone remember what the next
call wants to know of them, until somebody asks for the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.dtensor import agreed, local, shards_of
from ..proximal.warm_state import WarmState
from .penalties import Job, shrink
from .replicas import as_bytes, assign, from_bytes


def gathering_group(job: Job, fold: str) -> dist.ProcessGroup | None:
    """The processes among which the layer is divided; None where they are no single group: then it has no owner."""
    shards = shards_of(job.weight, fold, job.layer.name)
    return shards.groups[0] if shards and len(shards.groups) == 1 else None


def owners_of(jobs: Sequence[Job], group: dist.ProcessGroup) -> list[int]:
    return assign([job.cost for job in jobs], group.size())


def shrink_at_owners(
    jobs: Sequence[Job], group: dist.ProcessGroup, order: Sequence[str], fold: str, warm: WarmState
) -> None:
    """As :func:`penalties.shrink`, of jobs that are all divided among ``group``."""
    owners = owners_of(jobs, group)
    parts = [[_Part(t) for t in job.tensors] for job in jobs]
    _to_owners(parts, owners, group)
    mine = [i for i, owner in enumerate(owners) if owner == group.rank()]
    whole = [jobs[i].like([part.whole for part in parts[i]]) for i in mine]
    agreed(lambda: shrink(whole, order, fold, warm), [group], local(jobs[0].weight).device)
    _from_owners([each[: len(job.results)] for each, job in zip(parts, jobs, strict=True)], owners, group)


class _Part:
    """A tensor of a layer: what lies here, and at its owner all of it."""

    def __init__(self, t: Tensor):
        self.here, self.shape, self.heights = local(t), t.shape, []  # its size along dim on each process
        self.dim = next((p.dim for p in t.placements if p.is_shard()), None)  # None: the same everywhere
        self.whole = self.here.clone()

    def expected(self, rank: int) -> tuple[torch.Size, torch.dtype]:
        """What comes from a process to the owner."""
        shape = list(self.shape)
        shape[self.dim] = self.heights[rank]
        return torch.Size(shape), self.here.dtype


def _to_owners(parts: Sequence[Sequence[_Part]], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """What is the same everywhere, as a bias where the inputs are divided, the owner has."""
    divided = [
        (part, owner) for each, owner in zip(parts, owners, strict=True) for part in each if part.dim is not None
    ]
    device = divided[0][0].here.device
    mine = torch.tensor([part.here.shape[part.dim] for part, _ in divided], device=device)
    heights = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(heights, mine, group=group)
    for (part, _), found in zip(divided, torch.stack(heights, 1).tolist(), strict=True):
        part.heights = found
    owned = [part for part, owner in divided if owner == group.rank()]
    sent = [[part.here for part, owner in divided if owner == rank] for rank in range(group.size())]
    received = _exchange(sent, [[part.expected(rank) for part in owned] for rank in range(group.size())], device, group)
    for part, *pieces in zip(owned, *received, strict=True):
        part.whole = torch.cat(pieces, part.dim)


def _from_owners(parts: Sequence[Sequence[_Part]], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    of = [[part for each, owner in zip(parts, owners, strict=True) if owner == rank for part in each]
          for rank in range(group.size())]  # fmt: skip
    cut = [[p.whole] * group.size() if p.dim is None else p.whole.split(p.heights, p.dim) for p in of[group.rank()]]
    sent = [[pieces[rank] for pieces in cut] for rank in range(group.size())]
    expected = [[(part.here.shape, part.here.dtype) for part in each] for each in of]
    received = _exchange(sent, expected, parts[0][0].here.device, group)
    for each, tensors in zip(of, received, strict=True):
        for part, t in zip(each, tensors, strict=True):
            part.here.copy_(t)


def _exchange(
    sent: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[tuple[torch.Size, torch.dtype]]],
    device: torch.device,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """All-to-all of lists of tensors, by process, in one message."""
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
