"""Figures of a study: accuracy against size, ranks over time, spectra, sensitivity map."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from statistics import mean, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .arms import ARMS
from .curves import Arms, Choice, curve, need, needs, sizes
from .runs import Record

__all__ = ["chosen", "curves", "least", "over_time", "sensitivity", "spectra", "svg", "totals"]

# With a fixed salt the ids in an SVG are reproducible: the same results give the same file.
matplotlib.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "compaware", "font.size": 11, "font.family": "sans-serif"}
)

_COLORS = ("#444444", "#d1495b", "#d1495b", "#8f1d2c", "#8f1d2c", "#2a7f9e", "#2a7f9e", "#e0a100", "#e0a100",
            "#6f4ba0", "#6f4ba0", "#3a8f4d", "#8a8a8a", "#3a8f4d")  # fmt: skip
_LINES = ("-", "-", "--", "-", "--", "-", "--", "-", "--", "-", "--", "-", "--", "--")
STYLES = dict(zip(ARMS, zip(_COLORS, _LINES, strict=True), strict=True))
OURS = ("nuclear", "nuclear-steps", "nuclear+group", "reload")
LABELS = {"macs": "multiply-adds for one image", "params": "parameters", "bytes": "bytes on disk",
          "milliseconds": "milliseconds for a batch, one thread"}  # fmt: skip


def curves(arms: Arms, choice: Choice, axes: Sequence[str], chance: float) -> Figure:
    """Test accuracy against size, the mean over seeds; for ours also a band of one deviation. Says who wins."""
    figure = Figure(figsize=(7.2 * len(axes), 6.4), layout="constrained")
    for ax, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        at = sizes(arms, choice, axis)
        for arm, seeds in arms.items():
            values = [curve(records, at, choice, axis, chance) for records in seeds.values()]
            values = [v for v in values if v]
            if values:
                _line(ax, arm, at, values)
        plain = mean(record.test for records in arms["plain"].values() for record in records)
        ax.axhline(plain - choice.lost, color="#999", lw=1, ls=":")
        where = {"xy": (0.01, plain - choice.lost), "xycoords": ("axes fraction", "data"), "va": "center"}
        white = {"fc": "white", "ec": "none", "pad": 1.5}
        ax.annotate(f"plain accuracy less {choice.lost:g}", **where, bbox=white, color="#666", fontsize=9, zorder=4)
        ax.set_title(least(arms, choice, axis), fontsize=10)
        ax.set(xscale="log", xlabel=LABELS[axis], ylabel="test accuracy, %", ylim=_range(plain, choice.lost))
        _log_axis(ax.xaxis)
        ax.grid(alpha=0.25, which="both")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=2 * len(axes), frameon=False)
    return figure


def least(arms: Arms, choice: Choice, axis: str) -> str:
    """Which arm keeps the accuracy in all seeds with the least, of what plain needs; and this project's best."""
    totals = {n.arm: sum(n.values) for n in needs(arms, choice, axis) if n.values and not n.missing}
    order = sorted(totals, key=totals.get)
    if not order:
        return "no arm keeps that accuracy in all seeds"
    shares = {a: f": {t / totals['plain']:.2f} of plain" if totals.get("plain") else "" for a, t in totals.items()}
    text = f"least at that accuracy: {ARMS[order[0]].title}{shares[order[0]]}"
    ours = next((arm for arm in order if arm in OURS), None)
    return text if ours in (order[0], None) else f"{text}\nthis project's: {ARMS[ours].title}{shares[ours]}"


def _log_axis(axis) -> None:
    """Ticks at 1, 2 and 5 of every decade of a logarithmic axis, labeled 1k, 2k, 5k, ..., 1M."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else f"{v / 1e3:g}k" if v >= 1e3
                                           else f"{v:g}"))  # fmt: skip
    axis.set_minor_formatter(NullFormatter())


def _line(ax: Axes, arm: str, at: list[float], values: list[list[float]]) -> None:
    color, line = STYLES[arm]
    middle = [mean(v) for v in zip(*values, strict=True)]
    ax.plot(at, middle, line, color=color, lw=2.4 if arm in OURS else 1.4, label=ARMS[arm].title,
            zorder=3 if arm in OURS else 2)  # fmt: skip
    if arm in OURS and len(values) > 1:
        off = [stdev(v) for v in zip(*values, strict=True)]
        ax.fill_between(at, [m - o for m, o in zip(middle, off, strict=True)],
                        [m + o for m, o in zip(middle, off, strict=True)], color=color, alpha=0.12, lw=0)  # fmt: skip


def _range(plain: float, lost: float) -> tuple[float, float]:
    """Around the accuracy asked for, where the arms differ."""
    unit = max(lost, 0.5)
    return plain - 6 * unit, min(100.0, plain + 1.5 * unit)


def over_time(arms: Arms, choice: Choice) -> Figure:
    """Rank and live rows after every epoch, summed over all layers, of the network each arm would use."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for ax, (what, name) in zip(figure.subplots(1, 2), (("ranks", "rank"), ("rows", "rows not zero")), strict=True):
        for arm in arms:
            if record := chosen(arms, arm, choice):
                color, line = STYLES[arm]
                ax.plot(range(1, len(record.losses) + 1), totals(record, what), line, color=color,
                        label=ARMS[arm].title)  # fmt: skip
        ax.set(xlabel="epoch", ylabel=f"{name}, sum over layers", ylim=(0, None))
        ax.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=9, loc="outside right center", frameon=False)
    return figure


