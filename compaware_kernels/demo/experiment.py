"""The demo's experiment: train plainly and compression-aware, compress both alike, evaluate on held-out images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn

from .. import ranks
from ..compression.compress import CompressReport, compress
from ..nn.discovery import foldable_layers
from ..nn.factorization import singular_values
from ..study.images import Images
from ..training.proximal_step import ProximalStep
from .networks import small_convnet

ARMS = ("plain", "compression-aware")
STRENGTHS = tuple(ranks.energy(e) for e in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999))


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome.  Both arms share all but the two penalties."""

    seeds: int = 3
    epochs: int = 30
    tune_epochs: int = 3
    batch: int = 32
    lr: float = 0.05
    tune_lr: float = 0.01
    momentum: float = 0.9
    nuclear: float = 2.0
    group: float = 0.05
    skip: tuple[str, ...] = ("11",)  # every class needs its row of the last layer


@dataclass
class Point:
    """A compressed network."""

    strength: str
    params: int
    macs: int  # for one image
    accuracy: float  # per cent of the held-out images
    tuned_accuracy: float | None = None  # after fine-tuning the compressed network


@dataclass
class Run:
    """One trained network, and what it becomes at every strength."""

    arm: str
    seed: int
    accuracy: float
    params: int
    macs: int
    seconds: float
    ranks: dict[str, tuple[int, int]]  # numerical rank of full rank, by layer
    spectra: dict[str, list[float]]
    points: list[Point] = field(default_factory=list)


@dataclass
class Result:
    """All runs, and of the first seed the compression-aware network, and the smallest it becomes within a point."""

    settings: Settings
    data: str
    runs: list[Run]
    dense: nn.Module | None = None
    model: nn.Module | None = None
    report: CompressReport | None = None


def units(settings: Settings) -> int:
    """How many times :func:`run` calls ``advance``."""
    return settings.seeds * len(ARMS) * (settings.epochs + len(STRENGTHS) * max(1, settings.tune_epochs))


def run(data: Images, settings: Settings, advance: Callable[[str], None]) -> Result:
    """Train, compress and evaluate every arm and seed; ``advance(what)`` is called after every unit of work."""
    result = Result(settings, data.name, [])
    for seed in range(settings.seeds):
        floor = None
        for arm in ARMS:
            started = time.perf_counter()
            model = train(
                data, settings, arm, seed, lambda arm=arm, seed=seed: advance(f"{arm}, seed {seed}: training")
            )
            record = _record(model, data, arm, seed, time.perf_counter() - started)
            result.runs.append(record)
            floor = record.accuracy - 1 if floor is None else floor
            if arm == ARMS[1] and seed == 0:
                result.dense = model
            for strength in STRENGTHS:
                small, report = compress(model, strength, (data.test_x[:1],), goal="size")
                point = Point(str(strength), report.params, report.macs, accuracy(small, data))
                record.points.append(point)
                best = result.report is None or report.macs < result.report.macs
                if arm == ARMS[1] and seed == 0 and point.accuracy >= floor and best:
                    result.model, result.report = copy.deepcopy(small), report
                step = lambda arm=arm, seed=seed: advance(f"{arm}, seed {seed}: compressing")  # noqa: E731
                if settings.tune_epochs:
                    _fit(small, data, settings, settings.tune_epochs, settings.tune_lr, seed, step)
                    point.tuned_accuracy = accuracy(small, data)
                else:
                    step()
    return result


def train(data: Images, settings: Settings, arm: str, seed: int, advance: Callable[[], None]) -> nn.Module:
    """A network trained from the weights and in the batch order that the seed gives, the same for both arms."""
    torch.manual_seed(seed)
    model = small_convnet(classes=int(data.train_y.max()) + 1)
    penalties = {"nuclear": settings.nuclear, "group": settings.group} if arm == ARMS[1] else {}
    _fit(model, data, settings, settings.epochs, settings.lr, seed, advance, penalties)
    return model


def _fit(
    model: nn.Module,
    data: Images,
    settings: Settings,
    epochs: int,
    lr: float,
    seed: int,
    advance: Callable[[], None],
    penalties: dict[str, float] | None = None,
) -> None:
    """SGD with momentum and a cosine schedule; with penalties, a proximal step after every epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=settings.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    prox = ProximalStep(model, optimizer, **penalties, skip=settings.skip) if penalties else None
    shuffle = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=shuffle).split(settings.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
        if prox:
            prox.step()
        schedule.step()
        advance()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Per cent of the held-out images classified right."""
    model.eval()
    right = [
        (model(x).argmax(1) == y).sum() for x, y in zip(data.test_x.split(1000), data.test_y.split(1000), strict=True)
    ]
    return 100 * int(sum(right)) / len(data.test_y)


def _record(model: nn.Module, data: Images, arm: str, seed: int, seconds: float) -> Run:
    _, whole = compress(model, ranks.energy(1.0), (data.test_x[:1],), goal="size", remove_dead=False)
    spectra = {layer.name: singular_values(layer.matrix())[0] for layer in foldable_layers(model)[0]}
    kept = {name: (int(ranks.numerical_rank(s, torch.float32)), len(s)) for name, s in spectra.items()}
    return Run(arm, seed, accuracy(model, data), whole.params_before, whole.macs_before, seconds, kept,
               {name: s.tolist() for name, s in spectra.items()})  # fmt: skip


# --- the figure that counts: multiply-adds needed to stay within a point of the plain network -----------------------


@dataclass
class Need:
    """Multiply-adds (per image) each arm needs at equal accuracy, per seed; None where no strength reaches it."""

    tuned: bool
    macs: dict[str, list[int | None]]

    @property
    def ratios(self) -> list[float]:
        """Compression-aware over plain, for the seeds where both reach the accuracy."""
        return [ours / plain for plain, ours in zip(*(self.macs[arm] for arm in ARMS), strict=True) if plain and ours]

    def __str__(self) -> str:
        spread = f" +- {stdev(self.ratios):.2f}" if len(self.ratios) > 1 else ""
        missing = len(self.macs[ARMS[0]]) - len(self.ratios)
        note = f"; {missing} seed(s) did not reach the accuracy" if missing else ""
        if not self.ratios:
            return "an unknown share (no seed reached the accuracy)"
        return f"{mean(self.ratios):.2f}{spread} over {len(self.ratios)} seed(s){note}"


def need(result: Result, tuned: bool, points_lost: float = 1.0) -> Need:
    """The fewest multiply-adds at which each arm keeps the plain network's accuracy of the same seed, less a point."""
    floors = {run.seed: run.accuracy - points_lost for run in result.runs if run.arm == ARMS[0]}
    macs: dict[str, list[int | None]] = {arm: [] for arm in ARMS}
    for run_ in result.runs:
        reached = [p.macs for p in run_.points
                   if (p.tuned_accuracy if tuned else p.accuracy) >= floors[run_.seed]]  # fmt: skip
        macs[run_.arm].append(min(reached, default=None))
    return Need(tuned, macs)
