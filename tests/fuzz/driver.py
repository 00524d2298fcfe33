"""Runs seeded cases in a child process, so that a case that ends the process is a violation like any other.

A module of cases has ``check(seed) -> (name of the case, violations)``; its ``main`` is :func:`hunt`.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import typer
from rich.progress import track

MARK = "case: "  # what the libraries print is no result


class Result(NamedTuple):
    seed: int
    name: str
    violations: list[str]


def results(module: str, first: int, count: int) -> Iterator[Result]:
    """One result per seed, in order; after a crash another child goes on with the next seed."""
    end = first + count
    while first < end:
        command = [sys.executable, "-m", "tests.fuzz.driver", module, str(first), str(end)]
        with (
            tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads would block a child that says much
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        ):
            for line in child.stdout:
                if line.startswith(MARK):
                    yield Result(*json.loads(line.removeprefix(MARK)))
                    first += 1
            child.wait()
            errors.seek(0)
            said = errors.read()[-300:]
        if child.returncode:
            how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"{child.returncode}: {said}"
            yield Result(first, "?", [f"the process ended with {how}"])
            first += 1


def hunt(module: str, cases: int, seed: int = 0, show: int = 50) -> None:
    """Check so many seeds, print what is violated, with the seed that remakes it; exit with 1 if anything is."""
    families, bad = Counter(), []
    for result in track(results(module, seed, cases), "Hunting", total=cases):
        families[result.name.split(",")[0]] += 1
        if result.violations:
            bad.append(result.seed)
            if len(bad) <= show:
                print(f"{result.seed}: {result.name}: {'; '.join(result.violations)}", flush=True)
    print(", ".join(f"{name}: {count}" for name, count in sorted(families.items())))
    print(f"{cases} cases, {len(bad)} with violations: {bad}")
    raise typer.Exit(bool(bad))


def _child(module: str, first: str, end: str) -> None:
    torch.set_num_threads(1)
    check = importlib.import_module(module).check
    for seed in range(int(first), int(end)):
        name, violations = check(seed)
        print(MARK + json.dumps([seed, name, violations]), flush=True)


if __name__ == "__main__":
    _child(*sys.argv[1:])
