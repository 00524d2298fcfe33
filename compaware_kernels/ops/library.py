"""C++ library loader: registers the compiled kernels over the reference implementations of the ops."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from . import linalg, lowrank, shrinkage  # noqa: F401  (the schemas must exist before the library implements them)

__all__ = ["PATH", "build", "load", "missing"]

PATH = Path(__file__).parents[1] / "_C.abi3.so"


def load(path: Path) -> str | None:
    """Load the library.  Returns None, or the reason why all ops run on their reference implementations."""
    if not path.exists():
        return "not built"
    try:
        torch.ops.load_library(path)
    except Exception as error:  # any loader error: fall back to the reference implementations
        reason = f"{path.name} could not be loaded: {error}"
        logging.getLogger("compaware_kernels").warning("%s; every op runs on its reference body", reason)
        return reason
    return None


def build() -> dict:
    """Build record of setup.py: mode, CUDA architectures and reason, from ``_build.json``."""
    try:
        return json.loads(PATH.with_name("_build.json").read_text())
    except FileNotFoundError:
        return {"mode": "none", "reason": "imported from a source tree that was never installed"}


missing = load(PATH)  # None, or why the library is not loaded
