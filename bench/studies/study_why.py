"""Why low rank from scratch needs fewest multiply-adds on Fashion-MNIST: by better ranks, or by cheaper training?

    python -m bench.studies.study_why FOLDER    # of the IDX files; 40 minutes

writes bench/results/study-why.md. Two checks: the ranks that the nuclear norm finds are trained from scratch, and its
networks are fine-tuned for as long as they were trained.
"""

import tempfile
from dataclasses import replace as changed
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, ClassVar

import torch
import typer
from rich.progress import Progress

from compaware_kernels import ranks
from compaware_kernels._utils.tables import text_table
from compaware_kernels.compression import compress
from compaware_kernels.environment import machine
from compaware_kernels.nn import lowrank
from compaware_kernels.nn.module_surgery import replace
from compaware_kernels.nn.registry import low_rank_type
from compaware_kernels.study import arms, fit
from compaware_kernels.study.config import Config, Key
from compaware_kernels.study.data import Source, load

ROOT = Path(__file__).parents[2]
RULE, STRENGTH, SHARE = "energy:0.98", 30.0, 0.2
TEXT = """# Why low rank from scratch wins on Fashion-MNIST

Validation accuracy less that of the plain network, in points, mean and deviation of {seeds} seeds; `compaware study
fashion`'s network and settings: {epochs} epochs, where the table says nothing else. The nuclear norm (per step,
strength {strength:g}) is compressed at `{rule}`. What fine-tuning adds to it is what the shrinking took or what time
gives: the last row but one, with the same ranks and as many epochs, tells which.

{table}

{machine}. `python -m bench.studies.study_why FOLDER`
"""


class Given(arms.FixedRank):
    """Arm that trains low-rank layers from scratch at given ranks; the classifier stays dense."""

    ranks: ClassVar[dict[str, int]] = {}

    def prepare(self, model):
        for name in self.ranks.keys() - set(self.plan.skip):
            layer = model.get_submodule(name)
            replace(model, name, low_rank_type(layer).from_dense(layer, self.ranks[name]))
        return model


def main(
    folder: Annotated[Path, typer.Argument(help="Fashion-MNIST's IDX files.")],
    out: Annotated[Path, typer.Option(help="Where to write the table.")] = ROOT / "bench/results/study-why.md",
) -> None:
    torch.set_num_threads(1)
    config = changed(Config.read("fashion"), data=str(folder))
    data, found = load(config), {}
    arms.ARMS["given"] = Given
    with Progress() as bar:
        task = bar.add_task("epochs", total=config.seeds * 6 * config.epochs)
        for seed in range(config.seeds):
            for what, row in one(config, data, seed, lambda: bar.advance(task)):
                found.setdefault(what, []).append(row)
    rows = [(what, *(spread(column) for column in zip(*values, strict=True))) for what, values in found.items()]
    table = text_table(("network", "multiply-adds", "points"), rows, right=(1, 2), markdown=True)
    facts = {"seeds": config.seeds, "epochs": config.epochs, "strength": STRENGTH, "rule": RULE, "machine": machine()}
    out.write_text(TEXT.format(table=table.strip(), **facts), encoding="utf-8")
    print(table, f"\nWritten: {out}")


def one(config: Config, data: Source, seed: int, advance) -> list[tuple[str, tuple[float, float]]]:
    """For each network: its multiply-adds, and its accuracy relative to the plain network."""

    def trained(arm: str, times: int = 1, **strength: float):
        longer = changed(config, epochs=times * config.epochs)
        with tempfile.TemporaryDirectory() as part:
            return fit.fit(longer, Key(arm, tuple(strength.items()), seed), data, Path(part), advance).model

    def measured(model) -> tuple[float, float]:
        size = compress(model, {}, (data.example(1),), goal="size", remove_dead=False)[1].macs
        return size, fit.accuracy(model, data.validation()) - plain

    plain = fit.accuracy(trained("plain"), data.validation())
    small, _ = compress(trained("nuclear-steps", nuclear=STRENGTH), ranks.parse(RULE), (data.example(1),), goal="size")
    rows = [("nuclear norm, compressed", measured(small))]
    fit.tune(small, data, changed(config, tune_epochs=config.epochs, tune_lr=config.lr), seed)
    rows.append((f"the same, fine-tuned for {config.epochs} epochs more", measured(small)))
    Given.ranks = {name: m.rank for name, m in small.named_modules() if isinstance(m, lowrank.LowRank)}
    rows.append(("its ranks, from scratch", measured(trained("given"))))
    rows.append((f"its ranks, from scratch, {2 * config.epochs} epochs", measured(trained("given", times=2))))
    rows.append((f"{SHARE:g} of every full rank, from scratch", measured(trained("fixed-rank", share=SHARE))))
    return rows


def spread(values: tuple[float, ...]) -> str:
    form = "{:,.0f}" if max(values) > 1000 else "{:.2f}"
    return f"{form.format(mean(values))} ± {form.format(stdev(values))}"


if __name__ == "__main__":
    typer.run(main)
