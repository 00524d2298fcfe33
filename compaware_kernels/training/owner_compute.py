"""Sharded layers by owner: one rank gathers each layer, shrinks it and scatters it back, in two all-to-alls.

Of an m x n layer a rank sends ``2 m n (p - 1) / p^2`` numbers, where all p own as much: from about 8 ranks on less than
shrinking it sharded takes. The price: owners hold whole layers, and only they have the warm state of their layers until
it is collected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.collectives import agreed, all_to_all
from ..distributed.dtensor import local, shards_of
from ..proximal.warm_state import WarmState
from .layer_record import LayerRecord
from .penalties import Settings, shrink
from .replicas import assign


def gathering_group(record: LayerRecord) -> dist.ProcessGroup | None:
    """The ranks over which the layer is sharded; None where they are no single group: then it has no owner."""
    shards = shards_of(record.weight, record.fold, record.label)
    return shards.groups[0] if shards and len(shards.groups) == 1 else None


def owners_of(records: Sequence[LayerRecord], group: dist.ProcessGroup) -> list[int]:
    return assign([record.cost for record in records], group.size())


def shrink_at_owners(
    records: Sequence[LayerRecord], group: dist.ProcessGroup, settings: Settings, warm: WarmState
) -> None:
    """As :func:`.penalties.shrink`, of records that are all sharded over ``group``."""
    owners = owners_of(records, group)
    parts = [[_Part(t) for t in record.tensors] for record in records]
    _to_owners(parts, owners, group)
    mine = [i for i, owner in enumerate(owners) if owner == group.rank()]
    whole = [records[i].like([part.whole for part in parts[i]]) for i in mine]
    agreed(lambda: shrink(whole, settings, warm), [group], local(records[0].weight).device)
    results = [each[: len(record.results)] for each, record in zip(parts, records, strict=True)]
    _from_owners(results, owners, group)


class _Part:
    """A tensor of a layer: this rank's shard, and on the owner the whole."""

    def __init__(self, t: Tensor):
        self.here, self.shape, self.heights = local(t), t.shape, []  # its size along dim on each rank
        self.dim = next((p.dim for p in t.placements if p.is_shard()), None)  # None: replicated
        self.whole = self.here.clone()

    def expected(self, rank: int) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of the shard that a rank sends to the owner."""
        shape = list(self.shape)
        shape[self.dim] = self.heights[rank]
        return torch.Size(shape), self.here.dtype


def _to_owners(parts: Sequence[Sequence[_Part]], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Gather; what is replicated, such as a bias where the inputs are sharded, the owner has already."""
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
    expected = [[part.expected(rank) for part in owned] for rank in range(group.size())]
    received = all_to_all(sent, expected, group, device)
    for part, *pieces in zip(owned, *received, strict=True):
        part.whole = torch.cat(pieces, part.dim)


def _from_owners(parts: Sequence[Sequence[_Part]], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    of = [[part for each, owner in zip(parts, owners, strict=True) if owner == rank for part in each]
          for rank in range(group.size())]  # fmt: skip
    cut = [[p.whole] * group.size() if p.dim is None else p.whole.split(p.heights, p.dim) for p in of[group.rank()]]
    sent = [[pieces[rank] for pieces in cut] for rank in range(group.size())]
    expected = [[(part.here.shape, part.here.dtype) for part in each] for each in of]
    received = all_to_all(sent, expected, group, parts[0][0].here.device)
    for each, tensors in zip(of, received, strict=True):
        for part, t in zip(each, tensors, strict=True):
            part.here.copy_(t)
