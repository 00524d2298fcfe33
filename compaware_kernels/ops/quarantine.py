"""What the self-test has found of the kernels on this machine's GPUs: those that failed it are not used.

``compaware info --selftest`` writes it (:mod:`compaware_kernels.selftest`), for the very code and versions that it has
tested. ``COMPAWARE_VERDICTS=ignore`` uses the kernels all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .._utils.atomic_write import write_text
from . import library

SHRINK, STEP, LOW_RANK = "shrink", "step", "low rank"  # the families: one falls out as a whole
SUFFIXES = (".py", ".so", ".cuh", ".h")

Verdicts = dict[str, dict[str, str]]  # device -> family -> what was wrong, or ""


@torch.compiler.assume_constant_result  # a compiler would trace the file being read
def refused(family: str, device: torch.device) -> str:
    """Why kernels of this family are not used on ``device``: they failed the self-test there; "" if they may be."""
    reason = found() and failure(family, device)
    return f"the {family} kernels failed the self-test here ({reason})" if reason else ""


def failure(family: str, device: torch.device) -> str:
    """What was wrong with the family on ``device``; with ck_shrink, which takes no Python to reach, on any."""
    devices = found().values() if family == SHRINK else (found().get(device_name(device), {}),)
    return next((verdicts[family] for verdicts in devices if verdicts.get(family)), "")


@cache
def found() -> Verdicts:
    """What the self-test has found of this code, if it has run."""
    if os.environ.get("COMPAWARE_VERDICTS") == "ignore" or not any(folder().glob("*.json")):
        return {}
    try:
        return json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}


def record(device: torch.device, verdicts: Mapping[str, str]) -> Path:
    """Keep what was found on ``device``, for this process and later ones."""
    found.cache_clear()
    every = found() | {device_name(device): dict(verdicts)}
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_text(_file(), json.dumps(every, indent=1))
    found.cache_clear()
    return _file()


def about() -> dict[str, str]:
    """Device -> what the self-test has found there."""
    said = {}
    for device, verdicts in found().items():
        failed = [f"{family} kernels failed, not used: {reason}" for family, reason in verdicts.items() if reason]
        said[device] = "; ".join(failed) or "all passed"
    return said or {"not run": "compaware info --selftest"}


def device_name(device: torch.device) -> str:
    """By which verdicts are told apart."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


def folder() -> Path:
    """Where verdicts are kept."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "compaware")


@cache
def _code() -> str:
    """Names the package's kernels, with the versions of what compiles and runs them."""
    key, package = hashlib.sha256(), library.PATH.parent
    for name in ("torch", "triton", "cupy-cuda13x", "compaware-kernels"):
        try:
            key.update(f"{name} {version(name)}".encode())
        except PackageNotFoundError:
            key.update(name.encode())
    sources = [*package.glob("*.so"), *package.glob("ops/*"), *package.glob("proximal/cuda/*"), package / "selftest.py"]
    sources += [path for root in (package, package.parent) for path in root.glob("csrc/*/*")]
    for path in sorted(path for path in sources if path.suffix in SUFFIXES):
        key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()[:16]


def _file() -> Path:
    return folder() / f"selftest-{_code()}.json"
