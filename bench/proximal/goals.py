"""Goals of the proximal step's speed against the loop of SVDs and Gram + eigh in fp64, all measured in one run.

    python -m bench.proximal.goals ["resnet50" "lenet" "memory" ...] [--rounds 7]

Every result is compared with the fp64 truth; a wrong one of ours reaches no goal. The loop of fp32 SVDs stays the unit
where it misses the tolerance itself (marked !). Two floors: ``x rank``: three products of each weight with as many
columns as its rank, at the measured rate of a large product; ``x own``: the products that were made, and writing the
results. Calls that take long run once.
"""

import os
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

import compaware_kernels as ck
from bench.common import workloads
from bench.common.racing import Race
from bench.proximal import cases, memory, peers
from bench.proximal.cases import CASES
from compaware_kernels._utils.tables import text_table

FULL_RANK = ", full rank"


@dataclass
class Goal:
    """What our call is to reach: times as fast as the peers, at most so many floors."""

    call: str
    svd: float = 1.0
    gram: float | None = None
    floor: float | None = None


@dataclass
class Rows:
    goals: list[Goal]
    gram: bool = True  # whether to time Gram + eigh, which takes half a minute for some


GOALS = {
    "lenet": Rows([Goal("warm", 1.5, gram=1.0), Goal("cold", 1.5, gram=1.0)]),
    "demo network": Rows([Goal("warm", 1.0, gram=1.0), Goal("cold", 1.0, gram=1.0)]),
    "1000 of 32 x 32": Rows([Goal("cold", 8), Goal("one batch", 8)]),
    "resnet50": Rows([Goal("warm", 25, floor=2), Goal("cold", 10)]),
    "resnet50, rank 6%": Rows([Goal("warm", 35), Goal("cold", 10)]),
    "resnet50" + FULL_RANK: Rows([Goal("cold", 6)]),
    "vit_b": Rows([Goal("warm", 20), Goal("cold", 10)], gram=False),
    "4096 x 4096, rank 64": Rows([Goal("warm", 150), Goal("cold", 10)], gram=False),
}
MEMORY = "memory"
PEAK = {"resnet50": 13.0}  # MB


def race(name: str, rows: Rows, rounds: int) -> Race:
    """The race of a case, finished."""
    case = name.removesuffix(FULL_RANK)
    if name.endswith(FULL_RANK):
        weights, calls = cases.full_rank(CASES[case][0]), {"cold": lambda Ws: cases.svt_(Ws, None)}
        ranks = [None] * len(weights)
    else:
        found = cases.drifted(*CASES[case])
        weights, calls, ranks = found.weights, found.calls | {"one batch": cases.one_batch}, found.ranks
    work = {"svd": loop(peers.svd)} | ({"gram": loop(peers.gram_eigh_fp64)} if rows.gram else {})
    work |= {goal.call: calls[goal.call] for goal in rows.goals}
    truths = [cases.truth(W, rank) for W, rank in zip(weights, ranks, strict=True)]
    contest = Race(weights, truths, work)
    for _ in range(rounds):
        contest.round(rounds)
    return contest


def loop(peer):
    def run(Ws):
        for W in Ws:
            W.copy_(peer(W))

    return run


def table_rows(name: str, rows: Rows, contest: Race) -> list[tuple]:
    """Measured and wanted, of every call of ours."""
    found, rate, out = contest.result(), cases.product_rate(), []
    for goal in rows.goals:
        ours = found[goal.call]
        of_rank = ours.ms / cases.rank_floor(contest.weights, ours.infos, rate)
        of_own = ours.ms / cases.own_floor(contest.weights, ours.infos)
        ratios = [found[peer].ms / ours.ms if peer in found else None for peer in ("svd", "gram")]
        pairs = zip((*ratios, of_rank), (goal.svd, goal.gram, goal.floor), strict=True)
        reached = [
            wanted is None or (got <= wanted if i == 2 else got >= wanted) for i, (got, wanted) in enumerate(pairs)
        ]
        out.append((
            name, goal.call, f"{ours.ms:,.1f}", peer_cell(found, "svd"), ratio(ratios[0]), ratio(goal.svd),
            peer_cell(found, "gram"), ratio(ratios[1]), ratio(goal.gram), f"{of_rank:.1f}", goal.floor or "",
            f"{of_own:.1f}", f"{ours.error:.1e}", f"{ours.bound:.1e}",
            "WRONG" if not ours.ok else "yes" if all(reached) else "no",
        ))  # fmt: skip
    return out


def peer_cell(found: dict, peer: str) -> str:
    return f"{found[peer].ms:,.1f}{'' if found[peer].ok else ' !'}" if peer in found else ""


def ratio(value: float | None) -> str:
    return f"{value:.1f}x" if value else ""


COLUMNS = ("case", "call", "ms", "svd loop", "faster", "goal", "Gram fp64", "faster", "goal", "x rank", "goal", "x own",
           "error/tau", "bound/tau", "reached")  # fmt: skip


@torch.no_grad()
def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join((*GOALS, MEMORY))}; default: all.")] = None,
    rounds: int = 7,
) -> None:
    """Measure and print all rows, then the peak memory."""
    names = names or [*GOALS, MEMORY]
    versions = f"torch {torch.__version__}, compaware_kernels {ck.__version__}"
    where = f"{workloads.device_name()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    print(f"{where}, {versions}, products at {1e-9 * cases.product_rate():.0f} GFLOP/s")
    out = []
    for name in names:
        if name in GOALS:
            out += table_rows(name, GOALS[name], race(name, GOALS[name], rounds))
            print(f"{name}: measured", flush=True)
    if out:
        print(text_table(COLUMNS, out, right=range(2, 14)))
    if MEMORY in names:
        rows = []
        for case, goal in PEAK.items():
            for call in ("warm", "cold", "svd"):
                got = memory.measure(case, call)
                wanted = goal if call == "warm" else None
                reached = "" if wanted is None else "yes" if got["peak MB"] <= wanted else "no"
                rows.append((case, call, f"{got['peak MB']:.1f}", wanted or "", f"{got['weights MB']:.1f}", reached))
        print(text_table(("case", "call", "peak MB", "goal", "weights MB", "reached"), rows, right=range(2, 5)))


if __name__ == "__main__":
    typer.run(main)
