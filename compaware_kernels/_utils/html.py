"""matplotlib figures for HTML reports: SVG text and logarithmic axes."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["log_axis", "svg"]

# With a fixed salt the ids in an SVG are reproducible: the same results give the same file.
matplotlib.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "compaware", "font.size": 11, "font.family": "sans-serif"}
)


def log_axis(axis) -> None:
    """Ticks at 1, 2 and 5 of every decade of a logarithmic axis, labeled 1k, 2k, 5k, ..., 1M."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else f"{v / 1e3:g}k" if v >= 1e3
                                           else f"{v:g}"))  # fmt: skip
    axis.set_minor_formatter(NullFormatter())


def svg(figure: Figure) -> str:
    """SVG element of the figure, to embed in HTML: without XML declaration and doctype."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