def totals(record: Record, what: str) -> list[int]:
    """``ranks`` or ``rows`` after every epoch, summed over layers.

    A layer that is two factors counts once, by the first one's rank or the second one's rows. It may have become that
    on the way: then its own values end where those of the factors begin.
    """
    counts, other = {"ranks": (".first", ".second"), "rows": (".second", ".first")}[what]
    epochs = len(record.losses)
    sums = [0] * epochs
    for name, values in getattr(record, what).items():
        if not name.endswith(other):
            for epoch, value in enumerate(values, epochs - len(values) if name.endswith(counts) else 0):
                sums[epoch] += value
    return sums


def spectra(arms: Arms, choice: Choice) -> list[Figure]:
    """Every layer's singular values at the end of training, of the network each arm would use, and a legend."""
    records = {arm: record for arm in arms if (record := chosen(arms, arm, choice))}
    figures, labels = [], {}
    for name in arms["plain"][0][0].spectra:
        figures.append(figure := Figure(figsize=(3.4, 3.0), layout="constrained"))
        ax = figure.subplots()
        for arm, record in records.items():
            if s := record.spectra.get(name):
                color, line = STYLES[arm]
                (labels[ARMS[arm].title],) = ax.plot(
                    range(1, len(s) + 1), [max(v / s[0], 1e-4) if s[0] else 1e-4 for v in s], line, color=color,
                    lw=2 if arm in OURS else 1.2)  # fmt: skip
        ax.set(yscale="log", ylim=(0.8e-4, 1.5), xlabel="number", ylabel="value / largest", title=f"layer {name}")
        ax.grid(alpha=0.25)
    figures.append(legend := Figure(figsize=(3.4, 3.0)))
    legend.legend(labels.values(), labels, fontsize=9, loc="center", frameon=False)
    return figures


def sensitivity(records: Sequence[Record], values: dict[str, list[float]], rule: str) -> Figure | None:
    """Test accuracy and multiply-adds at one rank rule over the strengths of both penalties; None without a map."""
    found = {r.key.strength: r for r in records if r.key.arm == "nuclear+group" and r.key.seed == 0}
    if not values:
        return None
    figure = Figure(figsize=(13, 1.6 + 0.7 * len(values["group"])), layout="constrained")
    for ax, (what, form) in zip(figure.subplots(1, 2), (("test", "{:.1f}"), ("macs", "{:,.0f}")), strict=True):
        table = [[_at(found.get((("nuclear", n), ("group", g))), rule, what) for n in values["nuclear"]]
                 for g in values["group"]]  # fmt: skip
        ax.imshow(table, aspect="auto", cmap="viridis" if what == "test" else "viridis_r", alpha=0.75)
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                ax.text(x, y, "diverged" if math.isnan(value) else form.format(value), ha="center", va="center")
        ax.set(title="test accuracy, %" if what == "test" else LABELS["macs"], xlabel="nuclear", ylabel="group")
        ax.set_xticks(range(len(values["nuclear"])), [f"{v:g}" for v in values["nuclear"]])
        ax.set_yticks(range(len(values["group"])), [f"{v:g}" for v in values["group"]])
    return figure


def _at(record: Record | None, rule: str, what: str) -> float:
    if record is None or record.diverged:
        return math.nan
    return float(next(getattr(p, what) for p in record.points if p.setting == rule))


def chosen(arms: Arms, arm: str, choice: Choice) -> Record | None:
    """The first seed's training that an arm's smallest network that keeps the accuracy comes from."""
    records = arms[arm].get(0, [])
    point = need(choice.of(records), choice, arms["plain"][0][0].validation - choice.lost)
    return next((r for r in records if any(p is point for p in r.points)), None)


def svg(figure: Figure) -> str:
    """SVG element of the figure, to embed in HTML: without XML declaration and doctype."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
