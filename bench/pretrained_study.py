"""Pretrained models, compressed without training: what is left of them at a budget of multiply-adds.

    make pretrained-study    # 30 minutes

writes bench/results/pretrained.md. Every way to spend the budget, by weights alone and with 64 unlabelled inputs. The
plain way is a truncated SVD of every layer at the same share of its full rank.
"""

from pathlib import Path
from typing import Annotated

import sklearn
import typer
from pretrained_data import CALIBRATION, TRAIN, Task, images, probe, sentences
from rich.progress import Progress

import compaware_kernels as ck
from compaware_kernels.pages import machine
from compaware_kernels.tables import text_table

ROOT = Path(__file__).parents[1]
BUDGETS = (0.8, 0.65, 0.5)
WAYS = ("share", "equal", "absolute", "greedy", "relative")
TEXT = """# Pretrained models, compressed without training

Accuracy of a linear probe on the features (`bench/pretrained_data.py`: {train} inputs train it, the others test it),
and how far the features move: `||F - F'|| / ||F||`. *Share*: a truncated SVD of every layer at one share of its full
rank, the largest that keeps the budget. The ways are `ck.allocate`'s. *Inputs*: with {few} unlabelled ones,
`ck.compress(calibration=)`. Budgets are of the multiply-adds of the layers that fold, measured: of the whole model.

{table}

{machine}, scikit-learn {sklearn}. `make pretrained-study`
"""
COLUMNS = ("model", "budget", "ranks", "by", "multiply-adds", "parameters", "probe, %", "features moved")


def main(
    cache: Annotated[Path, typer.Option(help="Folder for what is downloaded.")] = ROOT / "out" / "pretrained",
    out: Annotated[Path, typer.Option(help="Where to write the table.")] = ROOT / "bench/results/pretrained.md",
) -> None:
    rows = []
    with Progress() as bar:
        for make in (images, sentences):
            task = make(cache)
            todo = bar.add_task(task.name, total=2 * len(BUDGETS) * len(WAYS) + 1)
            rows += run(task, lambda todo=todo: bar.advance(todo))
    facts = {"machine": machine(), "sklearn": sklearn.__version__}
    table = text_table(COLUMNS, rows, right=range(4, 8), markdown=True)
    out.write_text(TEXT.format(table=table, train=f"{TRAIN:,}", few=CALIBRATION, **facts), encoding="utf-8")
    print(table, f"\nWritten: {out}")


def run(task: Task, advance) -> list[tuple]:
    example, whole = tuple(x[:1] for x in task.inputs[0]), task.all_features(task.model)
    _, before = ck.compress(task.model, {}, example, goal="size", remove_dead=False)
    rows = [
        (task.name, "1", "dense", "", f"{before.macs:,}", f"{before.params:,}", f"{probe(whole, task.labels):.1f}", "0")
    ]
    advance()
    for budget in BUDGETS:
        for way in WAYS:
            for calibration in (None, task.calibration):
                shared = {"example_inputs": example, "calibration": calibration, "skip": task.skip}
                ranks = ck.allocate(task.model, budget, by=way, **shared)
                small, report = ck.compress(task.model, ranks, goal="size", remove_dead=False, **shared)
                features = task.all_features(small)
                moved = float((features - whole).norm() / whole.norm())
                rows.append((task.name, f"{budget:g}", way, "inputs" if calibration else "weights", f"{report.macs:,}",
                             f"{report.params:,}", f"{probe(features, task.labels):.1f}", f"{moved:.2f}"))  # fmt: skip
                advance()
    return rows


if __name__ == "__main__":
    typer.run(main)
