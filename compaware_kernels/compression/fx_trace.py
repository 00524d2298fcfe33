"""Symbolic tracing with torch.fx: graph with shapes; low-rank layers are leaves."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..nn.lowrank import LowRank
from .arguments import Inputs

__all__ = ["is_in_place", "trace"]

CONSTANTS = (type(None), bool, int, float, str)  # arguments that tracing may take as they are in the example


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, LowRank) or super().is_leaf_module(module, name)


def trace(model: nn.Module, inputs: Inputs) -> tuple[fx.Graph, dict[fx.Node, torch.Size]]:
    """Graph of the model, and the output shape of every tensor node.

    A model that cannot be traced for all of its arguments (``if mask is not None``) is traced for those of the
    example: None, flags and numbers then keep the values given there, or their defaults.

    Raises:
        Exception: whatever the model's code raises.
    """
    bound = inputs.bound(model)
    bound.apply_defaults()
    fixed = {name: value for name, value in bound.arguments.items() if isinstance(value, CONSTANTS)}
    try:
        return _traced(model, inputs, bound.arguments, {})
    except Exception as error:  # tracing runs user code, which may raise anything
        if not fixed:
            raise
        first = error
    try:
        return _traced(model, inputs, bound.arguments, fixed)
    except Exception:
        raise first from None


def _traced(
    model: nn.Module, inputs: Inputs, given: Mapping[str, object], fixed: dict[str, object]
) -> tuple[fx.Graph, dict[fx.Node, torch.Size]]:
    """As :func:`trace`, with these arguments fixed to their values; ``given``: all arguments by name."""
    graph, values = _Tracer().trace(model, fixed or None), []
    given = {**given, **inputs.cloned().bound(model).arguments}
    for node in graph.find_nodes(op="placeholder"):
        if node.target not in given and node.target.removesuffix("_1") in fixed:  # renamed by torch.fx
            node.target = node.target.removesuffix("_1")
        starred = node.target.startswith("*")  # *args; no model with **kwargs can be traced for some
        values += given[node.target.lstrip("*")] if starred else [given[node.target]]
    with torch.no_grad(), redirect_stderr(io.StringIO()):  # where it prints a traceback of errors that it raises, too
        ShapeProp(fx.GraphModule(model, graph)).propagate(*values)
    metas = {node: node.meta.get("tensor_meta") for node in graph.nodes}
    return graph, {node: meta.shape for node, meta in metas.items() if hasattr(meta, "shape")}


def is_in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether the called op or module may modify its inputs in place."""
    if any(value is True for value in (*node.args, *node.kwargs.values())) or "out" in node.kwargs:
        return True  # inplace=True of a function; any other True counts as well
    if node.op == "call_module":
        return getattr(model.get_submodule(node.target), "inplace", False)
    name = getattr(node.target, "__name__", node.target)
    return node.op.startswith("call") and (name.partition(".")[0].endswith("_") or name == "setitem")
