"""Kernel quarantine: self-test verdicts per GPU and kernel family; kernels that failed are not used.

``compaware info --selftest`` (:mod:`compaware_kernels.selftest`) writes the verdicts to the user's cache, keyed by a
hash of the tested code and library versions. ``COMPAWARE_VERDICTS=ignore`` disables the quarantine.
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

__all__ = [
    "LOW_RANK",
    "SHRINK",
    "STEP",
    "about",
    "code",
    "device_name",
    "failure",
    "folder",
    "found",
    "record",
    "refused",
]

SHRINK, STEP, LOW_RANK = "shrink", "step", "low rank"  # kernel families; one failure disables the family
SUFFIXES = (".py", ".so", ".cuh", ".h")

Verdicts = dict[str, dict[str, str]]  # device -> family -> failure, or ""


@torch.compiler.assume_constant_result  # a compiler would trace the file being read
def refused(family: str, device: torch.device) -> str:
    """Why kernels of this family are not used on ``device`` (they failed the self-test there); "" if they are."""
    reason = found() and failure(family, device)
    return f"the {family} kernels failed the self-test here ({reason})" if reason else ""


def failure(family: str, device: torch.device) -> str:
    """Failure of the family on ``device``, or ""; for shrink kernels, dispatched without Python, on any device."""
    devices = found().values() if family == SHRINK else (found().get(device_name(device), {}),)
    return next((verdicts[family] for verdicts in devices if verdicts.get(family)), "")


@cache
def found() -> Verdicts:
    """Verdicts recorded for this code and these versions; empty if the self-test has not run, or is ignored."""
    if os.environ.get("COMPAWARE_VERDICTS") == "ignore" or not any(folder().glob("*.json")):
        return {}
    try:
        return json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}


def record(device: torch.device, verdicts: Mapping[str, str]) -> Path:
    """Record the verdicts (family -> failure or "") of ``device``, for this and later processes; returns the file."""
    found.cache_clear()
    every = found() | {device_name(device): dict(verdicts)}
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_text(_file(), json.dumps(every, indent=1))
    found.cache_clear()
    return _file()


def about() -> dict[str, str]:
    """Text for ``compaware info``: device -> summary of its verdicts."""
    said = {}
    for device, verdicts in found().items():
        failed = [f"{family} kernels failed, not used: {reason}" for family, reason in verdicts.items() if reason]
        said[device] = "; ".join(failed) or "all passed"
    return said or {"not run": "compaware info --selftest"}


def device_name(device: torch.device) -> str:
    """Key of a device in the verdicts: the GPU's model name, or the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


def folder() -> Path:
    """Cache folder of the verdict files."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "compaware")


@cache
def code() -> str:
    """Hash of all kernel sources and binaries, and of the versions of the libraries that compile and run them."""
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
    return folder() / f"selftest-{code()}.json"
