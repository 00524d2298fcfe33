"""Profile of the proximal step on the CPU: what is multiplied per layer, and where the time goes.

    python -m bench.proximal.profile_step ["resnet50, warm" "vit_b, warm" ...]

Two tables for each step. Per layer shape: columns that the weight is multiplied with, in either direction. Those of the
basis are divided into the rank of the result, spare ones that the warm state keeps beyond the rank, and fresh ones;
those of the certificate into fp32 and fp64. ``whole``: products with a square matrix (Gram route). The result itself,
``left right^T``, costs one more product of the rank, so that the floor is three columns per unit of rank, which counts
as at most half the full one.
And in sum, by purpose: GFLOP and milliseconds of products with the weights, of other products, of factorizations
(QR, Cholesky, eigh, ...), of all other ops, and of C++ ops of this library.

Every op is recorded from outside by a ``TorchDispatchMode`` on one thread; the purpose of an op follows from the names
of the functions that called it. Its time is the median of a few steps, less that of an op that does nothing, which is
the recorder's own. Python is what remains of the time of the same step without the recorder.
"""

import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode

import compaware_kernels as ck
from bench.common import workloads
from bench.proximal.cases import CASES, drifted, full_rank, product_rate, rank_floor, rank_of, svt_
from compaware_kernels._utils.tables import text_table

STEPS = ["resnet50, warm", "resnet50, rank 6%, warm", "vit_b, warm", "resnet50, cold"]
ROUNDS, RECORDED = 7, 3

PURPOSES = {  # the first one whose pattern matches the name of any calling function
    "certificate": r"sketch|bound|probe|certif|tail|spectral_estimates",
    "write-back": r"^_?(write|store|fold_back|check_fits)",
    "norms, checks": r"^norms?$|^norm_of|^normalize$|^check|^unfold",
    "dense route": r"gram|^by_svd|^_eigh",
    "iteration": r"",
}
FACTORIZATION = re.compile(r"eigh|eigvals|qr|cholesky|triangular|svd|householder|^lu")
PRODUCT = re.compile(r"^(mm|bmm|addmm|baddbmm|mv|dot|_linear_pointwise|wide_product|_addmm_activation)$")
KINDS = ("with weights", "other products", "factorizations", "other ops", "C++ of the library")


@dataclass
class Call:
    """One op: milliseconds, flops of a product, and the layer shape and columns of a product with weights."""

    name: str
    caller: str
    purpose: str
    kind: str
    ms: float
    flops: float = 0.0
    double: bool = False
    shape: tuple[int, int] | None = None
    known: bool = False  # the weight is known by its memory, not only by its shape
    weights: float = 0.0  # number of weights of this shape multiplied, a block of rows counted as a part of one
    columns: int = 0


