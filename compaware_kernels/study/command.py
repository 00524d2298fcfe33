"""Command ``compaware study``: run or resume a study, write and print its results."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from .._utils.tables import text_table
from . import Stopped, latency, report
from .config import Config
from .data import Source, load
from .runs import Study

__all__ = ["run"]

COLUMNS = ("arm", "multiply-adds at plain accuracy less {:g}", "of plain's", "parameters", "test accuracy, points",
           "area, %", "CPU s")  # fmt: skip


def run(
    config: str, data: str | None, out: Path | None, processes: int | None, progress: Callable[[], Progress]
) -> None:
    """Run the remaining training runs of a study, then write and print its results.

    Raises:
        Stopped: interrupted by SIGINT (Ctrl-C) or SIGTERM, or see :class:`Study`.
    """
    settings = Config.read(config)
    if data:
        settings = replace(settings, data=data)
    images = load(settings, settings.devices[0])  # fails on missing images before anything is written
    work = Study(settings, images.name, out or Path("out/study") / Path(config).stem)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        with work.alone():
            _run(work, images, processes or _processes(settings), progress)
    except KeyboardInterrupt as error:
        done = len(settings.keys) - len(work.left)
        raise Stopped(f"interrupted, {done} of {len(settings.keys)} trainings are done; the same command goes on from "
                      "there") from error  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(work: Study, images: Source, processes: int, progress: Callable[[], Progress]) -> None:
    settings, left = work.config, work.left
    print(f"{len(settings.keys)} trainings, {len(left)} left")
    with progress() as bar:
        if left:
            task = bar.add_task("starting", total=len(left) * settings.units)
            work.run(processes, lambda key: bar.update(task, advance=1, description=str(key)))
        records = work.records()
        timing = bar.add_task("measuring time", total=1)
        timed = latency.measure(work, records, images)
        bar.update(timing, advance=1)
    paths = report.write(settings, images, records, work.folder, timed)
    arms, chance = report.by_arm(records, settings), 100 / images.classes
    for choice in report.choices(settings):
        print(f"\n{images.name}, {settings.network}: {report.describe(choice)}\n")
        print(
            text_table([c.format(settings.lost) for c in COLUMNS], report.rows(arms, choice, chance), right=range(1, 7))
        )
    print_paths(paths)


def print_paths(paths: Mapping[str, Path]) -> None:
    """What was written, and where."""
    print("\nWritten:")
    for name, path in paths.items():
        print(f"  {name}: {path}")


def _processes(settings: Config) -> int:
    """Number of worker processes: one per GPU, or one per core."""
    return len(settings.devices) if settings.devices[0].type == "cuda" else os.cpu_count() or 1
