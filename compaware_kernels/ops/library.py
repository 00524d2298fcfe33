"""Loads the compiled kernels, where they were built, over the reference bodies of :mod:`compaware_kernels.ops`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from . import linalg, lowrank, shrinkage  # noqa: F401  (the schemas must exist before the library implements them)

PATH = Path(__file__).parents[1] / "_C.abi3.so"


def load(path: Path) -> str | None:
    """Load the library; None, or the reason why every op runs on its reference body."""
    if not path.exists():
        return "not built"
    try:
        torch.ops.load_library(path)
    except Exception as error:  # whatever is wrong with it, the reference bodies are there
        reason = f"{path.name} could not be loaded: {error}"
        logging.getLogger("compaware_kernels").warning("%s; every op runs on its reference body", reason)
        return reason
    return None


def build() -> dict:
    """What setup.py decided, and why."""
    try:
        return json.loads(PATH.with_name("_build.json").read_text())
    except FileNotFoundError:
        return {"mode": "none", "reason": "imported from a source tree that was never installed"}


missing = load(PATH)  # None, or why there is no library
