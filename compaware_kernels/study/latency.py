"""How long the compressed networks of the first seed take, measured beside each other: ``latency.json``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..demo.data import Images
from ..fuse import fuse
from .networks import build
from .runs import Record, Study, read_json, write_json

IMAGES = 32  # in a batch
ROUNDS = 7


def measure(study: Study, records: list[Record], data: Images, advance: Callable[[], None]) -> None:
    """Measure every kept network that was not, and set ``milliseconds`` of all points that have one.

    Milliseconds for 32 images on one thread, after :func:`compaware_kernels.fuse`; the median of 7 rounds, in each of
    which every network has its turn. ``advance`` is called once for every round.
    """
    path = study.folder / "latency.json"
    known = read_json(path) if path.is_file() else {}
    kept = {(id(p), study.models(r.key) / p.model) for r in records for p in r.points if p.model}
    missing = sorted({str(file.relative_to(study.folder)) for _, file in kept} - set(known))
    if missing:
        known |= _time([study.folder / name for name in missing], missing, study, data, advance)
        write_json(path, known)
    for record in records:
        for point in record.points:
            if point.model:
                name = (study.models(record.key) / point.model).relative_to(study.folder)
                point.milliseconds = known[str(name)]


def _time(
    paths: list[Path], names: list[str], study: Study, data: Images, advance: Callable[[], None]
) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = data.test_x[:IMAGES]
    networks = [_network(path, study, data, x) for path in paths]
    times: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for network, taken in zip(networks, times, strict=True):
                network(x)  # its weights come into the caches
                started = time.perf_counter()
                network(x)
                network(x)
                taken.append((time.perf_counter() - started) / 2)
            advance()
    torch.set_num_threads(threads)
    return {name: 1e3 * median(taken) for name, taken in zip(names, times, strict=True)}


def _network(path: Path, study: Study, data: Images, x: Tensor) -> nn.Module:
    dense = build(study.config.network, x.shape[1], int(data.train_y.max()) + 1, x.shape[-1], 0)
    return fuse(checkpoint.load(path, dense).eval(), (x,))
