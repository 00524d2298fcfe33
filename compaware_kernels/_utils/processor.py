"""Name of the processor."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

__all__ = ["processor"]


@cache
def processor() -> str:
    """CPU model name; on Linux ``platform.processor()`` is empty or just "x86_64"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
