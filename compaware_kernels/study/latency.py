"""Latency of the low-rank networks, measured interleaved: ``latency.json``."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from ..compression import checkpoint, latency_model
from ..compression.fuse import fuse
from ..environment import machine
from .data import Source
from .networks import build
from .runs import Record, Study, read_json, write_json

__all__ = ["measure"]

IMAGES = 32  # in a batch
MEMORY = 1 << 32  # bytes of dense networks that are timed in one interleaved group


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def measure(study: Study, records: list[Record], data: Source) -> str:
    """Set ``milliseconds`` of all low-rank points; measures what is not in the file yet. Returns on which machine.

    Milliseconds for 32 images on one thread, after :func:`compaware_kernels.fuse`; medians of rounds in each of which
    every network has its turn. Networks of the same structure are the same here: weights do not matter. Times of
    another machine are measured again where some are missing, as only those of one machine can be compared.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    path, here = study.folder / "latency.json", machine()
    known = read_json(path) if path.is_file() else {"machine": here, "milliseconds": {}}
    if known.keys() != {"machine", "milliseconds"}:
        raise ValueError(f"{path}: of another version; remove it to measure again")
    points = [(p, json.dumps(p.structure)) for record in records for p in record.points if p.structure]
    wanted = list(dict.fromkeys(text for _, text in points))
    if any(text not in known["milliseconds"] for text in wanted):
        times = known["milliseconds"] if known["machine"] == here else {}
        missing = [text for text in wanted if text not in times]
        known = {"machine": here, "milliseconds": times | _time(missing, study.config.network, data)}
        write_json(path, known)
    for point, text in points:
        point.milliseconds = known["milliseconds"][text]
    return known["machine"]


def _time(structures: list[str], name: str, data: Source) -> dict[str, float]:
    x, seconds = data.example(IMAGES), []
    dense = build(name, data.shape, data.classes, 0)
    size = sum(4 * p.numel() for p in dense.parameters())
    some = max(1, MEMORY // size)
    for i in range(0, len(structures), some):
        networks = [_network(text, copy.deepcopy(dense), x) for text in structures[i : i + some]]
        with torch.inference_mode():
            times = latency_model.times([partial(network, x) for network in networks], x.device)
        seconds += map(median, times)
    return {text: 1e3 * time for text, time in zip(structures, seconds, strict=True)}


def _network(structure: str, dense: nn.Module, x: Tensor) -> nn.Module:
    network = checkpoint.restructured(dense, json.loads(structure), "a record of the study").to(x.device).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return fuse(network, (x,))
