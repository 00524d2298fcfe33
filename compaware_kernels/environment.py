"""Environment report: versions, devices, build, and the backend of every op; the data of ``compaware info``."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from ._utils.processor import processor
from ._utils.version import __version__
from .ops import backends, cuda_launcher, library, tuner

__all__ = ["info", "machine"]


def info() -> dict[str, Any]:
    """Environment as a dictionary: versions, devices, build of the C++ library, backend of each op per device type."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "build": library.build(),
        "library": library.missing or str(library.PATH),
        "CUDA C++ kernels": cuda_launcher.about(),
        "Triton kernels": backends.triton_missing() or f"Triton {version('triton')}",
        "low-rank layers on the CPU": tuner.about(),
        "ops": {op: {key: _backend(op, key) for key in ("CPU", "CUDA")} for op in backends.TABLE},
    }


def machine() -> str:
    """One-line description of the machine: processor, GPUs, threads and versions; accompanies every measurement."""
    facts = info()
    devices = ", ".join(dict.fromkeys(facts["devices"]))
    return f"{devices}, {facts['threads']} thread(s), torch {facts['torch']}, Python {facts['python']}"


def _backend(op: str, key: str) -> str:
    """Backend of an op on a device type; listed per GPU if the GPUs differ."""
    count = torch.cuda.device_count() if key == "CUDA" else 0
    devices = [torch.device(key.lower(), i) for i in range(count)] or [torch.device(key.lower())]
    said = {str(device): backends.describe(op, device) for device in devices}
    same = len(set(said.values())) == 1
    return said[str(devices[0])] if same else "; ".join(f"{device}: {what}" for device, what in said.items())


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{processor()} ({torch.backends.cpu.get_cpu_capability()})", *gpus]
