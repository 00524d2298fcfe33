"""A proximal step of all layers, wherever they lie: here, the same on several processes, or divided among them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.dtensor import agreed, groups_of, is_dtensor, replicas_of
from ..nn.discovery import Layer
from ..proximal.warm_state import WarmState
from .owner_compute import gathering_group, owners_of, shrink_at_owners
from .penalties import Job, check, shrink
from .replicas import Division, assign, share

log = logging.getLogger(__name__)


class Team:
    """The processes that take proximal steps together.

    Args:
        group: processes that hold the same weights, as DistributedDataParallel's; or None.
        mode: how replicated layers are divided, see :class:`Division`. With ``"owner"``, sharded ones are gathered by
            one process each, too; else they are shrunk where they lie.
    """

    def __init__(self, group: dist.ProcessGroup | None, mode: str):
        self.group, self.mode = group, mode
        self._divisions: dict[tuple, Division] = {}
        self._owned: dict[str, tuple] = {}  # what only one process of a group remembers: the group, which process

    def shrink(self, jobs: Sequence[Job], order: Sequence[str], fold: str, warm: WarmState) -> None:
        """Apply the penalties to the jobs' copies, in place. What one process refuses, all do."""
        weights = [job.weight for job in jobs]
        alike: dict[tuple, list[Job]] = {}
        for job in jobs:
            alike.setdefault(self._replicas(job.weight), []).append(job)
        groups = list(dict.fromkeys([*(group for key in alike for group in key), *groups_of(weights)]))
        if groups:
            agreed(lambda: check(jobs), groups, jobs[0].results[0].device)
            _same_steps(warm, groups, jobs[0].results[0].device)
        for replicas, members in alike.items():
            self._shrink(members, replicas, order, fold, warm)
        warm.calls += 1

    def collect(self, warm: WarmState) -> None:
        """Have on every process what the owners of sharded layers remember."""
        for group in dict.fromkeys(group for group, *_ in self._owned.values()):
            owned = [(key, owner, nothing) for key, (of, owner, nothing) in self._owned.items() if of is group]
            keys, owners, nothing = zip(*owned, strict=True)
            share(group, owners, [[t] for t in nothing], warm, [[key] for key in keys])
        self._owned = {}

    def warn_if_alone(self, layers: Sequence[Layer]) -> None:
        running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        alone = [layer.name for layer in layers if not any(map(is_dtensor, layer.parameters))]
        if running and not self.group and alone:
            log.warning("%s: no DistributedDataParallel, DTensor or process_group: each process takes steps of its own",
                        ", ".join(alone))  # fmt: skip

    def _replicas(self, weight: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """The groups of processes that hold the same of this weight."""
        own = {rank for group in groups_of([weight]) for rank in dist.get_process_group_ranks(group)}
        apart = self.group and len(own & {*dist.get_process_group_ranks(self.group)}) <= 1
        return tuple(group for group in [*replicas_of(weight), *([self.group] if apart else [])] if group.size() > 1)

    def _shrink(self, jobs: list[Job], replicas: tuple[dist.ProcessGroup, ...], order, fold, warm) -> None:
        """What other processes hold, too, one of them shrinks, or all do."""
        if not replicas:
            self._shrink_here(jobs, order, fold, warm)
            self._owned |= self._owners(jobs, fold)
            return
        # The parts of one replica must decide alike, who need not take the same time.
        mode = "owner" if groups_of([job.weight for job in jobs]) else self.mode
        division = self._divisions.setdefault(replicas, Division(replicas[0], mode))
        owners = assign([job.cost for job in jobs], replicas[0].size())
        results, keys = [job.results for job in jobs], [job.keys for job in jobs]

        def work(mine: list[int]) -> None:
            here = [jobs[i] for i in mine]
            agreed(lambda: self._shrink_here(here, order, fold, warm), replicas, results[0][0].device)

        division.run(work, owners, results, warm, keys)
        for group in replicas[1:]:
            share(group, [0] * len(jobs), results, warm, keys)
        for replica in range(replicas[0].size()):
            members = [job for job, owner in zip(jobs, owners, strict=True) if owner == replica]
            self._owned |= self._owners(members, fold)

    def _shrink_here(self, jobs: list[Job], order, fold, warm) -> None:
        """On this process, or where they are divided with those that have the other parts."""
        gathered = self._gathered(jobs, fold)
        shrink([job for job in jobs if not any(job in each for each in gathered.values())], order, fold, warm)
        for group, members in gathered.items():
            shrink_at_owners(members, group, order, fold, warm)

    def _gathered(self, jobs: list[Job], fold: str) -> dict[dist.ProcessGroup, list[Job]]:
        """The sharded layers that have owners, by the processes that have their parts."""
        found: dict[dist.ProcessGroup, list[Job]] = {}
        for job in jobs if self.mode == "owner" else ():
            if group := gathering_group(job, fold):
                found.setdefault(group, []).append(job)
        return found

    def _owners(self, jobs: list[Job], fold: str) -> dict[str, tuple]:
        """What :meth:`collect` wants to know of them."""
        return {
            key: (group, owner, job.results[0].new_empty(0))
            for group, members in self._gathered(jobs, fold).items()
            for job, owner in zip(members, owners_of(members, group), strict=True)
            for key in job.keys
        }


def _same_steps(warm: WarmState, groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Raise ValueError where some processes have taken more steps: a state was loaded on one of them only, perhaps."""
    calls = torch.tensor([warm.calls, -warm.calls], device=device)
    for group in groups:
        dist.all_reduce(calls, dist.ReduceOp.MAX, group)
    most, least = calls[0].item(), -calls[1].item()
    if most != least:
        raise ValueError(f"wanted the same state on every process; some have taken {least} steps, others {most}")
