"""What a proximal step of sharded layers sends, against gathering them: python bench/communication.py [--measure 4]

The table is arithmetic. ``--measure p`` runs p processes on this machine and compares it with what the loopback
interface has carried. It should carry nothing else meanwhile.
"""

import copy
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workloads import device_name, drifted, low_rank, resnet18, resnet50, shrunk

import compaware_kernels as ck
from compaware_kernels.certificate import PROBES as CHECKS
from compaware_kernels.subspace import FRESH, PART, PROBES, columns_for, even

sys.path.append(str(Path(__file__).parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results" / "communication.md"
SHARE = 1 / 8
POWERS = 4  # of the probes of what is left out: 2 to 6
PROCESSES = (8, 64, 1024)


class Messages(NamedTuple):
    """Bytes that each process puts in, by kind of collective."""

    reduced: float = 0.0
    spread: float = 0.0  # broadcast by one
    turned: float = 0.0  # all-to-all, what each process sends

    def __add__(self, other: "Messages") -> "Messages":
        return Messages(*map(sum, zip(self, other, strict=True)))

    def sent(self, p: int) -> float:
        """Bytes that a process sends on average: rings for all-reduce, a chain or tree for broadcast."""
        return (2 * self.reduced + self.spread) * (p - 1) / p + self.turned


def turning(m: int, n: int, tall: bool, p: int, size: int = 4) -> Messages:
    """There and back, where the rows are divided but the columns are the longer side."""
    return Messages() if tall else Messages(turned=2 * size * m * n * (p - 1) / p**2)


def subspace(n: int, known: int, rank: int, checked: int | None = None, powers: int = POWERS) -> Messages:
    """One pass from a basis of ``known`` columns: X^T (X V), the probes of the rest, and k x k matrices.

    n: the shorter side.  Norms and agreements of a few bytes are counted, too.
    """
    k, c = even(known + FRESH + known // PART), checked or rank
    back = 4 * n * (k + PROBES * (powers // 2))
    small = 8 * (2 + k + k**2 + c * 2 * CHECKS + CHECKS**2 + (powers + 1) // 2)
    return Messages(reduced=back + small, spread=8 * (k + 5 * CHECKS**2 + c + powers // 2))


def gram(n: int, size: int = 4) -> Messages:
    """A triangle of the Gram matrix; in fp32 also what its error is probed with."""
    probes = 8 * n * CHECKS + 8 if size == 4 else 0
    return Messages(reduced=8 * 2 + size * n * (n + 1) // 2 + probes, spread=8 + n * size + (8 if size == 4 else 0))


def vit_l() -> list[tuple[int, int]]:
    """ViT-L/16's blocks (Dosovitskiy et al., 2021): 302 million."""
    return 24 * [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]


def llama_7b() -> list[tuple[int, int]]:
    """The blocks of a 7B language model (Touvron et al., 2023): 6.5 billion."""
    return 32 * [*4 * [(4096, 4096)], *2 * [(11008, 4096)], (4096, 11008)]


def step(shapes: Sequence[tuple[int, int]], p: int, full_rank: bool = False) -> Messages:
    """A warm step at a rank of SHARE, or one at full rank, of layers whose rows are divided among p processes."""
    total = Messages()
    for m, n in shapes:
        rank = math.ceil(SHARE * min(m, n))
        few = not full_rank and ck.engine.worth_it(-(-max(m, n) // p), min(m, n), columns_for(rank))
        work = subspace(min(m, n), columns_for(rank), rank) if few else gram(min(m, n))
        total += work + turning(m, n, m >= n, p)
    return total


class Counted(TorchDispatchMode):
    """Bytes that this process puts into collectives, by kind."""

    KINDS = {"allreduce_": "reduced", "broadcast_": "spread", "alltoall_base_": "turned", "allgather_": "gathered"}

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(self.KINDS.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = self.KINDS.get(func._overloadpacket.__name__) if func.namespace == "c10d" else None
        if kind:
            sent = args[1] if kind in ("turned", "gathered") else args[0]
            sizes = [t.numel() * t.element_size() for t in tree_leaves(sent) if isinstance(t, torch.Tensor)]
            self.bytes[kind] += sum(sizes)
        return func(*args, **(kwargs or {}))


def table() -> str:
    rows = []
    for name, shapes in (("ResNet-50", resnet50()), ("ViT-L", vit_l()), ("7B language model", llama_7b())):
        size = sum(m * n for m, n in shapes)
        for p in PROCESSES:
            gathering, owners = 4 * size * (p - 1) / p, 8 * size * (p - 1) / p**2
            divided = [step(shapes, p, full).sent(p) for full in (False, True)]
            cells = [f"{count / 1e6:,.1f}" for count in (gathering, owners, *divided)]
            rows.append(f"| {name} | {p:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def carried() -> int:
    """Bytes that the loopback interface has carried."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def ways(weights: Sequence[torch.Tensor], state: ck.WarmState) -> dict:
    """The step where the layers lie, and after every process has gathered them."""
    tau = float(TAU)

    def divided() -> None:
        ck.svt_(weights, tau, state=state)

    def gathered() -> None:
        whole = [W.full_tensor() for W in weights]
        ck.svt_(whole, tau, state=copy.deepcopy(state))

    return {"divided": divided, "gathered": gathered}


def measured(rank: int, p: int) -> list[tuple]:
    """Of each way: bytes on the wire, bytes that the messages should make, seconds."""
    torch.manual_seed(0)
    mesh, bases = init_device_mesh("cpu", (p,)), low_rank(resnet18(), SHARE)
    state = ck.WarmState()
    weights = shrunk(bases)
    found = []
    for step in range(3):
        weights = drifted(weights, bases)
        for name, way in ways([distribute_tensor(W, mesh, [Shard(0)]) for W in weights], state).items():
            dist.barrier()
            before, start = carried(), time.perf_counter()
            with Counted() as counted:
                way()
            dist.barrier()
            found.append((name, carried() - before, counted.bytes, time.perf_counter() - start))
    return found[-2:]
