"""One proximal step over all layers: local weights, replicated ones (DDP, HSDP), and sharded ones (FSDP2, TP)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.collectives import synchronize_errors
from ..distributed.dtensor import is_dtensor, process_groups, replica_groups
from ..nn.discovery import Layer
from ..proximal.warm_state import WarmState
from .layer_record import LayerRecord, check_records
from .owner_compute import gathering_group, layer_owners, shrink_at_owners
from .penalties import Settings, shrink
from .replicas import ReplicaGroup, assign, broadcast_from_owners

__all__ = ["Coordinator"]

log = logging.getLogger(__name__)


class Coordinator:
    """Decides which rank computes which layer, and runs one proximal step on all ranks together.

    Args:
        group: ranks that hold the same weights, as those of DistributedDataParallel; or None.
        mode: how replicated layers are partitioned over the ranks, see :class:`.replicas.ReplicaGroup`. With
            ``"owner"``, a sharded layer is gathered and computed by one rank, too; else it is computed sharded.
        settings: of the penalties.
    """

    def __init__(self, group: dist.ProcessGroup | None, mode: str, settings: Settings):
        self.group, self.mode, self.settings = group, mode, settings
        self._replica_groups: dict[tuple, ReplicaGroup] = {}
        self._owned: dict[str, tuple] = {}  # key of a basis on one rank -> group, owner, empty tensor of its device

    def shrink(self, records: Sequence[LayerRecord], warm: WarmState) -> None:
        """Apply the penalties to the records, in place, and count the step; an error on one rank is raised on all.

        Raises:
            TypeError, ValueError: as :func:`.layer_record.check_records`.
            ValueError: the warm states of the ranks have counted different numbers of steps.
        """
        if records and dist.is_available() and dist.is_initialized():
            self._shrink_distributed(records, warm)
        else:
            check_records(records)
            shrink(records, self.settings, warm)
        warm.advance()

    def _shrink_distributed(self, records: Sequence[LayerRecord], warm: WarmState) -> None:
        """:meth:`shrink` with an initialized process group."""
        replicated: dict[tuple, list[LayerRecord]] = {}
        for record in records:
            replicated.setdefault(self._groups_of_replicas(record.weight), []).append(record)
        sharded = process_groups([record.weight for record in records])
        groups = list(dict.fromkeys([*(group for key in replicated for group in key), *sharded]))
        device = records[0].results[0].device
        synchronize_errors(lambda: check_records(records), groups, device)
        if groups:
            _check_same_steps(warm, groups, device)
        for replicas, members in replicated.items():
            self._shrink_replicated(members, replicas, warm)

    def collect_bases(self, warm: WarmState) -> None:
        """Broadcast the bases that only the owners of sharded layers have."""
        for group in dict.fromkeys(group for group, *_ in self._owned.values()):
            owned = [(key, owner, example) for key, (of, owner, example) in self._owned.items() if of is group]
            keys, owners, examples = zip(*owned, strict=True)
            broadcast_from_owners(group, owners, [[t] for t in examples], warm, [[key] for key in keys])
        self._owned = {}

    def warn_if_not_distributed(self, layers: Sequence[Layer]) -> None:
        """Log the layers that every rank shrinks on its own although there are several ranks."""
        running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        alone = [layer.name for layer in layers if not any(map(is_dtensor, layer.parameters))]
        if running and not self.group and alone:
            log.warning("%s: no DistributedDataParallel, DTensor or process_group: each rank shrinks its own copy, "
                        "unsynchronized", ", ".join(alone))  # fmt: skip

    def _groups_of_replicas(self, weight: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Process groups, of more than one rank, over which the weight is replicated."""
        own = {rank for group in process_groups([weight]) for rank in dist.get_process_group_ranks(group)}
        # The ranks of self.group hold replicas of this weight, unless it is already distributed over some of them.
        apart = self.group and len(own & {*dist.get_process_group_ranks(self.group)}) <= 1
        groups = [*replica_groups(weight), *([self.group] if apart else [])]
        return tuple(group for group in groups if group.size() > 1)

    def _shrink_replicated(
        self, records: list[LayerRecord], replicas: tuple[dist.ProcessGroup, ...], warm: WarmState
    ) -> None:
        """Replicated weights: one owner rank updates and broadcasts, or every rank updates redundantly.

        Args:
            replicas: groups over which all these weights are replicated; may be empty.
        """
        if not replicas:
            self._shrink_local(records, warm)
            self._owned |= self._basis_owners(records)
            return
        # The shards of one replica must take the same decision, and "auto" decides by times, which may differ.
        mode = "owner" if process_groups([record.weight for record in records]) else self.mode
        replica_group = self._replica_groups.setdefault(replicas, ReplicaGroup(replicas[0], mode))
        owners = assign([record.cost for record in records], replicas[0].size())
        results, keys = [record.results for record in records], [record.keys for record in records]

        def compute(mine: list[int]) -> None:
            own = [records[i] for i in mine]
            synchronize_errors(lambda: self._shrink_local(own, warm), replicas, results[0][0].device)

        replica_group.run(compute, owners, results, warm, keys)
        for group in replicas[1:]:
            broadcast_from_owners(group, [0] * len(records), results, warm, keys)
        for replica in range(replicas[0].size()):
            members = [record for record, owner in zip(records, owners, strict=True) if owner == replica]
            self._owned |= self._basis_owners(members)

    def _shrink_local(self, records: list[LayerRecord], warm: WarmState) -> None:
        """Apply the penalties on this rank; to sharded layers together with the ranks that hold the other shards."""
        gathered = self._gathered_layers(records)
        by_owners = {id(record) for members in gathered.values() for record in members}
        shrink([record for record in records if id(record) not in by_owners], self.settings, warm)
        for group, members in gathered.items():
            shrink_at_owners(members, group, self.settings, warm)

    def _gathered_layers(self, records: list[LayerRecord]) -> dict[dist.ProcessGroup, list[LayerRecord]]:
        """Sharded layers that one owner each gathers and computes, by the group they are sharded over."""
        found: dict[dist.ProcessGroup, list[LayerRecord]] = {}
        for record in records if self.mode == "owner" else ():
            if group := gathering_group(record):
                found.setdefault(group, []).append(record)
        return found

    def _basis_owners(self, records: list[LayerRecord]) -> dict[str, tuple]:
        """Entries of ``_owned`` for the bases of these layers."""
        return {
            key: (group, owner, record.results[0].new_empty(0))
            for group, members in self._gathered_layers(records).items()
            for record, owner in zip(members, layer_owners(members, group), strict=True)
            for key in record.keys
        }


def _check_same_steps(warm: WarmState, groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Raise ValueError if the ranks have taken different numbers of steps, as after loading a state on some only."""
    calls = torch.tensor([warm.calls, -warm.calls], device=device)
    for group in groups:
        dist.all_reduce(calls, dist.ReduceOp.MAX, group)
    most, least = calls[0].item(), -calls[1].item()
    if most != least:
        raise ValueError(f"ProximalStep: wanted the same number of steps on every rank; got {least} to {most}")
