"""Symbolic tracing with torch.fx: graph with shapes (low-rank layers are leaves), and comparison of model outputs."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves, tree_map_only

from ..nn.lowrank import LowRank

__all__ = ["is_in_place", "same_outputs", "trace"]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, LowRank) or super().is_leaf_module(module, name)


def trace(model: nn.Module, example_inputs: tuple) -> tuple[fx.Graph, dict[fx.Node, torch.Size]]:
    """Graph of the model, and the output shape of every tensor node.  Raises whatever the model's code raises."""
    graph = _Tracer().trace(model)
    with torch.no_grad():
        ShapeProp(fx.GraphModule(model, graph)).propagate(*_cloned(example_inputs))
    metas = {node: node.meta.get("tensor_meta") for node in graph.nodes}
    return graph, {node: meta.shape for node, meta in metas.items() if hasattr(meta, "shape")}


def same_outputs(model: nn.Module, small: nn.Module, example_inputs: tuple) -> bool:
    """Whether both models give the same outputs up to rounding of reordered sums: relative error <= 1000 eps."""
    try:
        with torch.no_grad():
            wanted, got = (tree_leaves(m(*_cloned(example_inputs))) for m in (model, small))
        pairs = [(a, b) for a, b in zip(wanted, got, strict=True) if isinstance(a, Tensor)]
        return bool(pairs) and all(a.shape == b.shape and _close(a, b) for a, b in pairs)
    except Exception:  # user code may fail on sizes it was not written for
        return False


def _cloned(inputs: tuple) -> tuple:
    """Clones of the tensors: a model may modify its inputs in place."""
    return tree_map_only(Tensor, Tensor.clone, inputs)


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    tolerance = min(1e3 * torch.finfo(a.dtype).eps, 1 / 16)  # 16 roundings of bf16
    return bool((a - b).abs().max() <= tolerance * a.abs().max())


def is_in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether the called op or module may modify its inputs in place."""
    if any(value is True for value in (*node.args, *node.kwargs.values())) or "out" in node.kwargs:
        return True  # inplace=True of a function; any other True counts as well
    if node.op == "call_module":
        return getattr(model.get_submodule(node.target), "inplace", False)
    name = getattr(node.target, "__name__", node.target)
    return node.op.startswith("call") and (name.partition(".")[0].endswith("_") or name == "setitem")
