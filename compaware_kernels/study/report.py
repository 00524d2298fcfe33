"""Report of a study: results as JSON, a self-contained HTML page, and the main plot as SVG."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import mean

from jinja2 import Environment

from .._utils.atomic_write import write_text
from . import latency, plots
from .arms import ARMS
from .config import Config, Key
from .curves import Arms, Choice, area, by_arm, curve, needs, sizes, spread
from .data import Source
from .plots import svg
from .points import LOW_RANK, SPARSE
from .runs import Record

__all__ = ["about", "choices", "describe", "rows", "write"]

RULE = "energy:0.99"  # of the sensitivity map, where the study has it; else its last rule


def write(config: Config, data: Source, records: list[Record], folder: Path, timed: str = "") -> dict[str, Path]:
    """Write ``results.json``, ``report.html`` and ``curves.svg`` into ``folder``, atomically; returns the paths.

    ``timed`` is the machine that measured milliseconds; "" where none did.
    """
    arms, best = by_arm(records, config), Choice(config.tune_epochs > 0, lost=config.lost)
    chance = 100 / data.classes
    page = Environment(autoescape=True).from_string(files(__package__).joinpath("report.html.j2").read_text())
    rule = RULE if RULE in config.rules else config.rules[-1]
    figure = plots.sensitivity(records, config.map, rule)
    trained = sorted({record.machine for record in records if record.machine})
    html = page.render(
        config=config, data=data.name, timed=timed, trained=trained, rule=rule,
        choices=[(describe(c), svg(plots.curves(arms, c, ("macs",), chance)), rows(arms, c, chance))
                 for c in choices(config)],
        others=svg(plots.curves(arms, best, ("params", "bytes"), chance)),
        latency=svg(plots.curves(arms, best, ("milliseconds",), chance)) if timed else None, images=latency.IMAGES,
        over_time=svg(plots.over_time(arms, best)), spectra=[svg(figure) for figure in plots.spectra(arms, best)],
        map=svg(figure) if figure else None, diverged=[str(r.key) for r in records if r.diverged], ours=plots.OURS,
        arms=[(arm, about(arm), "; ".join(Key(arm, tuple(s.items()), 0).setting for s in config.arms[arm]))
              for arm in arms],
    )  # fmt: skip
    needed = {describe(c): {axis: [asdict(n) for n in needs(arms, c, axis=axis)] for axis in ("macs", "params")}
              for c in choices(config)}  # fmt: skip
    table = {"config": config.to_dict() | {"data": data.name}, "timed": timed, "needs": needed,
             "records": [asdict(record) for record in records]}  # fmt: skip
    return {
        "report": write_text(folder / "report.html", html),
        "curves": write_text(folder / "curves.svg", svg(plots.curves(arms, best, ("macs",), chance))),
        "results": write_text(folder / "results.json", json.dumps(table)),
    }


def about(arm: str) -> str:
    """Description and source of an arm, from its docstring (part of the report)."""
    text, _, _ = (ARMS[arm].__doc__ or "").partition("Attributes:")
    return " ".join(text.replace("``", "").split())


def choices(config: Config) -> list[Choice]:
    """Selections of points that the report shows: low rank alone first, fine-tuned last."""
    kinds = [(LOW_RANK,), (LOW_RANK, SPARSE)] if config.sparsities else [(LOW_RANK,)]
    return [
        Choice(tuned, kind, config.lost)
        for kind in kinds
        for tuned in ([False, True] if config.tune_epochs else [False])
    ]


def describe(choice: Choice) -> str:
    how = "compressed and fine-tuned" if choice.tuned else "compressed, not fine-tuned"
    return f"{how}{', low rank or sparse with zeros free' if SPARSE in choice.kinds else ', low rank'}"


def rows(arms: Arms, choice: Choice, chance: float) -> list[tuple[str, ...]]:
    """For every arm, the cheapest first: what it needs to keep the accuracy (multiply-adds, over those of
    plain, parameters, what it loses in test accuracy), the area under its curve, and seconds of a training."""
    macs, params = needs(arms, choice), {n.arm: n for n in needs(arms, choice, axis="params")}
    reference = next(mean(n.values) if n.values else None for n in macs if n.arm == "plain")
    at, table = sizes(arms, choice, "macs"), []
    for n in sorted(macs, key=lambda n: (n.missing, mean(n.values) if n.values else 0)):
        areas = [area(curve(records, at, choice, "macs", chance)) for records in arms[n.arm].values()]
        seconds = mean(r.seconds for records in arms[n.arm].values() for r in records)
        ratio = f"{mean(n.values) / reference:.2f}" if n.values and reference and not n.missing else "-"
        table.append((n.arm, str(n), ratio, str(params[n.arm]), spread(n.tests, "{:+.1f}"), spread(areas, "{:.1f}"),
                      f"{seconds:.1f}"))  # fmt: skip
    return table
