"""Predicted time of the proximal step of a whole network, on GPUs that this machine lacks.

python -m bench.models.step_roofline
"""

from pathlib import Path
from typing import Annotated

import typer

from bench.common import workloads
from bench.models import step_model as model
from bench.models.lowrank_roofline import DRAM_SHARE, L2_SHARE, STEP, TENSOR_SHARE, markdown
from bench.models.step_model import GPUS, Predicted, launches, plan_of, predict, workspace
from compaware_kernels.proximal.cuda.plan import Plan

NETWORKS = {"ResNet-18": workloads.resnet18, "ResNet-50": workloads.resnet50, "ViT-B/16": workloads.vit_b}
RANK = 0.125  # of the warm step
GOAL = 5e-3  # s, for ResNet-50 on an H100

NOTES = """# The proximal step of a whole network on GPUs: arithmetic, not measurement

Nothing here has run on a GPU. fp32 weights; warm: rank {rank:.1%}, the subspace is good enough; first: no rank is known
and all matrices take the products route, with ||W||_F = {norm:g} tau. Written by
`python -m bench.models.step_roofline`, which plans each step on the meta device and walks the products of its launches.

{chips}

TF32 (dense), fp64 and DRAM rates, L2 sizes: NVIDIA's data sheets (A100 80 GB SXM, 2021; H100 SXM, 2023; H200 SXM, 2024;
HGX B200, 2025, per GPU) and the GeForce RTX 5090's whitepaper (2025). "fp64 products": of tensor cores where Triton's
`tl.dot` uses them (machine code: DMMA on sm_80 and sm_90), else of the FMA units. L2 rate: as in roofline-lowrank.md;
of the RTX 5090 NVIDIA states none: the H100's, scaled by multiprocessors and clock (an assumption).

Assumed: {tensor:.0%} of the tensor and fp64 peaks, {dram:.0%} of the DRAM's, {L2:.0%} of the L2's; {launch:g} us a
launch, {wait:g} us a stage (ticket, wait, signal), {gated:g} us for a tile that is left out (six dependent trips to
L2), {resident} Triton programs on a multiprocessor (163 to 255 registers a thread), {step:g} us a step of a program's
loop at least. What a stage touches stays in L2 if it is below a quarter of it. Padding of tiles counts as work, not in
the GFLOP shown.

One block a matrix, 256 threads, at {share:.0%} of its multiprocessor's fp64 FMA rate in Cholesky factors (k^3 / 3
flops, and {column} clocks a column) and inverses (k^3, {division} a row). Jacobi: {sweeps} sweeps, the most that
ck_ritz takes (to the end it would be 6 or 7, counted in numpy on spectra of `bench/common/workloads.py`), the
instructions of a step counted in the machine code for sm_90, {turn} clocks a step at least. {normal} instructions a
random number; judge: {row} clocks a row of 32 probes, {summand} an element of a thread's sum of squares. These clocks
are guesses, within a factor of two perhaps.
"""
COLUMNS = ("", "GFLOP", "MB", "stages", "tiles", "us", "bound by")


def table(predicted: Predicted) -> str:
    rows = []
    for launch in predicted.launches:
        flops, size = (sum(part[i] for part in launch.parts) for i in (1, 2))
        numbers = (
            f"{flops / 1e9:.2f}",
            f"{size / 1e6:.0f}",
            len(launch.parts) if launch.tiles else "",
            launch.tiles or "",
        )
        rows.append((launch.name, *numbers, f"{1e6 * launch.seconds:.0f}", launch.bound))
    flops, size = (sum(part[i] for launch in predicted.launches for part in launch.parts) for i in (1, 2))
    total = f"{flops / 1e9:.2f}", f"{size / 1e6:.0f}", "", sum(launch.tiles for launch in predicted.launches)
    return markdown(COLUMNS, [*rows, ("all", *total, f"{1e6 * predicted.seconds:.0f}", "")])


