"""How long the low-rank networks take, measured beside each other: ``latency.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
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
    """Set ``milliseconds`` of all low-rank points; measures what is not in the file yet.

    Milliseconds for 32 images on one thread, after :func:`compaware_kernels.fuse`; the median of 7 rounds, in each of
    which every network has its turn. Networks of the same structure are the same here: weights do not matter.
    ``advance`` is called once for every round.
    """
    path = study.folder / "latency.json"
    known = read_json(path) if path.is_file() else {}
    points = [(p, json.dumps(p.structure)) for record in records for p in record.points if p.structure]
    if missing := list(dict.fromkeys(text for _, text in points if text not in known)):
        known |= _time(missing, study.config.network, data, advance)
        write_json(path, known)
    for point, text in points:
        point.milliseconds = known[text]


def _time(structures: list[str], name: str, data: Images, advance: Callable[[], None]) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, classes = data.test_x[:IMAGES], int(data.train_y.max()) + 1
    networks = [_network(text, build(name, x.shape[1], classes, x.shape[-1], 0), x) for text in structures]
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
    return {text: 1e3 * median(taken) for text, taken in zip(structures, times, strict=True)}


def _network(structure: str, dense: nn.Module, x: Tensor) -> nn.Module:
    network = checkpoint.restructured(dense, json.loads(structure), "a record of the study").eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return fuse(network, (x,))
