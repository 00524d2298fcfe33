"""Communication of a proximal step of sharded layers, compared with gathering them.

    python -m bench.training.communication [--measure 4]

The table is computed, not measured. ``--measure p`` runs p processes on this machine and compares the model with the
bytes that the loopback interface carried; it should carry nothing else meanwhile.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import compaware_kernels as ck
from bench.common.workloads import device_name, drifted, low_rank, resnet18, resnet50, shrunk
from compaware_kernels.distributed.dtensor import placed
from compaware_kernels.proximal.error_bounds import PROBES as CHECKS
from compaware_kernels.proximal.solver import worth_it
from compaware_kernels.proximal.subspace_iteration import PROBES, columns_for
from tests.helpers.oracle import svt
from tests.helpers.processes import run

RESULTS = Path(__file__).parents[1] / "results" / "communication.md"
SHARE = 1 / 8
POWERS = 4  # products with the probes that bound what the basis leaves out: 2 to 6
PROCESSES = (8, 64, 1024)
TAU = 1.0
PS = (2, 3, 4)


class Messages(NamedTuple):
    """Bytes that each process contributes, by kind of collective."""

    reduced: float = 0.0
    spread: float = 0.0  # broadcast by one
    turned: float = 0.0  # all-to-all, what each process sends

    def __add__(self, other: "Messages") -> "Messages":
        return Messages(*map(sum, zip(self, other, strict=True)))

    def sent(self, p: int) -> float:
        """Bytes that a process sends on average: ring all-reduce, chain or tree broadcast."""
        return (2 * self.reduced + self.spread) * (p - 1) / p + self.turned


def turning(m: int, n: int, tall: bool, p: int, size: int = 4) -> Messages:
    """All-to-all there and back, needed if rows are sharded and the columns are the longer side."""
    return Messages() if tall else Messages(turned=2 * size * m * n * (p - 1) / p**2)


def subspace(n: int, known: int, rank: int, checked: int | None = None, powers: int = POWERS) -> Messages:
    """One pass of subspace iteration from a basis of ``known`` columns: X^T (X V), probes, and k x k matrices.

    n: the shorter side. Norms and agreements of a few bytes are included.
    """
    k, c = known, checked or rank
    back = 4 * n * (k + PROBES * (powers // 2))
    small = 8 * (3 + k + k**2 + k * 2 * CHECKS + 2 * CHECKS**2 + (powers + 1) // 2)
    return Messages(reduced=back + small, spread=8 * (k + 6 * CHECKS**2 + c + 3 + powers // 2))


def gram(n: int, size: int = 4) -> Messages:
    """Gram matrix route: one triangle of the matrix; in fp32 also the probes of its error."""
    probes = 8 * n * CHECKS + 8 if size == 4 else 0
    return Messages(reduced=8 * 2 + size * n * (n + 1) // 2 + probes, spread=8 + n * size + (8 if size == 4 else 0))


def vit_l() -> list[tuple[int, int]]:
    """Weights of ViT-L/16's blocks (Dosovitskiy et al., 2021): 302 million."""
    return 24 * [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]


def llama_7b() -> list[tuple[int, int]]:
    """Weights of a 7B language model's blocks (Touvron et al., 2023): 6.5 billion."""
    return 32 * [*4 * [(4096, 4096)], *2 * [(11008, 4096)], (4096, 11008)]


