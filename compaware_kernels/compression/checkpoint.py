"""Checkpoints of compressed models: a safetensors file with the layer structure as JSON in its header; no pickle."""

from __future__ import annotations

import copy
import json
import os

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from .._utils.atomic_write import atomic_write
from ..nn.lowrank import LowRank
from ..nn.module_surgery import NORMS, replace, resized, sizes
from ..nn.registry import LOW_RANK, low_rank_type
from ..nn.unwrap import without_wrappers

__all__ = ["CheckpointError", "load", "restructured", "save", "structure_of"]

FORMAT = "compaware_kernels/1"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, not in this format, or of another architecture."""


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a compressed model to one ``.safetensors`` file, atomically; wrappers (torch.compile, DDP) are removed.

    The header holds, for every Linear, convolution, batch norm and low-rank layer, its class, sizes, rank and fold:
    what :func:`load` needs to give a fresh dense model the same structure. A symbolic link is followed; an existing
    file keeps its mode.

    Raises:
        OSError: the folder is missing or cannot be written; no partial file is left.
    """
    model = without_wrappers(model)
    metadata = {"format": FORMAT, "layers": json.dumps(structure_of(model))}
    try:
        with atomic_write(path) as new:
            save_model(model, new, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def load(path: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Load a compressed model: restructure a copy of the dense one and read the saved weights into it.

    Args:
        path: a file written by :func:`save`.
        model: the dense model of the same architecture, trained or not; it is not modified.

    Returns:
        a copy of ``model`` with the saved structure and weights.

    Raises:
        CheckpointError: the file is missing, damaged, not written by :func:`save`, or of another architecture.
    """
    model = restructured(model, _read_structure(path), str(path))
    try:
        load_model(model, path, strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: its weights do not fit the model: {error}") from error
    return model


def structure_of(model: nn.Module) -> dict[str, dict]:
    """Layer structure as plain JSON data: class, sizes, rank and fold of every layer that compression may change."""
    structure = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, LowRank):
            inside = (*inside, f"{name}.") if name else inside
            size = sizes(module.first)[0], sizes(module.second)[1]
            structure[name] = _entry(module, *size, rank=module.rank, fold=getattr(module, "fold", "paper"))
        elif isinstance(module, (*LOW_RANK, *NORMS)):
            structure[name] = _entry(module, *sizes(module))
    return structure


def restructured(model: nn.Module, structure: dict[str, dict], source: str) -> nn.Module:
    """Copy of the dense ``model`` with the structure of :func:`structure_of`; replaced layers are uninitialized.

    Raises:
        CheckpointError: the model has another architecture; names ``source`` and the layer.
    """
    model = copy.deepcopy(without_wrappers(model))
    for name, entry in structure.items():
        model = _restructure(model, name, entry, source)
    return model


def _entry(module: nn.Module, inputs: int, outputs: int, **more: object) -> dict:
    kind = {"class": type(module).__name__, "inputs": inputs, "outputs": outputs}
    return kind | {"bias": module.bias is not None} | more


def _read_structure(path: str | os.PathLike) -> dict[str, dict]:
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a compressed model ({FORMAT}); format: {metadata.get('format', 'none')}")
    try:
        return dict(json.loads(metadata["layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the layers is damaged: {error}") from error


def _restructure(model: nn.Module, name: str, entry: dict, source: str) -> nn.Module:
    """Replace one layer of the dense model by one of the saved class, sizes, rank and fold."""
    try:
        dense = model.get_submodule(name)
        if isinstance(dense, LowRank) or not isinstance(dense, (*LOW_RANK, *NORMS)):
            raise TypeError(f"a dense layer is wanted in the model; it has {type(dense).__name__}")
        low_rank = entry.get("rank") is not None
        wanted = low_rank_type(dense).__name__ if low_rank else type(dense).__name__
        if entry["class"] != wanted:
            raise TypeError(f"the file has {entry['class']}, the model {type(dense).__name__}")
        changed = sizes(dense) != (entry["inputs"], entry["outputs"]) or (dense.bias is not None) != entry["bias"]
        layer = resized(dense, entry["inputs"], entry["outputs"], entry["bias"]) if changed else dense
        layer = low_rank_type(layer).like(layer, entry["rank"], entry["fold"]) if low_rank else layer
        return model if layer is dense else replace(model, name, layer.train(dense.training))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: layer {name} does not fit the model: {error}") from error
