"""A study's settings, read from TOML: :class:`Config`."""

from __future__ import annotations

import sys
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

Strength = dict[str, float]


@dataclass(frozen=True)
class Key:
    """One training: which arm, how strong, which seed."""

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
    """Everything that decides a study's outcome.

    Attributes:
        data: ``digits``, a folder of IDX files, or one of images, ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``.
        network: ``dec``, ``resnet20``, ``mlp``, or any of timm's, ``timm/NAME``.
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
            "workers": (self.workers >= 1, "a number >= 1"),
            "seeds": (self.seeds >= 1, "a number >= 1"),
            "epochs": (self.epochs >= 1, "a number >= 1"),
            "tune_epochs": (self.tune_epochs >= 0, "a number >= 0"),
            "batch": (self.batch >= 1, "a number >= 1"),
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
        for arm, strengths in self.arms.items():
            for strength in strengths:
                if set(strength) - set(ARMS[arm].knobs) or bool(strength) != bool(ARMS[arm].knobs):
                    known = ", ".join(ARMS[arm].knobs) or "nothing"
                    raise ValueError(f"arms.{arm}: wanted strengths of {known}; got {strength}")

    @classmethod
    def read(cls, name: str) -> Config:
        """From a TOML file, or one of those that come with the package, by name.

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
        """From what TOML or JSON holds.  Raises ValueError for an unknown setting."""
        if unknown := set(table) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def training(self) -> dict:
        """The settings, beside the data, that a finished training depends on, whatever other arms there are."""
        others = ("data", "seeds", "device", "workers", "lost", "arms", "map")
        return {k: v for k, v in self.to_dict().items() if k not in others}

    @property
    def devices(self) -> list[torch.device]:
        """All that trainings are spread over."""
        if self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available()):
            return [torch.device("cpu")]
        return [torch.device("cuda", i) for i in range(max(1, torch.cuda.device_count()))]

    @property
    def keys(self) -> list[Key]:
        """All trainings, those of one seed together."""
        grid = [
            Key("nuclear+group", (("nuclear", n), ("group", g)), 0)
            for n in self.map.get("nuclear", ())
            for g in self.map.get("group", ())
        ]
        keys = [
            Key(arm, tuple((name, float(strength[name])) for name in strength), seed)
            for seed in range(self.seeds)
            for arm, strengths in self.arms.items()
            for strength in strengths
        ]
        return list(dict.fromkeys([*keys, *grid]))
