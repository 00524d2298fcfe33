"""Owner compute for sharded layers: one rank gathers a layer, shrinks it and scatters it, in two all-to-alls.

Of an m x n layer a rank sends ``2 m n (p - 1) / p^2`` elements if all p ranks own equally much: from about 8 ranks on
less than shrinking it sharded needs. In return an owner holds whole layers, and only it has their warm state until
:meth:`.coordinator.Coordinator.collect_bases`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.collectives import all_to_all, synchronize_errors
from ..distributed.dtensor import local, sharding_of
from ..proximal.warm_state import WarmState
from .layer_record import LayerRecord
from .penalties import Settings, shrink
from .replicas import assign

__all__ = ["gathering_group", "layer_owners", "shrink_at_owners"]


def gathering_group(record: LayerRecord) -> dist.ProcessGroup | None:
    """Process group that the layer is sharded over; None for an unsharded layer and for one sharded over several."""
    sharding = sharding_of(record.weight, record.fold, record.label)
    return sharding.groups[0] if sharding and len(sharding.groups) == 1 else None


def layer_owners(records: Sequence[LayerRecord], group: dist.ProcessGroup) -> list[int]:
    """Rank in ``group`` that owns each layer; the same on all ranks."""
    return assign([record.cost for record in records], group.size())


def shrink_at_owners(
    records: Sequence[LayerRecord], group: dist.ProcessGroup, settings: Settings, warm: WarmState
) -> None:
    """Apply the penalties, in place, to records that are all sharded over ``group``; see :func:`.penalties.shrink`."""
    owners = layer_owners(records, group)
    layers = [[_ShardedTensor(t) for t in record.tensors] for record in records]
    _gather(layers, owners, group)
    mine = [i for i, owner in enumerate(owners) if owner == group.rank()]
    owned = [records[i].with_tensors([t.full for t in layers[i]]) for i in mine]
    synchronize_errors(lambda: shrink(owned, settings, warm), [group], local(records[0].weight).device)
    results = [each[: len(record.results)] for each, record in zip(layers, records, strict=True)]
    _scatter(results, owners, group)


class _ShardedTensor:
    """A tensor of a layer: the shard of this rank, and on the owner, once gathered, the full tensor."""

    def __init__(self, t: Tensor):
        self.shard, self.shape, self.sizes = local(t), t.shape, []  # sizes of the shards along dim, by rank
        self.dim = next((p.dim for p in t.placements if p.is_shard()), None)  # None: replicated
        self.full = self.shard.clone()

    def shard_spec(self, rank: int) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of the shard of a rank."""
        shape = list(self.shape)
        shape[self.dim] = self.sizes[rank]
        return torch.Size(shape), self.shard.dtype


def _gather(layers: Sequence[Sequence[_ShardedTensor]], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Send all shards to the owners. Replicated tensors, as a bias if the inputs are sharded, are not communicated."""
    sharded = [(t, owner) for layer, owner in zip(layers, owners, strict=True) for t in layer if t.dim is not None]
    device = sharded[0][0].shard.device
    mine = torch.tensor([t.shard.shape[t.dim] for t, _ in sharded], device=device)
    sizes = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sizes, mine, group=group)
    for (t, _), found in zip(sharded, torch.stack(sizes, 1).tolist(), strict=True):
        t.sizes = found
    owned = [t for t, owner in sharded if owner == group.rank()]
    sent = [[t.shard for t, owner in sharded if owner == rank] for rank in range(group.size())]
    expected = [[t.shard_spec(rank) for t in owned] for rank in range(group.size())]
    received = all_to_all(sent, expected, group, device)
    for t, *shards in zip(owned, *received, strict=True):
        t.full = torch.cat(shards, t.dim)


def _scatter(layers: Sequence[Sequence[_ShardedTensor]], owners: Sequence[int], group: dist.ProcessGroup) -> None:
    """Send the full tensors of the owners back as shards, in place; replicated tensors are broadcast."""
    by_owner = [[t for layer, owner in zip(layers, owners, strict=True) if owner == rank for t in layer]
                for rank in range(group.size())]  # fmt: skip
    split = [[t.full] * group.size() if t.dim is None else t.full.split(t.sizes, t.dim) for t in by_owner[group.rank()]]
    sent = [[shards[rank] for shards in split] for rank in range(group.size())]
    expected = [[(t.shard.shape, t.shard.dtype) for t in each] for each in by_owner]
    received = all_to_all(sent, expected, group, layers[0][0].shard.device)
    for each, shards in zip(by_owner, received, strict=True):
        for t, shard in zip(each, shards, strict=True):
            t.shard.copy_(shard)
