"""Which op runs where, and why: the facts behind ``compaware info``."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ._utils.version import __version__
from .ops import backends, cuda_launcher, library

KERNEL, TRITON, REFERENCE = "C++ kernel", "Triton kernel", "reference (plain PyTorch)"


def info() -> dict[str, Any]:
    """Versions, devices, how the library was built, and the body each op has for each device."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "build": library.build(),
        "library": library.missing or str(library.PATH),
        "CUDA C++ kernels": cuda_launcher.about(),
        "Triton kernels": backends.missing() or f"Triton {version('triton')}",
        "ops": {name: {key: _body(name, key) for key in ("CPU", "CUDA")} for name in backends.OPS},
    }


def machine() -> str:
    """Processor, GPUs, threads and versions, for every figure."""
    facts = info()
    devices = ", ".join(dict.fromkeys(facts["devices"]))
    return f"{devices}, {facts['threads']} thread(s), torch {facts['torch']}, Python {facts['python']}"


def _body(name: str, key: str) -> str:
    if key == "CUDA" and name.removesuffix("_") in backends.KERNELS:  # the form in place calls the other
        return f"{REFERENCE}: {backends.missing()}" if backends.missing() else TRITON
    # The reference body is registered for the alias CompositeExplicitAutograd: the key itself stays free.
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"compaware::{name}", key)
    return KERNEL if registered else REFERENCE


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{_cpu()} ({torch.backends.cpu.get_cpu_capability()})", *gpus]


def _cpu() -> str:
    """The processor's name; Python's own answer is empty or just "x86_64" on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
