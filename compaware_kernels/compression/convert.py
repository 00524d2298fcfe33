"""Convert low-rank layers to torch.nn: ``nn.Sequential`` of two factors, or one dense layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from .._utils.copied import copied
from ..nn.lowrank import FACTORS, LowRank
from ..nn.module_surgery import replace, why_irreplaceable

__all__ = ["to_dense", "to_plain"]


def to_plain(model: nn.Module) -> nn.Module:
    """Copy of ``model`` in plain PyTorch: every low-rank layer becomes ``nn.Sequential(first, second)``.

    Outputs and parameter count stay the same. The state dict names the factors of layer ``L`` ``L.0.weight``,
    ``L.1.weight`` and ``L.1.bias`` instead of ``L.first.weight``, ``L.second.weight`` and ``L.second.bias``; the
    low-rank model loads either. A fused activation becomes a third module.

    For models that ask a layer for the dtype or device of its weight (ViT, CLIP, T5), the ``nn.Sequential`` has a
    ``weight`` ``[O, 0]`` without numbers, which is not in the state dict. A model that computes with the weight itself
    fails on its shape, and one that gives a transposed convolution an ``output_size`` on that: use :func:`to_dense`.

    Raises:
        ValueError: a residual sum was fused into a layer (:func:`compaware_kernels.fuse`).
    """
    plain = _convert(model, lambda layer: layer.to_sequential())
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            asked = layer.second.weight.new_empty(layer.dense_shape[0], 0)
            plain.get_submodule(name).register_buffer("weight", asked, persistent=False)
    return plain


def to_dense(model: nn.Module) -> nn.Module:
    """Copy of ``model`` in which every low-rank layer is one dense layer of weight ``U V``.

    Its state dict has the keys of the dense model, ``L.weight`` and ``L.bias``; the low-rank model loads it, too
    (and factorizes the weights by SVD).

    Raises:
        ValueError: an activation or a residual sum was fused into a layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, LowRank) and module.activation != "none":
            raise ValueError(f"{name}: {module.activation} was fused into it; convert the model first, fuse afterwards")
    return _convert(model, lambda layer: layer.to_dense())


def _convert(model: nn.Module, plain: Callable[[LowRank], nn.Module]) -> nn.Module:
    _require_no_residuals(model)
    model = copied(model)
    for name, module in list(model.named_modules()):  # named_modules yields a layer with several names once
        if isinstance(module, LowRank):
            if reason := why_irreplaceable(module, FACTORS):
                raise ValueError(f"{name}: wanted a layer that can be replaced; it has {reason}")
            model = replace(model, name, plain(module).train(module.training))
    return model


def _require_no_residuals(model: nn.Module) -> None:
    for graph_module in model.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, fx.GraphModule) else ():
            if node.op == "call_module" and "residual" in node.kwargs:
                raise ValueError(f"{node.target}: a sum was fused into it; convert the model first, fuse afterwards")
