"""Command ``compaware demo``: train a small CNN with and without compression-aware penalties, compress, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from rich.progress import Progress
from torch import nn

from .. import ranks
from .._utils.tables import text_table
from ..compression import checkpoint
from ..compression.compress import compress
from ..study import report
from ..study.command import print_paths
from ..study.config import Config
from ..study.curves import Arms, Choice, by_arm, need, needs, spread
from ..study.data import Source, load
from ..study.fit import fit
from ..study.runs import Record, record

__all__ = ["run", "settings"]

PLAIN, AWARE = "plain", "nuclear+group"
NAMES = {PLAIN: "plain", AWARE: "compression-aware"}
RULES = tuple(f"energy:{share}" for share in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999))
COLUMNS = ("rank rule", "training", "multiply-adds", "parameters", "accuracy, %", "fine-tuned, %")


def settings(data: Path | None, seeds: int, epochs: int, tune_epochs: int, nuclear: float, group: float) -> Config:
    """Study configuration of the two arms, on scikit-learn's digits or the images in the folder ``data``."""
    return Config(
        data=str(data.absolute()) if data else "digits", network="small_convnet", device="cpu",
        validation=0.25, lost=2,  # 270 validation images of the digits: one is 0.4 points
        seeds=seeds, epochs=epochs, tune_epochs=tune_epochs, rules=RULES,
        arms={PLAIN: [{}], AWARE: [{"nuclear": nuclear, "group": group}]},
    )  # fmt: skip


def run(config: Config, out: Path, progress: Callable[[], Progress]) -> None:
    """Demo run: train, compress and fine-tune all networks in this process, write results to ``out``, print a table.

    Raises:
        FileNotFoundError: images are missing.  ValueError: an image file is damaged, or training diverged.
    """
    images = load(config)
    out.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("starting", total=len(config.keys) * config.units)
        records, dense = _train(config, images, lambda what: bar.update(task, advance=1, description=what))
    arms = by_arm(records, config)
    paths = report.write(config, images, records, out) | _write_networks(dense, arms, config, images, out)
    print(f"{images.name}, means over {config.seeds} seed(s)\n")
    print(text_table(COLUMNS, _rows(arms), right=range(2, 6)))
    print(f"\nAt the plain network's accuracy on validation images, less {config.lost:g} points:")
    for choice in report.choices(config):
        print(f"  {report.describe(choice)}: {_comparison(arms, choice)}")
    print_paths(paths)


def _train(config: Config, images: Source, advance: Callable[[str], None]) -> tuple[list[Record], nn.Module]:
    """Records of all training runs, and the compression-aware network of the first seed."""
    records, networks = [], {}
    for key in config.keys:
        step = lambda key=key: advance(f"{NAMES[key.arm]}, seed {key.seed}")  # noqa: E731
        with TemporaryDirectory() as folder:
            trained = fit(config, key, images, Path(folder), step)
        networks.setdefault(key.arm, trained.model)
        records.append(record(config, key, trained, images, step))
    return records, networks[AWARE]


def _write_networks(dense: nn.Module, arms: Arms, config: Config, images: Source, out: Path) -> dict[str, Path]:
    """Checkpoints of the compression-aware network of seed 0: dense, and the smallest within the accuracy loss."""
    paths = {f"{NAMES[AWARE]} network before compression (seed 0)": out / "dense.safetensors"}
    checkpoint.save(dense, out / "dense.safetensors")
    choice = Choice(tuned=False, lost=config.lost)
    point = need(choice.of(arms[AWARE][0]), choice, arms[PLAIN][0][0].validation - config.lost)
    if point:
        small, _ = compress(dense, ranks.parse(point.setting), (images.example(1),), goal="size")
        checkpoint.save(small, out / "small.safetensors")
        paths[f"the same compressed, within {config.lost:g} points of plain"] = out / "small.safetensors"
    return paths


def _rows(arms: Arms) -> Iterator[tuple[str, ...]]:
    """Table rows per rank rule and arm, means over seeds: multiply-adds, parameters, test accuracy, fine-tuned."""
    for i, rule in enumerate(RULES):
        for arm, name in NAMES.items():
            points = [records[0].points[i] for records in arms[arm].values()]
            tuned = [p.tuned_test for p in points if p.tuned_test is not None]
            yield (rule, name, *(f"{mean(getattr(p, size) for p in points):,.0f}" for size in ("macs", "params")),
                   f"{mean(p.test for p in points):.1f}", f"{mean(tuned):.1f}" if tuned else "-")  # fmt: skip


def _comparison(arms: Arms, choice: Choice) -> str:
    """Ratio of multiply-adds, compression-aware / plain, at the chosen accuracy: mean and deviation over seeds."""
    ratios = []
    for seed in arms[PLAIN]:
        found = {n.arm: n.values for n in needs({arm: {seed: seeds[seed]} for arm, seeds in arms.items()}, choice)}
        ratios += [aware / plain for aware, plain in zip(found[AWARE], found[PLAIN], strict=False)]
    missing = len(arms[PLAIN]) - len(ratios)
    note = f" ({missing} seed(s) do not reach the accuracy)" if missing else ""
    return f"the compression-aware network needs {spread(ratios, '{:.2f}')} of the plain one's multiply-adds{note}"