class Recorder(TorchDispatchMode):
    """Records every op, at what cost, and for what purpose."""

    def __init__(self, weights):
        super().__init__()
        self.calls: list[Call] = []
        self.memory = {W.untyped_storage().data_ptr(): tall(W) for W in weights}
        self.shapes = set(self.memory.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.record(func, args, out, 1e3 * (time.perf_counter() - start))
        return out

    def record(self, func, args, out, ms: float) -> None:
        space, name = func._schema.name.split("::")
        kind = "C++ of the library" if space == "compaware" else "other ops"
        kind = "factorizations" if FACTORIZATION.search(name) else kind
        call = Call(name, *purpose_of(sys._getframe(2)), kind, ms)
        if PRODUCT.match(name):
            A, B = [a for a in args if isinstance(a, torch.Tensor)][-2:] if name != "_linear_pointwise" else args[:2]
            self.product(call, A, B if name != "_linear_pointwise" else B.mT, out)
        self.calls.append(call)

    def product(self, call: Call, A, B, out) -> None:
        """Note flops, and the weight among the factors: by its memory, or by its shape, as a copy or within a batch."""
        call.kind, call.double = "other products", out.dtype == torch.float64
        call.flops = 2.0 * out.numel() * A.shape[-1]
        found = [(X, self.memory.get(X.untyped_storage().data_ptr())) for X in (A, B)]
        for i, (X, shape) in sorted(enumerate(found), key=lambda each: each[1][1] is None):
            if X.ndim > 1 and (shape or tall(X) in self.shapes):
                call.shape, call.known = shape or tall(X), shape is not None or X.ndim > 2
                call.columns = A.shape[-2] if i else B.shape[-1]
                call.weights = X.numel() / (call.shape[0] * call.shape[1])
                break

    def finish(self) -> list[Call]:
        """The calls; factors that only have the shape of a weight count as weights if no weight of it was known."""
        known = {call.shape for call in self.calls if call.known}
        for call in self.calls:
            if call.shape and not call.known and call.shape in known:
                call.shape = None
            call.kind = "with weights" if call.shape else call.kind
        return self.calls


def tall(X) -> tuple[int, int]:
    """Shape of a matrix or of those of a batch, the longer side first."""
    m, n = sorted(X.shape[-2:], reverse=True)
    return m, n


def purpose_of(frame) -> tuple[str, str]:
    """Innermost function of the solver, and the purpose, of an op called from this frame."""
    names = []
    while frame is not None:
        file = frame.f_code.co_filename
        if "compaware_kernels" in file:
            names.append((file.rpartition("/")[2].removesuffix(".py"), frame.f_code.co_name))
        frame = frame.f_back
    caller = next((f"{file}.{name}" for file, name in names if file not in ("linalg", "row_sharded")), "other")
    found = (p for p, pattern in PURPOSES.items() if any(re.search(pattern, name) for _, name in names))
    return caller, next(found, "iteration")


def steps(name: str):
    """Weights, and the function that takes the step of this name on them: case and regime."""
    case, _, regime = name.rpartition(", ")
    if regime == "full rank":
        return full_rank(CASES[case][0]), lambda Ws: svt_(Ws, None)
    found = drifted(*CASES[case])
    return found.weights, found.calls[regime]


def profile(name: str) -> tuple[list[Call], list[ck.SvtInfo], list[torch.Tensor], float, dict]:
    """Recorded calls of one step, its reports, weights, milliseconds without the recorder, and kept columns."""
    weights, step = steps(name)
    Ws, times, runs = [W.clone() for W in weights], [], []
    for i in range(ROUNDS):
        torch._foreach_copy_(Ws, weights)
        times.append(1e3 * workloads.seconds(lambda: step(Ws)))
        if i < RECORDED:
            torch._foreach_copy_(Ws, weights)
            with Recorder(Ws) as recorder:
                infos = step(Ws)
            runs.append(recorder.finish())
    idle = nothing()
    for call, *others in zip(*runs, strict=True):
        call.ms = max(0.0, median(each.ms for each in (call, *others)) - idle)
    state = ck.WarmState()
    svt_([W.clone() for W in weights], state)
    bases = {tall(W): state.bases.get(f"{i}.0") for i, W in enumerate(weights)}
    kept = {shape: V.shape[1] if V is not None else 0 for shape, V in bases.items()}
    return runs[0], infos, weights, median(times), kept


def nothing() -> float:
    """Milliseconds that the recorder sees of an op that does nothing."""
    x = torch.ones(1, 1)
    with Recorder([x]) as recorder:
        for _ in range(100):
            x.detach()
    return median(call.ms for call in recorder.calls)


def layer_table(calls: list[Call], infos, weights, kept: dict) -> str:
    """Columns that one layer of each shape is multiplied with, on average."""
    layers, ranks = defaultdict(int), defaultdict(int)
    for W, info in zip(weights, infos, strict=True):
        shape = tall(W)
        layers[shape] += 1
        ranks[shape] += rank_of(W, info)
    found = {shape: dict.fromkeys(("rank", "spare", "fresh", "fp32", "fp64", "whole"), 0.0) for shape in layers}
    time = defaultdict(float)
    for call in (call for call in calls if call.shape):
        row, r = found[call.shape], round(ranks[call.shape] / layers[call.shape])
        time[call.shape] += call.ms
        if call.purpose == "certificate":
            row["fp64" if call.double else "fp32"] += call.weights * call.columns
        elif call.columns >= min(call.shape):
            row["whole"] += call.weights * call.columns
        else:
            spare = max(0, min(call.columns, kept[call.shape]) - r)
            row["rank"] += call.weights * min(call.columns, r)
            row["spare"] += call.weights * spare
            row["fresh"] += call.weights * max(0, call.columns - r - spare)
    rows, total = [], defaultdict(float)
    for shape, row in found.items():
        count = layers[shape]
        work = 2e-9 * shape[0] * shape[1]
        cells = [sum(row.values()) * work, 3 * ranks[shape] * work, time[shape]]
        for key, cell in zip((*row, "GFLOP", "floor", "ms"), (*(v * work for v in row.values()), *cells), strict=True):
            total[key] += cell
        per = [value / count for value in row.values()]
        rows.append((f"{count} of {shape[0]} x {shape[1]}", round(ranks[shape] / count), *numbers(per, 0),
                     *numbers(cells[:2], 3), *numbers(cells[2:], 1)))  # fmt: skip
    rows.append(("all, GFLOP", "", *numbers([total[key] for key in ("rank", "spare", "fresh", "fp32", "fp64", "whole")],
                 2), *numbers([total["GFLOP"], total["floor"]], 2), *numbers([total["ms"]], 0)))  # fmt: skip
    columns = ("layers", "rank", "x rank", "spare", "fresh", "certificate fp32", "fp64", "whole", "GFLOP", "floor",
               "ms of products")  # fmt: skip
    return text_table(columns, rows, right=range(1, 11))


def purpose_table(calls: list[Call], total: float) -> str:
    """GFLOP and milliseconds by purpose and kind, and Python as the rest of the time of the step."""
    rows, sums = [], defaultdict(float)
    for purpose in PURPOSES:
        own = [call for call in calls if call.purpose == purpose]
        flops = [1e-9 * sum(call.flops for call in own if call.double is double) for double in (False, True)]
        ms = [sum(call.ms for call in own if call.kind == kind) for kind in KINDS]
        for i, value in enumerate((*flops, *ms, sum(ms), len(own))):
            sums[i] += value
        if own:
            rows.append((purpose, *numbers(flops, 2), *numbers([*ms, sum(ms)], 1), len(own)))
    spent = sums[len(KINDS) + 2]
    empty = [""] * len(KINDS)
    rows.append(("all ops", *numbers([sums[0], sums[1]], 2), *numbers([sums[i] for i in range(2, len(sums) - 1)], 1),
                 int(sums[len(sums) - 1])))  # fmt: skip
    rows.append(("Python", "", "", *empty, *numbers([max(0.0, total - spent)], 1), ""))
    rows.append(("the step", "", "", *empty, *numbers([total], 1), ""))
    return text_table(("ms", "GFLOP fp32", "fp64", *KINDS, "sum", "ops"), rows, right=range(1, 10))


def caller_table(calls: list[Call], most: int = 14) -> str:
    """The functions whose ops take most of the time."""
    by = defaultdict(list)
    for call in calls:
        by[call.caller].append(call)
    order = sorted(by, key=lambda caller: -sum(call.ms for call in by[caller]))[:most]
    rows = []
    for caller in order:
        ops = defaultdict(float)
        for call in by[caller]:
            ops[call.name] += call.ms
        most_of = sorted(ops, key=ops.get, reverse=True)[:3]
        rows.append((caller, *numbers([sum(call.ms for call in by[caller])], 1), len(by[caller]),
                     *numbers([1e-9 * sum(call.flops for call in by[caller])], 2),
                     ", ".join(f"{name} {ops[name]:.1f}" for name in most_of)))  # fmt: skip
    return text_table(("function", "ms", "ops", "GFLOP", "most of it, ms"), rows, right=(1, 2, 3))


def numbers(values, digits: int) -> list[str]:
    return [f"{value:,.{digits}f}" if value else "" for value in values]


@torch.no_grad()
def main(names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(CASES)}, with a regime.")] = None):
    """Print the profile of these steps."""
    torch.set_num_threads(1)
    print(f"{workloads.device_name()}, 1 thread, torch {torch.__version__}, compaware_kernels {ck.__version__}")
    for name in names or STEPS:
        rate = product_rate()
        calls, infos, weights, total, kept = profile(name)
        floor = rank_floor(weights, infos, rate)
        print(f"\n## {name}: {total:.0f} ms, {total / floor:.1f} x the floor of {floor:.0f} ms")
        print(f"({1e-12 * floor * rate:.1f} GFLOP in three products of the rank, at {1e-9 * rate:.0f} GFLOP/s)\n")
        print(layer_table(calls, infos, weights, kept), purpose_table(calls, total), caller_table(calls), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
