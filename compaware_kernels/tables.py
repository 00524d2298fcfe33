"""Plain-text tables (by rich)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = (), title: str | None = None
):
    """A rich table of ``rows`` under ``columns``; the columns numbered in ``right`` are aligned to the right."""
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


def text_table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """The same as text, as wide as it needs to be."""
    console = Console(width=220, no_color=True)
    with console.capture() as capture:
        console.print(table(columns, rows, right))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
