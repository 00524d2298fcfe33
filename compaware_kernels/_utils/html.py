"""Figures of HTML reports as SVG, and their axes."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# The salt makes the names in an SVG the same every time: a page made again from the same results is the same file.
matplotlib.rcParams.update(
    {"svg.fonttype": "none", "svg.hashsalt": "compaware", "font.size": 11, "font.family": "sans-serif"}
)


def log_axis(axis) -> None:
    """Labels 1k, 2k, 5k, ... on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else f"{v / 1e3:g}k" if v >= 1e3
                                           else f"{v:g}"))  # fmt: skip
    axis.set_minor_formatter(NullFormatter())


def svg(figure: Figure) -> str:
    """For a page, without what a file of its own has in front."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
