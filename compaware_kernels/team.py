"""A proximal step of all layers, wherever they lie: here, the same on several processes, or divided among them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .division import Division, assign, share
from .owners import gathering_group, owners_of, shrink_at_owners
from .penalties import Job, check, shrink
from .shards import agreed, groups_of, replicas_of
from .state import WarmState

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
        self._owned: list[tuple] = []  # of the last step: group, owners and keys of what was gathered

    def shrink(self, jobs: Sequence[Job], order: Sequence[str], fold: str, warm: WarmState) -> None:
        """Apply the penalties to the jobs' copies, in place. What one process refuses, all do."""
        weights = [job.weight for job in jobs]
        alike: dict[tuple, list[Job]] = {}
        for job in jobs:
            alike.setdefault(self._replicas(job.weight), []).append(job)
        groups = list(dict.fromkeys([*(group for key in alike for group in key), *groups_of(weights)]))
        if groups:
            agreed(lambda: check(jobs), groups, jobs[0].results[0].device)
        self._owned = []
        for replicas, members in alike.items():
            self._shrink(members, replicas, order, fold, warm)

    def collect(self, warm: WarmState) -> None:
        """Have on every process what the owners of sharded layers remember."""
        for group, owners, keys, nothing in self._owned:
            share(group, owners, [[nothing] for _ in owners], warm, keys)
        self._owned = []

    def warn_if_alone(self, parameters: Sequence[Tensor]) -> None:
        running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if running and not self.group and not groups_of(parameters):
            log.warning("no DistributedDataParallel, DTensor or process_group: each process takes steps of its own")

    def _replicas(self, weight: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """The groups of processes that hold the same of this weight."""
        groups = [*replicas_of(weight), *([self.group] if self.group else [])]
        return tuple(group for group in groups if group.size() > 1)

    def _shrink(self, jobs: list[Job], replicas: tuple[dist.ProcessGroup, ...], order, fold, warm) -> None:
        """What other processes hold, too, one of them shrinks, or all do."""
        if not replicas:
            self._owned += self._owners(jobs, fold)
            self._shrink_here(jobs, order, fold, warm)
            return
        # The parts of one replica must decide alike, who need not remember the same, nor take the same time.
        sharded = bool(groups_of([job.weight for job in jobs]))
        division = self._divisions.setdefault(replicas, Division(replicas[0], "owner" if sharded else self.mode))
        owners = assign([job.cost(WarmState() if sharded else warm) for job in jobs], replicas[0].size())
        results, keys = [job.results for job in jobs], [job.keys for job in jobs]

        def work(mine: list[int]) -> None:
            here = [jobs[i] for i in mine]
            agreed(lambda: self._shrink_here(here, order, fold, warm), replicas, results[0][0].device)

        division.run(work, owners, results, warm, keys)
        for group in replicas[1:]:
            share(group, [0] * len(jobs), results, warm, keys)
        for replica in range(replicas[0].size()):
            members = [job for job, owner in zip(jobs, owners, strict=True) if owner == replica]
            self._owned += self._owners(members, fold)

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

    def _owners(self, jobs: list[Job], fold: str) -> list[tuple]:
        """What :meth:`collect` wants to know of them."""
        return [(group, owners_of(members, group), [job.keys for job in members], members[0].results[0].new_empty(0))
                for group, members in self._gathered(jobs, fold).items()]  # fmt: skip
