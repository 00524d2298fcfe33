"""Interleaved timing of functions that change weights in place, each of which is checked against the truth first."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bench.common import workloads

SLOW, VERY_SLOW = 1e3, 3.5e3  # ms: functions slower than this run three times, or once


@dataclass
class Row:
    """Result of one function: median ms, reports, largest error and bound in units of tau, and whether it is right."""

    ms: float
    infos: list | None
    error: float
    bound: float | None
    ok: bool


def timed(function, *args) -> tuple[float, object]:
    """Milliseconds of one call, and its result."""
    results = []
    return 1e3 * workloads.seconds(lambda: results.append(function(*args))), results[0]


class Race:
    """Times ``work[name](weights)`` for every name in turn, on weights that are reset in place before each call."""

    def __init__(self, weights: list[Tensor], truths: list[Tensor], work: dict[str, Callable]):
        self.weights, self.work, self.times, self.rows = weights, work, {}, {}
        for name, function in work.items():
            Ws = [W.clone() for W in weights]
            took, infos = timed(function, Ws)
            self.rows[name] = Row(took, infos, *workloads.check(Ws, truths, infos))
            self.times[name] = [took] if took > VERY_SLOW else []
        self._reset = [W.clone() for W in weights]

    def once(self, name: str) -> None:
        torch._foreach_copy_(self._reset, self.weights)
        self.times[name].append(timed(self.work[name], self._reset)[0])

    def round(self, rounds: int) -> None:
        """Time each function once, unless it has been timed often enough."""
        for name, done in self.times.items():
            if len(done) < (1 if done and done[0] > VERY_SLOW else 3 if done and done[0] > SLOW else rounds):
                self.once(name)

    def result(self) -> dict[str, Row]:
        for name, row in self.rows.items():
            row.ms = median(self.times[name])
        return self.rows
