"""Tables as plain text or markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["text_table"]


def text_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = (), markdown: bool = False
) -> str:
    """Table as text, up to 220 characters wide.

    Args:
        columns: headings.
        rows: cells of each row; converted by ``str``.
        right: numbers of the columns to align right.
        markdown: as a markdown table.
    """
    table = Table(box=box.MARKDOWN) if markdown else Table(box=box.SIMPLE_HEAD, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(width=220, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().strip("\n").rstrip().splitlines())
