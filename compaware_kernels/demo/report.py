"""The demo's results as JSON and as one self-contained HTML page."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import mean

import torch
from jinja2 import Environment
from matplotlib.figure import Figure

from .._utils.atomic_write import write_text
from .._utils.html import log_axis, svg
from ..environment import machine
from .experiment import ARMS, Need, Result, Run, need

COLOURS = dict(zip(ARMS, ("#5b6b7b", "#d1495b"), strict=True))


def write(result: Result, folder: Path) -> dict[str, Path]:
    """Write ``results.json`` and ``report.html`` into ``folder``, atomically; returns their paths by name."""
    page = Environment(autoescape=True).from_string(files(__package__).joinpath("report.html.j2").read_text())
    needs = {tuned: need(result, tuned) for tuned in ([False, True] if _tuned(result) else [False])}
    html = page.render(
        result=result, arms=ARMS, needs=needs, machine=machine(), rows=summary_rows(result),
        curves=[svg(_curves(result, axis, label)) for axis, label in
                (("macs", "multiply-adds for one image"), ("params", "parameters"))],
        spectra=svg(_spectra(result)),
    )  # fmt: skip
    macs_needed = {"tuned" if tuned else "untuned": {"macs": n.macs, "ratios": n.ratios} for tuned, n in needs.items()}
    data = {"settings": asdict(result.settings), "data": result.data, "machine": machine(), "need": macs_needed,
            "runs": [asdict(run) for run in result.runs]}  # fmt: skip
    return {
        "report": write_text(folder / "report.html", html),
        "results": write_text(folder / "results.json", json.dumps(data, indent=1)),
    }


def summary_rows(result: Result) -> list[tuple[str, ...]]:
    """Per strength: mean multiply-adds, parameters and accuracies of both arms, as text."""
    rows = []
    for i, strength in enumerate(p.strength for p in result.runs[0].points):
        for arm in ARMS:
            points = [run.points[i] for run in _runs(result, arm)]
            tuned = [p.tuned_accuracy for p in points if p.tuned_accuracy is not None]
            macs, params = (f"{mean(getattr(p, size) for p in points):,.0f}" for size in ("macs", "params"))
            accuracy = f"{mean(p.accuracy for p in points):.1f}"
            rows.append((strength, arm, macs, params, accuracy, f"{mean(tuned):.1f}" if tuned else "-"))
    return rows


def need_line(needed: Need) -> str:
    """One sentence with the figure that counts."""
    how = "compressed and fine-tuned" if needed.tuned else "compressed, not fine-tuned"
    return f"{how}: the compression-aware network needs {needed} of the multiply-adds the plain one needs"


def _runs(result: Result, arm: str) -> list[Run]:
    return [run for run in result.runs if run.arm == arm]


def _tuned(result: Result) -> bool:
    return result.runs[0].points[0].tuned_accuracy is not None


def _curves(result: Result, axis: str, label: str) -> Figure:
    """Accuracy against size: a dot per network, a line through the means of each strength."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    ax = figure.subplots()
    for arm in ARMS:
        runs, colour = _runs(result, arm), COLOURS[arm]
        for accuracy, style, name in (("accuracy", "-", arm), ("tuned_accuracy", "--", f"{arm}, fine-tuned")):
            points = [[p for p in run.points if getattr(p, accuracy) is not None] for run in runs]
            if points[0]:
                x = torch.tensor([[getattr(p, axis) for p in ps] for ps in points], dtype=torch.float64)
                y = torch.tensor([[getattr(p, accuracy) for p in ps] for ps in points], dtype=torch.float64)
                ax.plot(x.mean(0), y.mean(0), style, color=colour, lw=2, label=name)
                ax.scatter(x, y, s=10, color=colour, alpha=0.35, lw=0)
    plain = mean(run.accuracy for run in _runs(result, ARMS[0]))
    whole = getattr(result.runs[0], axis)
    ax.plot(whole, plain, "*", color=COLOURS[ARMS[0]], ms=13, label="plain, not compressed")
    ax.axhline(plain - 1, color="#999", lw=1, ls=":")
    ax.annotate("plain accuracy less 1 point", (0.99, plain - 1), xycoords=("axes fraction", "data"),
                ha="right", va="top", xytext=(0, -3), textcoords="offset points", color="#666", fontsize=9)  # fmt: skip
    ax.set(xscale="log", xlabel=label, ylabel="held-out accuracy, %", ylim=(max(0, plain - 20), min(100, plain + 2)))
    log_axis(ax.xaxis)
    ax.grid(alpha=0.25, which="both")
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _spectra(result: Result) -> Figure:
    """Every layer's singular values after plain and after compression-aware training, first seed."""
    first = {arm: _runs(result, arm)[0] for arm in ARMS}
    names = list(first[ARMS[0]].spectra)
    figure = Figure(figsize=(3.1 * len(names), 3.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for arm in ARMS:
            s = first[arm].spectra[name]
            rank, full = first[arm].ranks[name]
            shown = [max(v / s[0], 1e-4) if s[0] else 1e-4 for v in s]
            ax.plot(range(1, full + 1), shown, color=COLOURS[arm], lw=2, label=f"rank {rank} of {full}")
        ax.set(yscale="log", ylim=(0.8e-4, 1.5), xlabel="number", title=f"layer {name}")
        ax.grid(alpha=0.25)
        ax.legend(fontsize=9, loc="lower left")
    figure.axes[0].set_ylabel("singular value / largest")
    return figure
