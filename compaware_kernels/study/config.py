"""Study configuration, read from TOML."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path

import torch

from .. import ranks
from .networks import NETWORKS, TIMM, is_network

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["COUNTS", "Config", "Key", "Strength"]

Strength = dict[str, float]
COUNTS = ("seeds", "epochs", "batch", "workers")


@dataclass(frozen=True)
class Key:
    """Identity of a training run: arm, penalty strengths, seed."""

    arm: str
    strength: tuple[tuple[str, float], ...]
    seed: int

    @property
    def setting(self) -> str:
        """The strength as text, ``nuclear=2,group=0.1``."""
        return ",".join(f"{name}={value:g}" for name, value in self.strength) or "none"

    def __str__(self) -> str:
        return f"{self.arm} {self.setting} seed {self.seed}"


@dataclass(frozen=True)
class Config:
    """Study configuration: everything that determines the outcome.

    Attributes:
        data: ``digits``, a folder of IDX files, or one of images, ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``.
        network: ``dec``, ``resnet20``, ``mlp``, ``small_convnet``, or any of timm's, ``timm/NAME``.
        weights: to start from: ``timm``, its pretrained ones, or a safetensors file; else random ones.
        seeds: trainings per arm and strength.  validation: share of the training images that choices are made on.
        epochs, batch, lr, momentum: of SGD with a cosine schedule, the same for every arm.
        amp: whether networks are trained in bfloat16 where autocast allows it.
        tune_epochs, tune_lr: of fine-tuning after compression; 0 epochs: none.
        rules: rank rules (``energy:0.9``) of the low-rank compression.  sparsities: shares of zeros of the sparse one.
        device: ``auto`` (CUDA if there is a GPU), ``cuda`` or ``cpu``.
        workers: processes that read images, for each training.
        lost: points below the plain network's accuracy that a compressed one may have.
        arms: for each arm its strengths, dictionaries of numbers.
        map: nuclear and group strengths, whose combinations make the sensitivity map; trained with the first seed.
    """

    data: str = "digits"
    network: str = "dec"
    weights: str = ""
    seeds: int = 3
    validation: float = 0.2
    epochs: int = 30
    batch: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    amp: bool = False
    tune_epochs: int = 3
    tune_lr: float = 0.01
    rules: tuple[str, ...] = ("energy:0.9", "energy:0.95", "energy:0.98", "energy:0.99", "energy:0.999")
    sparsities: tuple[float, ...] = ()
    device: str = "auto"
    workers: int = 4
    lost: float = 1.0
    arms: dict[str, list[Strength]] = field(default_factory=dict)
    map: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        from .arms import ARMS

        for rule in self.rules:
            ranks.parse(rule)
        wanted = {
            "network": (is_network(self.network), f"one of {', '.join(NETWORKS)}, or a network of timm's, {TIMM}NAME"),
            "weights": (
                self.network.startswith(TIMM)
                if self.weights == "timm"
                else not self.weights or Path(self.weights).is_file(),
                "timm, for a network of timm's, or a safetensors file that exists",
            ),
            "device": (self.device in ("auto", "cuda", "cpu"), "auto, cuda or cpu"),
            **{name: (_whole(getattr(self, name), 1), "a whole number >= 1") for name in COUNTS},
            "tune_epochs": (_whole(self.tune_epochs, 0), "a whole number >= 0"),
            "lr": (_finite(self.lr) and self.lr > 0, "a finite number > 0"),
            "tune_lr": (_finite(self.tune_lr) and self.tune_lr > 0, "a finite number > 0"),
            "momentum": (_finite(self.momentum) and 0 <= self.momentum < 1, "a number >= 0 and < 1"),
            "lost": (0 <= self.lost < 100, "points of accuracy >= 0"),
            "validation": (0 < self.validation < 1, "a share between 0 and 1"),
            "rules": (bool(self.rules), "at least one rank rule"),
            "sparsities": (all(0 < s < 1 for s in self.sparsities), "shares between 0 and 1"),
            "arms": (
                "plain" in self.arms and set(self.arms) <= set(ARMS) and all(self.arms.values()),
                f"plain and any of {', '.join(ARMS)}, each with at least one strength",
            ),
            "map": (not self.map or set(self.map) == {"nuclear", "group"}, "lists named nuclear and group"),
        }
        for name, (right, text) in wanted.items():
            if not right:
                got = list(self.arms) if name == "arms" and all(self.arms.values()) else getattr(self, name)
                raise ValueError(f"{name}: wanted {text}; got {got}")
        self._require_strengths()
        self._require_own_records()

    def _require_strengths(self) -> None:
        """Raise ValueError unless each arm supports its strengths, by name and range."""
        from .arms import ARMS

        for arm, strengths in self.arms.items():
            for strength in strengths:
                if set(strength) - set(ARMS[arm].knobs) or bool(strength) != bool(ARMS[arm].knobs):
                    known = ", ".join(ARMS[arm].knobs) or "nothing"
                    raise ValueError(f"arms.{arm}: wanted strengths of {known}; got {strength}")
                for name, value in strength.items():
                    _require_strength(f"arms.{arm}", name, value, ARMS[arm].shares)
        for name, values in self.map.items():
            for value in values:
                _require_strength("map", name, value, False)

    def _require_own_records(self) -> None:
        """Raise ValueError if two runs share a name, which names their file; the map may share runs with the arms."""
        own = self._own(0)
        names = Counter(map(str, [*own, *(set(self._grid()) - set(own))]))
        if twice := [name for name, count in names.items() if count > 1]:
            text = "wanted strengths that differ in their first 6 digits, which name their records"
            raise ValueError(f"arms, map: {text}; got more than once: {', '.join(twice)}")

    @classmethod
    def read(cls, name: str) -> Config:
        """Configuration from a TOML file, or, by name, from one shipped with the package.

        Raises:
            FileNotFoundError: no such file.  ValueError: it is not TOML, or has a setting that is unknown or wrong.
        """
        shipped = files(__package__) / "configs" / f"{name}.toml"
        path = shipped if shipped.is_file() else Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file, and no study of that name comes with the package")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not TOML: {error}") from error
        try:
            return cls.from_dict(table)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, table: Mapping) -> Config:
        """Configuration from parsed TOML or JSON.  Raises ValueError for an unknown setting."""
        if unknown := set(table) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def training(self) -> dict:
        """Settings that a finished run depends on, apart from data, arm and seed."""
        others = ("data", "seeds", "device", "workers", "lost", "arms", "map")
        return {k: v for k, v in self.to_dict().items() if k not in others}

    @property
    def units(self) -> int:
        """Number of ``advance`` calls per run: its epochs and compressions."""
        return self.epochs + len(self.rules) + len(self.sparsities)

    @property
    def devices(self) -> list[torch.device]:
        """Devices over which the runs are distributed."""
        if self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available()):
            return [torch.device("cpu")]
        return [torch.device("cuda", i) for i in range(max(1, torch.cuda.device_count()))]

    @property
    def keys(self) -> list[Key]:
        """All training runs, ordered by seed."""
        own = [key for seed in range(self.seeds) for key in self._own(seed)]
        return list(dict.fromkeys([*own, *self._grid()]))

    def _own(self, seed: int) -> list[Key]:
        """Runs of the arms with one seed."""
        return [
            Key(arm, tuple((name, float(strength[name])) for name in strength), seed)
            for arm, strengths in self.arms.items()
            for strength in strengths
        ]

    def _grid(self) -> list[Key]:
        """Runs of the sensitivity map."""
        return [
            Key("nuclear+group", (("nuclear", n), ("group", g)), 0)
            for n in self.map.get("nuclear", ())
            for g in self.map.get("group", ())
        ]


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _require_strength(where: str, name: str, value: object, share: bool) -> None:
    if not (_finite(value) and (0 < value < 1 if share else value >= 0)):
        wanted = "a share between 0 and 1" if share else "a finite number >= 0"
        raise ValueError(f"{where}: {name}: wanted {wanted}; got {value!r}")
