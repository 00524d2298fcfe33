"""Accuracy-size curves of the arms: Pareto fronts, areas, and the size needed for a given accuracy.

Networks are selected by validation accuracy and reported with test accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from .points import LOW_RANK, Point
from .runs import Record

__all__ = ["Arms", "Choice", "Need", "area", "by_arm", "curve", "front", "need", "needs", "sizes", "spread"]

Arms = dict[str, dict[int, list[Record]]]  # arm -> seed -> its trainings


@dataclass(frozen=True)
class Choice:
    """Selection of points: fine-tuned or not; low rank only, or also sparse ones with zeros not counted."""

    tuned: bool
    kinds: tuple[str, ...] = (LOW_RANK,)
    lost: float = 1.0  # points of accuracy below the plain network's

    def accuracies(self, point: Point) -> tuple[float, float]:
        """(validation, test)"""
        if self.tuned:
            return point.tuned_validation, point.tuned_test
        return point.validation, point.test

    def of(self, records: Iterable[Record]) -> list[Point]:
        return [
            p
            for record in records
            for p in record.points
            if p.kind in self.kinds and (p.tuned_test is not None or not self.tuned)
        ]


def front(points: Iterable[Point], choice: Choice, axis: str = "macs") -> list[Point]:
    """Pareto front of size and validation accuracy, ascending in size."""
    best, found = -math.inf, []
    for point in sorted(points, key=lambda p: (getattr(p, axis), -choice.accuracies(p)[0])):
        if choice.accuracies(point)[0] > best:
            best = choice.accuracies(point)[0]
            found.append(point)
    return found


def curve(records: Iterable[Record], at: Sequence[float], choice: Choice, axis: str, chance: float) -> list[float]:
    """Test accuracy of the best network up to each size (by validation accuracy); chance level if there is none.

    Empty if the sizes are unknown (sparse networks are not timed).
    """
    points = [p for p in choice.of(records) if getattr(p, axis) is not None]
    best, values = front(points, choice, axis), []
    for size in at if points else ():
        allowed = [p for p in best if getattr(p, axis) <= size]
        values.append(choice.accuracies(allowed[-1])[1] if allowed else chance)
    return values


def sizes(arms: Arms, choice: Choice, axis: str, count: int = 200) -> list[float]:
    """Log-spaced sizes, from the smallest network with half of the plain accuracy to the largest network."""
    points = [p for seeds in arms.values() for records in seeds.values() for p in choice.of(records)]
    enough = arms["plain"][0][0].test / 2
    useful = [v for p in points if (v := getattr(p, axis)) is not None and choice.accuracies(p)[1] >= enough]
    if not useful:
        return [1.0]
    smallest, largest = min(useful), max(useful)
    step = (largest / smallest) ** (1 / (count - 1))
    return [smallest * step**i for i in range(count - 1)] + [largest]


def area(values: Sequence[float]) -> float:
    """Area under the curve, in per cent: mean accuracy over log-spaced sizes."""
    return mean(values)


def need(points: Iterable[Point], choice: Choice, wanted: float, axis: str = "macs") -> Point | None:
    """Smallest point with validation accuracy of at least ``wanted``; None if there is none."""
    enough = [p for p in points if choice.accuracies(p)[0] >= wanted and getattr(p, axis) is not None]
    return min(enough, key=lambda p: getattr(p, axis), default=None)


def by_arm(records: Sequence[Record], config) -> Arms:
    """Records by arm and seed, of the arm's configured strengths, without diverged ones.

    Raises:
        ValueError: a plain training diverged.
    """
    if lost := [str(r.key) for r in records if r.key.arm == "plain" and r.diverged]:
        raise ValueError(f"{', '.join(lost)}: diverged, so there is nothing to compare with; try a smaller lr")
    own = {(arm, tuple(strength.items())) for arm, strengths in config.arms.items() for strength in strengths}
    found: Arms = {arm: {} for arm in config.arms}
    for record in records:
        key = record.key
        if (key.arm, key.strength) in own and not record.diverged:
            found[key.arm].setdefault(key.seed, []).append(record)
    return {arm: seeds for arm, seeds in found.items() if seeds}


@dataclass
class Need:
    """Size that an arm needs for the plain network's accuracy less ``lost`` points, over the seeds that reach it."""

    arm: str
    values: list[float]  # by seed
    tests: list[float]  # test accuracy of those networks, less the plain network's
    missing: int  # seeds in which no network reaches it

    def __str__(self) -> str:
        return spread(self.values, "{:,.0f}") + (f"; {self.missing} seed(s) do not reach it" if self.missing else "")


def needs(arms: Arms, choice: Choice, axis: str = "macs") -> list[Need]:
    """Needed size of every arm; the reference is the plain uncompressed validation accuracy of the same seed."""
    table = []
    for arm, seeds in arms.items():
        found = []
        for seed, plain in arms["plain"].items():
            point = need(choice.of(seeds.get(seed, [])), choice, plain[0].validation - choice.lost, axis)
            found.append((point, plain[0].test))
        have = [(p, test) for p, test in found if p]
        values = [float(getattr(p, axis)) for p, _ in have]
        tests = [choice.accuracies(p)[1] - test for p, test in have]
        table.append(Need(arm, values, tests, len(found) - len(have)))
    return table


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation, as text."""
    if not values:
        return "-"
    text = form.format(mean(values))
    return f"{text} ± {form.replace('+', '').format(stdev(values))}" if len(values) > 1 else text
