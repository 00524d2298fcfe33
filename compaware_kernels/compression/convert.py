"""Leaving this package: the same model in layers of plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import fx, nn

from ..nn.lowrank import LowRank
from ..nn.module_surgery import replace

__all__ = ["to_dense", "to_plain"]


def to_plain(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that needs plain PyTorch only: every low-rank layer as ``nn.Sequential(first, second)``.

    It gives the same outputs, has as many weights, and its state dict names layer ``L``'s factors ``L.0.weight``,
    ``L.1.weight`` and ``L.1.bias`` instead of ``L.first.weight``, ``L.second.weight`` and ``L.second.bias``; the
    low-rank model loads either. A fused activation follows as a module.

    Raises:
        ValueError: a residual sum was fused into a layer (:func:`compaware_kernels.fuse`).
    """
    return _replaced(model, lambda layer: layer.to_sequential())


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every low-rank layer is one dense layer again, of weight ``U V``.

    Its state dict has the keys of the dense model, ``L.weight`` and ``L.bias``; the low-rank model loads it, too
    (its factors are then found by an SVD).

    Raises:
        ValueError: an activation or a residual sum was fused into a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRank) and module.activation != "none":
            raise ValueError(f"{name}: {module.activation} was fused into it; convert the model first, fuse afterwards")
    return _replaced(model, lambda layer: layer.to_dense())


def _replaced(model: nn.Module, plain: Callable[[LowRank], nn.Module]) -> nn.Module:
    _refuse_residuals(model)
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):  # a layer with several names comes once
        if isinstance(module, LowRank):
            model = replace(model, name, plain(module).train(module.training))
    return model


def _refuse_residuals(model: nn.Module) -> None:
    for graph_module in model.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, fx.GraphModule) else ():
            if node.op == "call_module" and "residual" in node.kwargs:
                raise ValueError(f"{node.target}: a sum was fused into it; convert the model first, fuse afterwards")