def step(shapes: Sequence[tuple[int, int]], p: int, full_rank: bool = False) -> Messages:
    """A warm step at rank SHARE of the full one, or a full-rank step, of layers whose rows are sharded over p
    processes."""
    total = Messages()
    for m, n in shapes:
        rank = math.ceil(SHARE * min(m, n))
        few = not full_rank and worth_it(-(-max(m, n) // p), min(m, n), columns_for(rank))
        work = subspace(min(m, n), columns_for(rank), rank) if few else gram(min(m, n))
        total += work + turning(m, n, m >= n, p)
    return total


KINDS = {"allreduce_": "reduced", "broadcast_": "spread", "alltoall_base_": "turned", "allgather_": "gathered",
         "all_gather_into_tensor": "gathered"}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts the bytes that this process puts into collectives, by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(KINDS.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if kind := KINDS.get(func._overloadpacket.__name__):
            sent = args[1] if func.namespace == "c10d" and kind in ("turned", "gathered") else args[0]
            self.bytes[kind] += sum(t.nbytes for t in tree_leaves(sent) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))

    def wire(self, p: int) -> float:
        """Bytes on the wire of all processes together, by the model of the collectives."""
        sent = self.bytes
        alone = Messages(sent["reduced"], sent["spread"], sent["turned"] * (p - 1) / p).sent(p)
        return p * (alone + sent["gathered"] * (p - 1))


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
    """Bytes that the loopback interface has carried so far."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


class Network(torch.nn.Module):
    """Linear layers with the given weights."""

    def __init__(self, weights: Sequence[torch.Tensor]):
        super().__init__()
        for i, W in enumerate(weights):
            layer = torch.nn.Linear(*reversed(W.shape), bias=False, device="meta")
            layer.weight = torch.nn.Parameter(W)
            self.add_module(str(i), layer)


WAYS = {  # division=, or None: each process gathers full tensors; of sharded weights, and of replicas
    "shards, divided": "auto",
    "shards, owners": "owner",
    "shards, gathered by all": None,
    "replicas, owners": "owner",
    "replicas, all by all": "replicated",
}


class Ways:
    """One proximal step, distributed in each of WAYS."""

    def __init__(self, weights: Sequence[torch.Tensor], mesh):
        self.mesh = mesh
        self.models = {way: Network(self.placed(weights, way)) for way in WAYS}
        self.steps = {way: self.proximal(model, way) for way, model in self.models.items()}

    def placed(self, weights: Sequence[torch.Tensor], way: str) -> list[torch.Tensor]:
        if way.startswith("replicas"):
            return [W.clone() for W in weights]
        return [distribute_tensor(W.clone(), self.mesh, [Shard(0)]) for W in weights]

    def proximal(self, model: Network, way: str) -> Callable[[], None]:
        if WAYS[way]:
            group = dist.group.WORLD if way.startswith("replicas") else None
            more = {"nuclear": TAU, "division": WAYS[way], "process_group": group}
            return ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), **more).step
        state = ck.WarmState()

        def step() -> None:
            whole = [p.full_tensor() for p in model.parameters()]
            ck.svt_(whole, TAU, state=state)
            for p, W in zip(model.parameters(), whole, strict=True):
                p.copy_(placed(W, p))

        return torch.no_grad()(step)

    @torch.no_grad()
    def take(self, way: str, weights: Sequence[torch.Tensor]) -> tuple[str, int, float, float]:
        """(Name, bytes on the wire, bytes predicted from its messages, seconds) of one step."""
        for p, W in zip(self.models[way].parameters(), self.placed(weights, way), strict=True):
            p.copy_(W)
        dist.barrier()
        before, start = carried(), time.perf_counter()
        with Counted() as counted:
            self.steps[way]()
        dist.barrier()
        return way, carried() - before, counted.wire(self.mesh.size()), time.perf_counter() - start

    def check(self, weights: Sequence[torch.Tensor]) -> None:
        """Compare the last step's results, from these weights, with fp64; on the first process."""
        first = self.mesh.get_rank() == 0
        truth = [torch.from_numpy(svt(W.double().numpy(), TAU)) if first else None for W in weights]
        for way, model in self.models.items():
            for p, P in zip(model.parameters(), truth, strict=True):
                W = whole(p).double()  # all processes must call it: it gathers shards
                if P is None:
                    continue
                error = torch.linalg.matrix_norm(W - P, 2) / TAU
                assert error < 2e-3, f"{way}: off by {error:.1e} tau"


def whole(p: torch.Tensor) -> torch.Tensor:
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def measured(rank: int, p: int) -> list[tuple]:
    """Medians over five warm steps, interleaved, of drifting layers of a ResNet-18; the last results are checked."""
    torch.manual_seed(0)
    bases = low_rank(resnet18(), SHARE)
    weights = shrunk(bases)
    ways = Ways(weights, init_device_mesh("cpu", (p,)))
    found = []
    for _ in range(7):
        before = drifted(weights, bases)
        found.append([ways.take(way, before) for way in ways.models])
        weights = [whole(p).clone() for p in ways.models["replicas, owners"].parameters()]
    ways.check(before)
    return [
        (way[0][0], *(statistics.median(each[i] for each in way) for i in (1, 2, 3)))
        for way in zip(*found[2:], strict=True)
    ]


HEAD = """# What a proximal step of sharded layers sends

Megabytes that one process sends (fp32, on average, rings for all-reduce) in one proximal step of layers whose rows are
divided among p processes, as FSDP2 does. Arithmetic, from the messages that the code sends; a test holds the warm step
to it to the byte. Written by `python -m bench.training.communication`.

* gathered by all: every process gathers every layer, as a DTensor's `full_tensor` does, and computes all of them.
* owners: each layer goes to one process and back (`division="owner"`). The owner needs room for it.
* divided: where the layers lie (the default). Rank {share:.1%} of the full rank, warm, one pass; then at full rank, by
  Gram matrices. Layers with more inputs than outputs are turned by one all-to-all each way.

| | processes | gathered | owners | divided, low rank | divided, full rank |
|---|---|---|---|---|---|
{table}

No process of the divided way ever holds a layer, and what it sends does not grow with the longer side; but it does not
shrink with the number of processes either. Owners send less from 8 processes on, as long as there are as many layers.
"""
MEASURED = """
## Measured

All processes together, megabytes of the loopback interface against those of the messages, and milliseconds: ResNet-18's
21 layers at {share:.1%} of the full rank, warm, drifting, medians of 5 steps, each way's result checked against fp64;
shards as FSDP2 has them, replicas as DDP (of which `division="auto"` takes the faster way, as it measures by itself).
{device}, one thread each on 2 cores, gloo, torch {torch}, Python {python}.
`python -m bench.training.communication --measure`

| processes | way | on the wire, MB | messages, MB | ratio | ms |
|---|---|---|---|---|---|
{rows}
"""


def main(
    measure: Annotated[bool, typer.Option(help="Run 2, 3 and 4 processes here, too (a minute).")] = False,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = RESULTS,
) -> None:
    text = HEAD.format(share=SHARE, table=table())
    if measure:
        rows = [(p, *row) for p in PS for row in run(measured, p, p)[0]]
        cells = [
            f"| {p} | {way} | {wire / 1e6:.1f} | {model / 1e6:.1f} | {wire / model:.3f} | {1e3 * seconds:.0f} |"
            if model > 1e5
            else f"| {p} | {way} | {wire / 1e6:.1f} | {model / 1e6:.1f} | | {1e3 * seconds:.0f} |"
            for p, way, wire, model, seconds in rows
        ]
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        text += MEASURED.format(share=SHARE, device=device_name(), rows="\n".join(cells), **versions)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)
    print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
