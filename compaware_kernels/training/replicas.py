"""Replicated weights (DDP, HSDP): layers are partitioned over ranks and broadcast; replicas stay bitwise identical.

A layer's owner computes it and broadcasts the result with the warm state of the layer, so that the weights stay bitwise
identical whatever the ranks run on. Where broadcasting costs more than computing all layers on every rank, every rank
computes, and that is checked: one fingerprint per tensor is compared, and where they differ the owner's results are
broadcast.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.collectives import as_bytes, from_bytes
from ..proximal.warm_state import WarmState

log = logging.getLogger(__name__)
MODES = ("auto", "owner", "replicated")
REVIEW = 16  # proximal steps after which "auto" measures again
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of bases
WORDS = 256


class Replicas:
    """The ranks of a group that hold the same weights, and how they share the layers.

    Args:
        mode: ``"owner"``: each layer is computed by one process; ``"replicated"``: by all; ``"auto"``: by the faster
            way, as measured at the first step and at every 16th. All processes decide alike.

    Attributes:
        seconds: what the last measured step took with owners, and what all layers would have taken everywhere.
    """

    def __init__(self, group: dist.ProcessGroup, mode: str = "auto"):
        self.group, self.mode, self.step = group, mode, 0
        self.replicated = mode == "replicated"
        self.seconds: dict[str, float] = {}

    def run(
        self,
        work: Callable[[list[int]], None],
        owners: Sequence[int],
        results: Sequence[list[Tensor]],
        warm: WarmState,
        keys: Sequence[list[str]],
    ) -> None:
        """Do the work on every layer, here or elsewhere, and have all results here.

        Args:
            work: computes the layers of these numbers, in place in their ``results``.
            owners: of each layer, see :func:`assign`.
            results: of each layer, tensors of the same shapes on every process.
            keys: under which ``warm`` remembers each layer.
        """
        if self.mode == "auto" and self.step % REVIEW == 0:
            self.replicated = False
        self.step += 1
        start = time.perf_counter()
        work([i for i, owner in enumerate(owners) if self.replicated or owner == self.group.rank()])
        computing = time.perf_counter() - start
        if self.replicated and not self._differ(results):
            return
        share(self.group, owners, results, warm, keys)
        if self.mode == "auto":
            self._decide(computing, time.perf_counter() - start - computing, results[0][0].device)

    def _decide(self, computing: float, sharing: float, device: torch.device) -> None:
        total = torch.tensor([computing], dtype=torch.float64, device=device)
        most = torch.tensor([computing, sharing], dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        self.seconds = {"owner": float(most.sum()), "replicated": float(total)}
        self.replicated = self.seconds["replicated"] < self.seconds["owner"]

    def _differ(self, results: Sequence[list[Tensor]]) -> bool:
        """Whether any process has other bits: then owners compute from now on."""
        prints = torch.stack([fingerprint(t) for layer in results for t in layer])
        both = torch.stack([prints, -prints])
        dist.all_reduce(both, dist.ReduceOp.MAX, self.group)
        differ = bool((both[0] != -both[1]).any())
        if differ:
            log.warning("a proximal step gave other bits on another process; from now on each layer has an owner")
            self.mode, self.replicated = "owner", False
        return differ


def assign(costs: Sequence[float], processes: int) -> list[int]:
    """The owner of each layer: the most expensive first, each to the process that has least to do."""
    load, owners = [0.0] * processes, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(processes), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def share(
    group: dist.ProcessGroup,
    owners: Sequence[int],
    results: Sequence[list[Tensor]],
    warm: WarmState,
    keys: Sequence[list[str]],
) -> None:
    """Broadcast the results, and what is remembered, from each layer's owner: one message per owner, all at once."""
    owned = [(key, owner) for owner, of_layer in zip(owners, keys, strict=True) for key in of_layer]
    _make_room(group, owned, warm, results[0][0].device)
    messages = []
    for owner in sorted(set(owners)):
        tensors = [t for of, layer in zip(owners, results, strict=True) if of == owner for t in layer]
        tensors += [warm.bases[key] for key, of in owned if of == owner and key in warm.bases]
        flat = torch.cat([as_bytes(t) for t in tensors])
        messages.append((owner, tensors, flat, dist.broadcast(flat, group=group, group_src=owner, async_op=True)))
    for owner, tensors, flat, sending in messages:
        sending.wait()
        if owner != group.rank():
            for t, part in zip(tensors, flat.split([t.numel() * t.element_size() for t in tensors]), strict=True):
                t.copy_(from_bytes(part, t.shape, t.dtype))


def _make_room(group: dist.ProcessGroup, owned: Sequence[tuple[str, int]], warm: WarmState, device) -> None:
    """Bases of the owners' shapes and dtypes."""
    known = torch.zeros(len(owned), 3, dtype=torch.int64, device=device)  # rows, columns, 1 + place of the dtype
    for i, (key, owner) in enumerate(owned):
        if owner == group.rank() and key in warm.bases:
            V = warm.bases[key]
            known[i] = torch.tensor([*V.shape, 1 + DTYPES.index(V.dtype)])
    dist.all_reduce(known, group=group)
    for (key, owner), (rows, columns, dtype) in zip(owned, known.tolist(), strict=True):
        if owner != group.rank() and dtype:
            warm.remember({key: torch.empty(rows, columns, dtype=DTYPES[dtype - 1], device=device)})


def fingerprint(t: Tensor) -> Tensor:
    """int64 [], of all bits: another one for other bits, as good as surely."""
    words = as_bytes(t)
    words = torch.nn.functional.pad(words, (0, -len(words) % (4 * WORDS))).view(torch.int32).view(-1, WORDS)
    return (words.sum(0) * torch.arange(1, 2 * WORDS, 2, device=t.device)).sum() >> 1
