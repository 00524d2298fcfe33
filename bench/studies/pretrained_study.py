"""Pretrained models compressed without training: accuracy of a linear probe at a budget of multiply-adds.

    make pretrained-study    # 30 minutes

writes bench/results/pretrained.md. Compares all ways to spend the budget, by weights alone and with a few unlabeled
inputs. The baseline is a truncated SVD of every layer at the same share of its full rank.
"""

from pathlib import Path
from typing import Annotated

import sklearn
import typer
from rich.progress import Progress
from torch import Tensor

import compaware_kernels as ck
from bench.studies.pretrained_data import TRAIN, Task, images, probe, right, sentences
from compaware_kernels._utils.tables import text_table
from compaware_kernels.environment import machine

ROOT = Path(__file__).parents[2]
BUDGETS = (0.8, 0.65, 0.5)
WAYS = ("share", "equal", "absolute", "greedy", "relative")
TEXT = """# Pretrained models, compressed without training

Accuracy of a linear probe on the features (`bench/studies/pretrained_data.py`: {train} inputs train it, the others
test it), and how far the features move: `||F - F'|| / ||F||`. *Kept*: the dense model's probe, as it is where a model
is put in another's place; *anew*: trained on the compressed model's features, what they still tell. The ways are
`ck.allocate`'s; those that find the same ranks share a row. *Share*: a truncated SVD of every layer at one share of
its full rank, the largest that keeps the budget. *Inputs*: with unlabeled ones ({few}), `ck.compress(calibration=)`.
Budgets are of the multiply-adds of the layers that fold, measured: of the whole model.

{table}

{machine}, scikit-learn {sklearn}. `make pretrained-study`
"""
COLUMNS = ("model", "budget", "ranks", "by", "multiply-adds", "parameters", "kept, %", "anew, %",
           "features moved")  # fmt: skip


def main(
    cache: Annotated[Path, typer.Option(help="Folder for what is downloaded.")] = ROOT / "out" / "pretrained",
    out: Annotated[Path, typer.Option(help="Where to write the table.")] = ROOT / "bench/results/pretrained.md",
) -> None:
    rows, few = [], []
    with Progress() as bar:
        for make in (images, sentences):
            task = make(cache)
            few.append(f"{sum(len(batch[0]) for batch in task.calibration)} for {task.name}")
            todo = bar.add_task(task.name, total=2 * len(BUDGETS) * len(WAYS) + 1)
            rows += run(task, lambda todo=todo: bar.advance(todo))
    facts = {"machine": machine(), "sklearn": sklearn.__version__}
    table = text_table(COLUMNS, rows, right=range(4, 9), markdown=True)
    out.write_text(TEXT.format(table=table, train=f"{TRAIN:,}", few=", ".join(few), **facts), encoding="utf-8")
    print(table, f"\nWritten: {out}")


def run(task: Task, advance) -> list[tuple]:
    example, whole = tuple(x[:1] for x in task.inputs[0]), task.all_features(task.model)
    kept = probe(whole, task.labels)

    def row(budget: str, ways: str, by: str, report: ck.CompressReport, features: Tensor) -> tuple:
        scores = (right(p, features, task.labels) for p in (kept, probe(features, task.labels)))
        return (task.name, budget, ways, by, f"{report.macs:,}", f"{report.params:,}", *(f"{s:.1f}" for s in scores),
                f"{float((features - whole).norm() / whole.norm()):.2f}")  # fmt: skip

    rows = [row("1", "dense", "", ck.compress(task.model, {}, example, goal="size", remove_dead=False)[1], whole)]
    advance()
    for budget in BUDGETS:
        for calibration in (None, task.calibration):
            shared = {"example_inputs": example, "calibration": calibration, "skip": task.skip}
            found = {}
            for way in WAYS:
                chosen = ck.allocate(task.model, budget, by=way, **shared)
                found.setdefault(tuple(map(str, chosen.values())), (chosen, []))[1].append(way)
                advance()
            for chosen, ways in found.values():
                small, report = ck.compress(task.model, chosen, goal="size", remove_dead=False, **shared)
                by = "inputs" if calibration else "weights"
                rows.append(row(f"{budget:g}", ", ".join(ways), by, report, task.all_features(small)))
    return rows


if __name__ == "__main__":
    typer.run(main)
