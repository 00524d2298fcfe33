"""Training runs of a study in parallel processes, one record file each: an interrupted study resumes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # torch needs it, too

from .._utils.atomic_write import write_text
from ..environment import machine
from ..nn.discovery import foldable_layers
from ..nn.factorization import singular_values
from . import Stopped
from .config import Config, Key
from .data import Source, load
from .fit import Diverged, Trained, accuracy, fit
from .points import Point, points, whole

__all__ = ["Record", "Study", "read_json", "record", "write_json"]


@dataclass
class Record:
    """Record of a training run and its results.

    Attributes:
        diverged: why there is nothing else; else None.  machine: that trained it.
        validation, test: per cent of the images right, before compression.
        seconds: of the processor for training, without compression.
        ranks, rows: per layer, after every epoch; rows that are not zero.  spectra: at the end.
    """

    key: Key
    diverged: str | None = None
    machine: str = ""
    validation: float = 0.0
    test: float = 0.0
    params: int = 0
    macs: int = 0
    bytes: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    spectra: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)

    @classmethod
    def from_dict(cls, table: dict) -> Record:
        key = table["key"]
        key = Key(key["arm"], tuple((name, value) for name, value in key["strength"]), key["seed"])
        return cls(**table | {"key": key, "points": [Point(**point) for point in table["points"]]})


class Study:
    """Study of the data set ``name``, with its folder of records and checkpoints.

    ::

        study.json                          the settings that its trainings depend on
        runs/ARM/STRENGTH/SEED.json         a Record, once it is whole
        runs/ARM/STRENGTH/SEED.running/     a training's checkpoint, until then
        .lock                               locked by the process that works here; ends with it, the file stays

    Raises:
        ValueError: the folder holds a study with other settings, or a record that cannot be read.
    """

    def __init__(self, config: Config, name: str, folder: Path):
        self.config, self.folder = config, folder
        about, settings = folder / "study.json", {"data": name} | json.loads(json.dumps(config.training))
        if about.is_file():
            before = {f.name: f.default for f in fields(Config)} | read_json(about)
            if other := [k for k in settings if before.get(k) != settings[k]]:
                text = ", ".join(f"{k} was {before.get(k)!r}, now {settings[k]!r}" for k in other)
                raise ValueError(f"{folder} holds another study: {text}; choose another folder, or remove it")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(about, settings)

    def path(self, key: Key) -> Path:
        return self.folder / "runs" / key.arm / key.setting / f"{key.seed}.json"

    @property
    def left(self) -> list[Key]:
        """Runs that are not done."""
        return [key for key in self.config.keys if not self.path(key).is_file()]

    def records(self) -> list[Record]:
        """Records of the runs that are done."""
        paths = [path for key in self.config.keys if (path := self.path(key)).is_file()]
        try:
            return [Record.from_dict(read_json(path)) for path in paths]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.folder}: a record of another version: {error}") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context holding the lock of the study's folder (reentrant); worker processes do not take it.

        Raises:
            Stopped: another one does.
        """
        lock = FileLock(self.folder.resolve() / ".lock", is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise Stopped(f"{self.folder}: another process works on this study; wait for it, or stop it") from error
        try:
            yield
        finally:
            lock.release()

    def run(self, processes: int, advance: Callable[[Key], None]) -> None:
        """Run what is left, in ``processes`` worker processes of one thread each.

        Raises:
            Stopped: some trainings failed, and why; the others were done first. Or another process does them.
            KeyboardInterrupt: at once; what is being trained goes on from its last checkpoint.
        """
        with self.alone():
            self._run(processes, advance)

    def _run(self, processes: int, advance: Callable[[Key], None]) -> None:
        failures, context = [], multiprocessing.get_context("spawn")
        if not self.left:
            return
        queue, begun = context.Queue(), context.Value("i", 0)
        listener = threading.Thread(target=lambda: [advance(key) for key in iter(queue.get, None)], daemon=True)
        listener.start()
        others = multiprocessing.active_children()
        with ProcessPoolExecutor(processes, context, _start_worker, (self, queue, begun)) as pool:
            try:
                with _interrupts_held():
                    jobs = {pool.submit(_train_in_worker, key): key for key in self.left}
                for job in as_completed(jobs):
                    if error := job.exception():
                        failures.append(f"{jobs[job]}: {type(error).__name__}: {error}")
            except BaseException:  # the pool would wait for all jobs
                for worker in set(multiprocessing.active_children()) - set(others):
                    worker.kill()
                raise
        queue.put(None)
        listener.join()
        if failures:
            raise Stopped("; ".join(failures))

    def train(self, key: Key, data: Source, advance: Callable[[], None]) -> Record:
        """Train, compress and measure one run; its record is written once it is complete."""
        path = self.path(key)
        part = path.with_suffix(".running")
        try:
            done = record(self.config, key, fit(self.config, key, data, part, advance), data, advance)
        except Diverged as error:
            done = Record(key, diverged=str(error))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(done))
        shutil.rmtree(part, ignore_errors=True)
        return done


def record(config: Config, key: Key, run: Trained, data: Source, advance: Callable[[], None]) -> Record:
    """Record of a trained network, uncompressed and compressed; ``advance`` is called after every compression.

    Raises:
        Diverged: two factors of a layer are finite, but not their product.
    """
    sizes, layers = whole(run, data), foldable_layers(run.model)[0]
    return Record(
        key,
        machine=machine(),
        validation=accuracy(run.model, data.validation()),
        test=accuracy(run.model, data.test()),
        params=sizes.params, macs=sizes.macs, bytes=sizes.bytes,
        seconds=run.seconds, losses=run.losses, ranks=run.ranks, rows=run.rows,
        spectra={layer.name: singular_values(layer.matrix())[0].tolist() for layer in layers},
        facts=run.arm.facts(),
        points=points(run, config, key.seed, data, advance),
    )  # fmt: skip


def write_json(path: Path, table: dict) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(table))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged: {error}; remove it to do that part again") from error


# --- worker processes ----------------------------------------------------------------------------------------------

_worker_state: tuple[Study, Source, object]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Context in which Ctrl-C waits; processes that start in it never see one: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(study: Study, queue, begun) -> None:
    """Initialize a worker process, on the next device in turn."""
    global _worker_state
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with begun:
        index, begun.value = begun.value, begun.value + 1
    device = study.config.devices[index % len(study.config.devices)]
    _worker_state = study, load(study.config, device), queue


def _train_in_worker(key: Key) -> None:
    study, data, queue = _worker_state
    study.train(key, data, lambda: queue.put(key))


def _exit_with_parent() -> None:
    """Exit as soon as the parent does: a later save could collide with the next run of the study."""
    multiprocessing.parent_process().join()
    os._exit(1)
