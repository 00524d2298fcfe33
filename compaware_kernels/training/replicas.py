"""Replicated weights (DDP, HSDP): layers are partitioned over ranks and broadcast; replicas stay bitwise identical.

Each layer has an owner, which computes it and broadcasts the result with the layer's warm state: the replicas stay
bitwise identical whatever hardware the ranks have. Where broadcasting costs more than computing all layers on every
rank, every rank computes redundantly. Then a fingerprint of every result is compared, and if the ranks differ, the
owners' results are broadcast.
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

__all__ = ["MODES", "ReplicaGroup", "assign", "broadcast_from_owners", "fingerprint"]

log = logging.getLogger(__name__)
MODES = ("auto", "owner", "replicated")
MEASURE_EVERY = 16  # proximal steps between measurements of "auto"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of bases; communicated by index
WORDS = 256  # columns of a fingerprint


class ReplicaGroup:
    """A process group of ranks with the same weights, and the way they share the work of a proximal step.

    Args:
        mode: ``"owner"``: each layer is computed by one rank; ``"replicated"``: by all; ``"auto"``: the faster way,
            measured at the first step and at every 16th. All ranks take the same decision.

    Attributes:
        seconds: of the last measurement: time of the step with owners, and estimate for all layers on every rank.
    """

    def __init__(self, group: dist.ProcessGroup, mode: str = "auto"):
        self.group, self.mode, self.step = group, mode, 0
        self.replicated = mode == "replicated"
        self.seconds: dict[str, float] = {}

    def run(
        self,
        compute: Callable[[list[int]], None],
        owners: Sequence[int],
        results: Sequence[list[Tensor]],
        warm: WarmState,
        keys: Sequence[list[str]],
    ) -> None:
        """Compute every layer on its owner or on all ranks; afterwards all ranks have the same results.

        Args:
            compute: called with the indices of the layers of this rank; computes them in place in their ``results``.
            owners: rank in the group of each layer, see :func:`assign`.
            results: tensors of each layer, of the same shapes on every rank.
            keys: keys of each layer's bases in ``warm``.
        """
        if self.mode == "auto" and self.step % MEASURE_EVERY == 0:
            self.replicated = False
        self.step += 1
        start = time.perf_counter()
        compute([i for i, owner in enumerate(owners) if self.replicated or owner == self.group.rank()])
        computing = time.perf_counter() - start
        if self.replicated and not self._any_difference(results):
            return
        broadcast_from_owners(self.group, owners, results, warm, keys)
        if self.mode == "auto":
            self._choose(computing, time.perf_counter() - start - computing, results[0][0].device)

    def _choose(self, computing: float, broadcasting: float, device: torch.device) -> None:
        """Choose the faster way from this rank's seconds of a step with owners; collective."""
        total = torch.tensor([computing], dtype=torch.float64, device=device)
        most = torch.tensor([computing, broadcasting], dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        self.seconds = {"owner": float(most.sum()), "replicated": float(total)}
        self.replicated = self.seconds["replicated"] < self.seconds["owner"]

    def _any_difference(self, results: Sequence[list[Tensor]]) -> bool:
        """Whether the results of any two ranks differ in a bit; if so, owners compute from now on."""
        prints = torch.stack([fingerprint(t) for layer in results for t in layer])
        both = torch.stack([prints, -prints])
        dist.all_reduce(both, dist.ReduceOp.MAX, self.group)
        differ = bool((both[0] != -both[1]).any())
        if differ:
            log.warning("ProximalStep: wanted bitwise equal results on all ranks; got different ones: "
                        "from now on one owner rank computes each layer")  # fmt: skip
            self.mode, self.replicated = "owner", False
        return differ


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Owner rank of each layer: in order of descending cost, each goes to the rank with the least total so far."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def broadcast_from_owners(
    group: dist.ProcessGroup,
    owners: Sequence[int],
    results: Sequence[list[Tensor]],
    warm: WarmState,
    keys: Sequence[list[str]],
) -> None:
    """Broadcast each layer's results and bases from its owner, in place: one message per owner, all asynchronous.

    Args:
        owners: rank in the group, by layer.
        results: tensors of each layer, of the same shapes on every rank.
        keys: keys of each layer's bases in ``warm``, which need not exist.
    """
    owned = [(key, owner) for owner, of_layer in zip(owners, keys, strict=True) for key in of_layer]
    _allocate_bases(group, owned, warm, results[0][0].device)
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


def _allocate_bases(group: dist.ProcessGroup, owned: Sequence[tuple[str, int]], warm: WarmState, device) -> None:
    """Allocate in ``warm`` the bases that other ranks own, with the owners' shapes and dtypes; collective."""
    known = torch.zeros(len(owned), 3, dtype=torch.int64, device=device)  # rows, columns, 1 + index in DTYPES; 0: none
    for i, (key, owner) in enumerate(owned):
        if owner == group.rank() and key in warm.bases:
            V = warm.bases[key]
            known[i] = torch.tensor([*V.shape, 1 + DTYPES.index(V.dtype)])
    dist.all_reduce(known, group=group)
    for (key, owner), (rows, columns, dtype) in zip(owned, known.tolist(), strict=True):
        if owner != group.rank() and dtype:
            warm.remember({key: torch.empty(rows, columns, dtype=DTYPES[dtype - 1], device=device)})


def fingerprint(t: Tensor) -> Tensor:
    """Checksum of a tensor's bytes, int64 []: weighted sum of its 32-bit words, different for almost all changes."""
    words = as_bytes(t)
    words = torch.nn.functional.pad(words, (0, -len(words) % (4 * WORDS))).view(torch.int32).view(-1, WORDS)
    return (words.sum(0) * torch.arange(1, 2 * WORDS, 2, device=t.device)).sum() >> 1
