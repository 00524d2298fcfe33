"""Command ``compaware compress``: trained weights and the function that builds the network -> a compressed model."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import ranks
from .._utils.atomic_write import write_text
from . import checkpoint
from .compress import CompressReport, compress
from .state_dicts import read_into

__all__ = ["call_arguments", "run"]

SUFFIX = ".safetensors"


def run(
    weights: Path,
    model: str,
    shape: tuple[int, ...],
    out: Path,
    *,
    rank: str,
    fold: str,
    goal: str,
    measure: bool,
    skip: Sequence[str],
    report: Path | None,
    key: str | None,
    model_args: str,
) -> None:
    """Compress a network and print its report; the arguments are the command's.

    Raises:
        OSError: no weights, or a folder that cannot be written, before anything is read.
        ValueError: an argument, or weights that do not fit.
    """
    rule = ranks.parse(rank)
    _check_outputs(weights, out, report)
    network = _build(model, model_args)
    for what in read_into(network, weights, key, model):
        print(f"{weights}: {what}")
    try:
        x = torch.zeros(shape)
        with torch.no_grad():
            network.eval()(x)
    except (RuntimeError, IndexError) as error:
        got = ",".join(map(str, shape))
        raise ValueError(f"--input: wanted a shape that {model} accepts; got {got}: {error}") from error
    small, summary = compress(network, rule, (x,), fold=fold, goal=goal, measure=measure, skip=skip)
    checkpoint.save(small, out)
    if report:
        write_text(report, json.dumps(summary.to_dict(), indent=1))
    print(summary)
    if not any(layer.rank for layer in summary.layers):
        print(f"\nNo layer was factorized, for the reasons in the notes.{_by_size(network, rule, x, fold, goal, skip)}")
    function = f"{model.rpartition(':')[2]}({model_args})"
    print(f"\nRead:    {weights}, {weights.stat().st_size:,} bytes")
    print(f"Written: {out}, {out.stat().st_size:,} bytes" + (f"; {report}" if report else ""))
    print(f"Load it: compaware_kernels.load({str(out)!r}, {function})")


def call_arguments(text: str) -> tuple[list, dict]:
    """Positional and keyword arguments in Python's syntax, "10, width=0.5"; literals only, nothing is executed.

    Raises:
        ValueError: it is anything else.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("more than one call")
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        return [ast.literal_eval(value) for value in call.args], named
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"--model-args: wanted Python literals, such as 10, width=0.5; got {text!r}") from error


def _check_outputs(weights: Path, out: Path, report: Path | None) -> None:
    """Make the output folders, and raise OSError now where the command could not write at its end."""
    if out.suffix not in ("", SUFFIX):
        raise ValueError(f"--out: wanted a {SUFFIX} file, the only format written; got {out}: "
                         f"{out.with_suffix(SUFFIX)} would do")  # fmt: skip
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file")
    paths = [path for path in (weights, out, report) if path]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"wanted different files to read and to write; got {', '.join(map(str, paths))}")
    for path in paths[1:]:
        if path.is_dir():
            raise IsADirectoryError(f"{path}: wanted a file to write; got a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path}: its folder cannot be written to")


def _build(spec: str, arguments: str) -> nn.Module:
    """The network that MODULE:FUNCTION returns; also finds modules in the working directory."""
    module, _, function = spec.partition(":")
    positional, named = call_arguments(arguments)
    sys.path.insert(0, os.getcwd())
    factory = getattr(importlib.import_module(module), function, None)
    try:
        network = factory(*positional, **named) if callable(factory) else None
    except TypeError as error:
        raise ValueError(f"--model {spec}: wanted its arguments in --model-args; got {arguments!r}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"--model {spec}: wanted a function that returns a torch.nn.Module; got {type(network).__name__}"
        )
    return network


def _by_size(network: nn.Module, rule: ranks.Rule, x: torch.Tensor, fold: str, goal: str, skip: Sequence[str]) -> str:
    """What ``--goal size`` would give, as a sentence; "" if that was the goal, or if it gives nothing either."""
    if goal == "size":
        return ""
    _, summary = compress(network, rule, (x,), fold=fold, goal="size", skip=skip)
    return f" --goal size would give {_sizes(summary)}." if any(layer.rank for layer in summary.layers) else ""


def _sizes(summary: CompressReport) -> str:
    return (f"{summary.params:,} instead of {summary.params_before:,} parameters ({summary.bytes:,} instead of "
            f"{summary.bytes_before:,} bytes)")  # fmt: skip
