"""Progress bars on stderr for work of unknown length."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["tracked"]

T = TypeVar("T")
PATIENCE = 2.0  # seconds of work before a bar appears


def tracked(units: Iterable[T], what: str, shown: bool | None = None) -> Iterator[T]:
    """The units one by one, with a progress bar on stderr from the third second on; it vanishes at the end.

    Args:
        what: what is done with them.
        shown: whether to show the bar; None: if stderr is a terminal.
    """
    console = Console(stderr=True, force_terminal=shown)
    if not console.is_terminal:
        yield from units
        return
    bar = Progress(TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)  # fmt: skip
    task, start = bar.add_task(what, total=len(units) if isinstance(units, Sized) else None), time.monotonic()
    try:
        for unit in units:
            yield unit
            bar.advance(task)
            if time.monotonic() - start > PATIENCE:
                bar.start()  # once started, it does nothing
    finally:
        bar.stop()
