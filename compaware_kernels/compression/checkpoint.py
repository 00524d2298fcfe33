"""Checkpoints of compressed models: a safetensors file with the layer structure as JSON in its header; no pickle."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .._utils.atomic_write import atomic_write
from .._utils.copied import copied
from ..nn.lowrank import LowRank
from ..nn.model_copy import on_meta, with_memory
from ..nn.module_surgery import NORMS, replace, resized, sizes
from ..nn.registry import LOW_RANK, low_rank_type
from ..nn.unwrap import without_wrappers
from . import tensor_file
from .state_dicts import misfit
from .tensor_file import CheckpointError, TensorFile, one_line

__all__ = ["CheckpointError", "load", "restructured", "save", "structure_of"]


def save(model: nn.Module, path: str | os.PathLike, *, verify: bool = True) -> None:
    """Write a compressed model to one ``.safetensors`` file, atomically; wrappers (torch.compile, DDP) are removed.

    The header holds, for every Linear, convolution, batch norm and low-rank layer, its class, sizes, rank and fold:
    what :func:`load` needs to give a fresh dense model the same structure. It also holds a checksum of all contents,
    and state that is no tensor (``get_extra_state``) if it is made of numbers, text, bytes, dtypes, tensors, lists,
    tuples and dicts. Equal models give equal bytes. A symbolic link is followed; an existing file keeps its mode.

    Args:
        verify: refuse NaN.

    Raises:
        CheckpointError: names a tensor that cannot be stored (on the meta device, of a lazy layer, sparse, nested,
            quantized, sharded), that holds NaN, or a module whose extra state is of another kind.
        OSError: the folder is missing or cannot be written. Nothing is written then, nor after a CheckpointError.
    """
    model = without_wrappers(model)
    try:
        with atomic_write(path) as new:
            tensor_file.write(new, model.state_dict(), structure_of(model), verify)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def load(path: str | os.PathLike, model: nn.Module, *, verify: bool = True) -> nn.Module:
    """Load a compressed model: restructure a copy of the dense one and read the saved weights into it.

    The file is compared with the model, shape by shape, before anything is built: what it takes to refuse a file does
    not depend on the sizes that its header claims.

    Args:
        path: a file written by :func:`save`.
        model: the dense model of the same architecture and dtypes, trained or not, or on the meta device; it is not
            modified.
        verify: compare the checksum, which files of earlier versions do not have, and refuse NaN.

    Returns:
        a copy of ``model`` with the saved structure and weights; what was on the meta device is on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, not written by :func:`save`, or of another architecture or
            dtype; or a buffer on the meta device is not part of checkpoints.
    """
    file, model = tensor_file.read(path, verify), without_wrappers(model)
    trial = _restructured(on_meta(model), file.layers, str(path))
    own = trial.state_dict(keep_vars=True)
    state = OrderedDict(file.state | _values_of_shared(file, own))
    state._metadata = own._metadata  # versions, without which torch and torchvision expect the oldest form
    if (problem := misfit(own, state)) and not _converts(trial, state, _within_others(file, model)):
        raise CheckpointError(f"{path}: its weights do not fit the model: {problem}")
    try:
        model = with_memory(_restructured(copied(model), file.layers, str(path)))
        model.load_state_dict(state, strict=False)
    except Exception as error:  # of a model's own set_extra_state, for example
        raise CheckpointError(f"{path}: cannot be loaded: {one_line(error)}") from error
    return model


def _converts(trial: nn.Module, state: OrderedDict[str, object], given: set[str]) -> bool:
    """Whether a model on the meta device takes a state dict of other names, by conversions of its own modules.

    ``given`` are names that may be missing.
    """
    own = trial.state_dict(keep_vars=True)
    empty = OrderedDict((name, T.to("meta") if isinstance(T, Tensor) else T) for name, T in state.items())
    empty._metadata = state._metadata
    try:
        missing, unexpected = trial.load_state_dict(empty, strict=False)
    except Exception:
        return False
    both = own.keys() & state.keys()
    alike = not misfit({name: own[name] for name in both}, {name: state[name] for name in both})
    return alike and not unexpected and not set(missing) - given


def _values_of_shared(file: TensorFile, own: Mapping[str, object]) -> dict[str, object]:
    """Values, by name, of tensors that the file stores under another name, for models that do not share them."""
    like = {name: (T.shape, T.stride()) for name, T in own.items() if isinstance(T, Tensor)}
    found = {name: other for name, other in file.shared.items() if name in like and like[name] == like.get(other)}
    return {name: file.state[other] for name, other in found.items()}


def _within_others(file: TensorFile, model: nn.Module) -> set[str]:
    """Names of tensors that get their values with another one, whose memory they are a part of."""
    own = {name: T for name, T in model.state_dict().items() if isinstance(T, Tensor) and not T.is_meta}
    place = {name: T.untyped_storage().data_ptr() for name, T in own.items() if T.layout == torch.strided}
    return {name for name, other in file.shared.items() if name in place and place[name] == place.get(other)}


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
    return _restructured(copied(without_wrappers(model)), structure, source)


def _restructured(model: nn.Module, structure: dict[str, dict], source: str) -> nn.Module:
    for name, entry in structure.items():
        model = _restructure(model, name, entry, source)
    return model


def _entry(module: nn.Module, inputs: int, outputs: int, **more: object) -> dict:
    kind = {"class": type(module).__name__, "inputs": inputs, "outputs": outputs}
    return kind | {"bias": module.bias is not None} | more


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
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{source}: layer {name} does not fit the model: {one_line(error)}") from error