def stage_table(predicted: Predicted) -> str:
    parts = [part for launch in predicted.launches if launch.tiles for part in launch.parts]
    rows = [(p.name, f"{p.flops / 1e9:.2f}", f"{p.bytes / 1e6:.0f}", f"{1e6 * p.seconds:.1f}", p.bound) for p in parts]
    return markdown(("", "GFLOP", "MB", "us", "bound by"), rows)


def sheet() -> str:
    rows = []
    for name, g in GPUS.items():
        c = g.chip
        rates = (f"{x / 1e12:,.1f}" for x in (g.tf32, g.wide, g.fp64, c.dram, c.L2))
        rows.append((name, *rates, f"{c.L2_size / 1e6:.0f} MB", c.multiprocessors, f"{c.clock / 1e9:.2f}"))
    rates = "TF32, TFLOP/s", "fp64 products", "fp64", "DRAM, TB/s", "L2, TB/s"
    return markdown(("", *rates, "L2", "multiprocessors", "GHz"), rows)


def totals(plans: dict[tuple[str, str], Plan]) -> str:
    rows = []
    for (network, kind), plan in plans.items():
        milliseconds = (f"{1e3 * predict(gpu, plan).seconds:.2f}" for gpu in GPUS.values())
        rows.append((network, kind, *milliseconds, len(launches(plan)), f"{workspace(plan) / 1e6:,.0f}"))
    return markdown(("ms", "", *GPUS, "launches", "workspace, MB"), rows)


def notes() -> str:
    shares = {"tensor": TENSOR_SHARE, "dram": DRAM_SHARE, "L2": L2_SHARE, "share": model.FMA_SHARE}
    times = {"launch": 1e6 * model.LAUNCH, "wait": 1e6 * model.WAIT, "gated": 1e6 * model.GATED, "step": 1e6 * STEP}
    clocks = {
        "column": model.COLUMN,
        "division": model.DIVISION,
        "turn": model.TURN,
        "normal": model.NORMAL,
        "row": model.JUDGE_ROW,
    }
    counts = {"sweeps": model.SWEEPS[8], "summand": model.SUMMAND, "resident": model.RESIDENT}
    return NOTES.format(rank=RANK, norm=model.BETA**0.5, chips=sheet(), **shares, **times, **clocks, **counts)


def summary(predicted: Predicted) -> str:
    """Predicted time of the step, and the launches that take most of it."""
    most = sorted(predicted.launches, key=lambda launch: -launch.seconds)[:4]
    parts = (f"{each.name} {each.seconds / predicted.seconds:.0%} ({each.bound})" for each in most)
    return f"{1e3 * predicted.seconds:.2f} ms. Most: {', '.join(parts)}.\n"


def verdict(predicted: Predicted) -> str:
    """Whether the goal is met, also with guessed constants at the far end of their range."""
    doubled = sum(part.seconds for each in predicted.launches for part in each.parts if part.bound == "one block")
    likely, worst = (
        "met" if seconds <= GOAL else "not met" for seconds in (predicted.seconds, predicted.seconds + doubled)
    )
    total = f"{1e3 * (predicted.seconds + doubled):.2f} ms"
    return f"The goal, {1e3 * GOAL:g} ms, is {likely}; {worst} if blocks take twice the clocks guessed, {total}.\n"


def main(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path(__file__).parents[1]
    / "results/roofline-step.md",
) -> None:
    """Write the predictions for whole networks, and the arithmetic of ResNet-50 on an H100."""
    plans = {(name, kind): plan_of(shapes(), share)
             for name, shapes in NETWORKS.items() for kind, share in (("warm", RANK), ("first", None))}  # fmt: skip
    text = [notes(), "## A step\n", totals(plans)]
    for kind in ("warm", "first"):
        predicted = predict(GPUS["H100 SXM"], plans["ResNet-50", kind])
        text += [f"## ResNet-50 on H100 SXM, {kind}\n", summary(predicted), table(predicted)]
        if kind == "warm":
            text += [verdict(predicted)]
            text += ["### Stages\n", stage_table(predicted)]
    out.write_text("\n".join(text))
    print("\n".join([*text[1:3], table(predict(GPUS["H100 SXM"], plans["ResNet-50", "warm"])), str(out)]))


if __name__ == "__main__":
    typer.run(main)
