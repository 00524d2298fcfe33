"""Measured choice among implementations of one computation: their times, kept per process and in a file per machine.

A computation is a key, a text that names everything its time depends on. Its candidates are timed when the key is first
asked for, in milliseconds of interleaved calls; later processes read the times from
``$XDG_CACHE_HOME/compaware/times-HASH.json``. The hash covers the processor, the instruction sets in use, and the
versions of torch and of the kernels, so a change of any of them measures again. ``COMPAWARE_TUNE=off`` turns measuring
off: whoever asks then goes by rules.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import torch

from .._utils.atomic_write import write_text
from .._utils.processor import processor
from . import quarantine

try:
    from fcntl import LOCK_EX, flock
except ImportError:  # Windows: two processes that write at once may lose a measurement, which is then made again
    flock = None

__all__ = ["Times", "about", "enabled", "file", "forget", "least", "times"]

Times = dict[str, float]  # candidate -> milliseconds

ROUNDS, MOST, BUDGET = 6, 30, 10.0  # least and most rounds; milliseconds after which a measurement ends
SAMPLE = 0.3  # milliseconds of calls of the fastest candidate in a round
SLOWER = 1.4  # a candidate that takes so many times the least time is not called again
FIRST = 5.0  # milliseconds that a first call may take longer

_known: dict[str, Times] = {}
_turn = Lock()  # one measurement at a time


def enabled() -> bool:
    return os.environ.get("COMPAWARE_TUNE") != "off"


def times(key: str, candidates: Callable[[], Mapping[str, Callable[[], object]]]) -> Times:
    """Milliseconds of one call of each candidate, measured here or before.

    Args:
        candidates: makes the calls to be timed; only called if the key is new.
    """
    with _turn:
        if key not in _known:
            _known.update({name: found for name, found in _read().items() if name not in _known})
        if key not in _known:
            _known[key] = least(candidates())
            _write(key, _known[key])
        return _known[key]


def least(candidates: Mapping[str, Callable[[], object]]) -> Times:
    """Least milliseconds of each call, in interleaved rounds: other programs on the machine change it less than a mean.

    Short calls are repeated within a round. The first call, in which libraries compile and memory is mapped, counts
    only if it took long.
    """
    found = {name: _timed(call, 1) for name, call in candidates.items()}
    left = {name: call for name, call in candidates.items() if found[name] < FIRST + SLOWER**2 * min(found.values())}
    found |= {name: min(found[name], _timed(call, 1)) for name, call in left.items()}
    repeats = max(1, min(100, round(SAMPLE / min(found.values()))))
    start, done = time.perf_counter(), 0
    while len(left) > 1 and done < MOST and (done < ROUNDS or 1e3 * (time.perf_counter() - start) < BUDGET):
        for name, call in left.items():
            found[name] = min(found[name], _timed(call, repeats)) if done else _timed(call, repeats)
        left = {name: call for name, call in left.items() if found[name] <= SLOWER * min(found[name] for name in left)}
        done += 1
    return found


def _timed(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - begin) / repeats


# --- the file ---------------------------------------------------------------------------------------------------------


@cache
def _machine() -> str:
    """Hash of what a time depends on beside the computation."""
    switches = [os.environ.get(name, "") for name in ("COMPAWARE_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")]
    facts = [processor(), torch.backends.cpu.get_cpu_capability(), torch.__version__, quarantine.code(), *switches]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def file() -> Path:
    """The file of this machine's times."""
    return quarantine.folder() / f"times-{_machine()}.json"


def forget() -> None:
    """Forget the times known to this process; those in the file stay."""
    _known.clear()


def about() -> str:
    """Text for ``compaware info``: whether candidates are measured, how many computations were, and where that is."""
    return f"fastest way measured; {len(_read())} times in {file()}" if enabled() else "by rules: COMPAWARE_TUNE=off"


def _read() -> dict[str, Times]:
    """Times in the file; none if it is missing or damaged."""
    try:
        found = json.loads(file().read_text())
        if all(ms and all(value > 0 for value in ms.values()) for ms in found.values()):
            return found
        raise ValueError("wanted milliseconds above 0")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _say("cannot be used, and layers are measured anew", str(error))
        return {}


def _write(key: str, measured: Times) -> None:
    """Add to the file, keeping what other processes have written since it was read."""
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        with _alone():
            write_text(file(), json.dumps(_read() | {key: measured}, indent=0))
    except OSError as error:
        _say("cannot be written, and every process measures anew", str(error))


@contextmanager
def _alone() -> Iterator[None]:
    """No other process writes meanwhile."""
    with file().with_suffix(".lock").open("w") as lock:
        if flock:
            flock(lock, LOCK_EX)
        yield


@cache
def _say(what: str, why: str) -> None:
    """Log, the same once per process."""
    logging.getLogger("compaware_kernels").warning("%s: %s: %s", file(), what, why)
