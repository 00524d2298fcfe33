"""A proximal step of all layers, wherever they are: on this rank, replicated over ranks, or sharded over them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.collectives import agreed
from ..distributed.dtensor import groups_of, is_dtensor, replicas_of
from ..nn.discovery import Layer
from ..proximal.warm_state import WarmState
from .layer_record import LayerRecord, check
from .owner_compute import gathering_group, owners_of, shrink_at_owners
from .penalties import Settings, shrink
from .replicas import Replicas, assign, share

log = logging.getLogger(__name__)


class Coordinator:
    """The ranks that take proximal steps together, and who computes which layer.

    Args:
        group: ranks that hold the same weights, as DistributedDataParallel's; or None.
        mode: how replicated layers are partitioned, see :class:`.replicas.Replicas`. With ``"owner"``, sharded ones are
            gathered by one rank each, too; else they are shrunk sharded.
        settings: of the penalties.
    """

    def __init__(self, group: dist.ProcessGroup | None, mode: str, settings: Settings):
        self.group, self.mode, self.settings = group, mode, settings
        self._replicas: dict[tuple, Replicas] = {}
        self._owned: dict[str, tuple] = {}  # bases that only one rank of a group has: the group, the rank, an example

    def shrink(self, records: Sequence[LayerRecord], warm: WarmState) -> None:
        """Apply the penalties to the records, in place, and count the step.  What one rank refuses, all do.

        Raises:
            TypeError, ValueError: as :func:`.layer_record.check`; a warm state of another step on some rank.
        """
        if records and dist.is_available() and dist.is_initialized():
            self._shrink_together(records, warm)
        else:
            check(records)
            shrink(records, self.settings, warm)
        warm.advance()

    def _shrink_together(self, records: Sequence[LayerRecord], warm: WarmState) -> None:
        """:meth:`shrink` where there may be other ranks."""
        replicated: dict[tuple, list[LayerRecord]] = {}
        for record in records:
            replicated.setdefault(self._replicas_of(record.weight), []).append(record)
        groups = [*(group for key in replicated for group in key), *groups_of([record.weight for record in records])]
        groups, device = list(dict.fromkeys(groups)), records[0].results[0].device
        agreed(lambda: check(records), groups, device)
        if groups:
            _same_steps(warm, groups, device)
        for replicas, members in replicated.items():
            self._shrink(members, replicas, warm)

    def collect(self, warm: WarmState) -> None:
        """Broadcast the bases that only the owners of sharded layers have."""
        for group in dict.fromkeys(group for group, *_ in self._owned.values()):
            owned = [(key, owner, example) for key, (of, owner, example) in self._owned.items() if of is group]
            keys, owners, examples = zip(*owned, strict=True)
            share(group, owners, [[t] for t in examples], warm, [[key] for key in keys])
        self._owned = {}

    def warn_if_alone(self, layers: Sequence[Layer]) -> None:
        """Log the layers that every rank would shrink by itself although there are several ranks."""
        running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        alone = [layer.name for layer in layers if not any(map(is_dtensor, layer.parameters))]
        if running and not self.group and alone:
            log.warning("%s: no DistributedDataParallel, DTensor or process_group: each process takes steps of its own",
                        ", ".join(alone))  # fmt: skip

    def _replicas_of(self, weight: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """The groups of ranks that hold the same of this weight."""
        own = {rank for group in groups_of([weight]) for rank in dist.get_process_group_ranks(group)}
        apart = self.group and len(own & {*dist.get_process_group_ranks(self.group)}) <= 1
        return tuple(group for group in [*replicas_of(weight), *([self.group] if apart else [])] if group.size() > 1)

    def _shrink(self, records: list[LayerRecord], replicas: tuple[dist.ProcessGroup, ...], warm: WarmState) -> None:
        """Replicated weights: one owner rank updates and broadcasts, or every rank updates redundantly."""
        if not replicas:
            self._shrink_here(records, warm)
            self._owned |= self._owners(records)
            return
        # The shards of one replica must decide alike, and need not take the same time.
        mode = "owner" if groups_of([record.weight for record in records]) else self.mode
        sharing = self._replicas.setdefault(replicas, Replicas(replicas[0], mode))
        owners = assign([record.cost for record in records], replicas[0].size())
        results, keys = [record.results for record in records], [record.keys for record in records]

        def work(mine: list[int]) -> None:
            here = [records[i] for i in mine]
            agreed(lambda: self._shrink_here(here, warm), replicas, results[0][0].device)

        sharing.run(work, owners, results, warm, keys)
        for group in replicas[1:]:
            share(group, [0] * len(records), results, warm, keys)
        for replica in range(replicas[0].size()):
            members = [record for record, owner in zip(records, owners, strict=True) if owner == replica]
            self._owned |= self._owners(members)

    def _shrink_here(self, records: list[LayerRecord], warm: WarmState) -> None:
        """On this rank, sharded layers together with the ranks that have the other shards."""
        gathered = self._gathered(records)
        elsewhere = {id(record) for members in gathered.values() for record in members}
        shrink([record for record in records if id(record) not in elsewhere], self.settings, warm)
        for group, members in gathered.items():
            shrink_at_owners(members, group, self.settings, warm)

    def _gathered(self, records: list[LayerRecord]) -> dict[dist.ProcessGroup, list[LayerRecord]]:
        """The sharded layers that have owners, by the group they are sharded over."""
        found: dict[dist.ProcessGroup, list[LayerRecord]] = {}
        for record in records if self.mode == "owner" else ():
            if group := gathering_group(record):
                found.setdefault(group, []).append(record)
        return found

    def _owners(self, records: list[LayerRecord]) -> dict[str, tuple]:
        """What :meth:`collect` wants to know of them."""
        return {
            key: (group, owner, record.results[0].new_empty(0))
            for group, members in self._gathered(records).items()
            for record, owner in zip(members, owners_of(members, group), strict=True)
            for key in record.keys
        }


def _same_steps(warm: WarmState, groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Raise ValueError where some ranks have taken more steps: a state was loaded on one of them only, perhaps."""
    calls = torch.tensor([warm.calls, -warm.calls], device=device)
    for group in groups:
        dist.all_reduce(calls, dist.ReduceOp.MAX, group)
    most, least = calls[0].item(), -calls[1].item()
    if most != least:
        raise ValueError(f"wanted the same state on every process; some have taken {least} steps, others {most}")
