"""A whole model for inference: batch norms go into the weights, activations and residual sums into low-rank layers."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..folds import CONVS, TRANSPOSED
from ..nn.conv import LowRankConv2d
from ..nn.discovery import Layer
from ..nn.lowrank import MODULES, LowRank
from ..nn.module_surgery import NORMS, is_plain, is_shared, resized, sizes, to_channels_last
from ..nn.registry import LOW_RANK
from .arguments import inputs_tuple
from .fx_trace import is_in_place, same_outputs, trace

__all__ = ["fuse"]

DENSE = (nn.Linear, *CONVS, *TRANSPOSED)
LAYERS = (*DENSE, *LOW_RANK.values())
CALLS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip
SUMS = (operator.add, torch.add, "add")  # += is traced as +
SUM_IN_PLACE = "add_"  # of its first argument


def fuse(model: nn.Module, example_inputs: Sequence[object]) -> nn.Module:
    """A copy of the model for inference, with fewer passes over memory.

    * A batch norm after a (transposed) convolution, linear or low-rank layer goes into its weights.
    * ReLU, ReLU6, SiLU, exact GELU and a residual sum after a low-rank layer are done as it writes its output:
      ``y = act(U (V x) + bias + residual)``.
    * 2-D convolutions get channels_last weights.

    Args:
        model: traceable by ``torch.fx``; its low-rank layers need not be.
        example_inputs: positional inputs, ``(x,)``; shapes decide what is a residual sum, and both models are compared
            on them.

    Returns:
        an ``fx.GraphModule`` in eval mode with the model's submodules under their names. Fuse last: what is fused is
        not in a checkpoint (:func:`compaware_kernels.save` the model itself).

    Raises:
        TypeError: example_inputs is a tensor instead of a tuple.
        ValueError: torch.fx cannot trace the model, or the fused model does not give the same outputs.
    """
    inputs, reference = inputs_tuple(example_inputs), copy.deepcopy(model).eval()
    try:
        graph, _ = trace(reference, inputs)
    except Exception as error:  # tracing runs the user's code
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"fuse: torch.fx cannot trace the model: {why}") from error
    fused = fx.GraphModule(copy.deepcopy(reference), graph)
    for change in (_remove_identity, _fold_norm, _absorb):
        for node in list(fused.graph.nodes):
            if node.op == "call_module":
                change(fused, node)
    _copying_views(to_channels_last(fused))
    fused.delete_all_unused_submodules()
    fused.recompile()
    if not same_outputs(reference, fused, inputs):
        raise ValueError("fuse: the fused model does not give the outputs of the model on the example inputs")
    return fused.eval()  # low-rank layers pack their new weights


# --- what a node is ---------------------------------------------------------------------------------------------------


def _calls(model: nn.Module, node: fx.Node, kinds: Sequence[type]) -> bool:
    """Whether the node calls a module of exactly these kinds that does what it says."""
    if node.op != "call_module":
        return False
    module = model.get_submodule(node.target)
    return type(module) in kinds and all(map(is_plain, module.modules()))


def _is_own(model: fx.GraphModule, node: fx.Node, kinds: Sequence[type]) -> bool:
    """... and that nothing else calls, reads or shares, in whole or in part."""
    if not _calls(model, node, kinds):
        return False
    inside = f"{node.target}."
    others = (n for n in model.graph.nodes if n is not node and n.op in ("call_module", "get_attr"))
    parts = model.get_submodule(node.target).modules()
    return not any(f"{n.target}.".startswith(inside) for n in others) and not any(is_shared(model, p) for p in parts)


def _is_bare(node: fx.Node, layer: LowRank) -> bool:
    """Whether this call of a low-rank layer ends with its second factor."""
    given = inspect.signature(layer.forward).bind(*node.args, **node.kwargs).arguments
    return layer.activation == "none" and "residual" not in given


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _kind(node: fx.Node) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype; None if the node is no tensor."""
    meta = node.meta.get("tensor_meta")
    return (meta.shape, meta.dtype) if hasattr(meta, "shape") else None


# --- the changes ------------------------------------------------------------------------------------------------------


def _remove_identity(model: fx.GraphModule, node: fx.Node) -> None:
    """Modules that do nothing in eval mode hide what is a residual."""
    if _calls(model, node, (nn.Identity, nn.Dropout)) and node.args:
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)


def _fold_norm(model: fx.GraphModule, node: fx.Node) -> None:
    """A batch norm that alone reads this layer goes into its weights."""
    norm, name = _only_user(node), node.target
    if norm is None or not (_is_own(model, node, LAYERS) and _calls(model, norm, NORMS)):
        return
    layer, statistics = model.get_submodule(name), model.get_submodule(norm.target)
    if isinstance(layer, LowRank):
        if not _is_bare(node, layer):
            return
        layer, name = layer.second, f"{name}.second"
    # As many axes as the weight: a batch, and no linear layer on tokens [N, L, F], where the norm is along L.
    if type(layer) in DENSE and len(_kind(node)[0]) == layer.weight.ndim and statistics.running_mean is not None:
        model.set_submodule(name, _normalised(layer, statistics))
        norm.replace_all_uses_with(node)
        model.graph.erase_node(norm)


@torch.no_grad()
def _normalised(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A copy of the layer whose outputs are normalised, computed in fp64."""
    scale, shift = (norm.running_var.double() + norm.eps).rsqrt(), -norm.running_mean.double()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = shift if layer.bias is None else shift + layer.bias
    new, rows = resized(layer, *sizes(layer), bias=True), Layer("", layer).rows.double()
    Layer("", new).set_rows(rows * scale.reshape(-1, *[1] * (rows.ndim - 1)))
    new.bias.copy_(shift * scale if norm.bias is None else shift * scale + norm.bias)
    return new


def _absorb(model: fx.GraphModule, node: fx.Node) -> None:
    """The residual sum and the activation that alone read this low-rank layer are done by it."""
    layer = model.get_submodule(node.target)
    if not _is_own(model, node, tuple(LOW_RANK.values())) or layer.activation != "none":
        return
    chain, more = [node], {}
    residual = _residual(_only_user(node), node) if _is_bare(node, layer) else None
    if residual is not None:
        chain.append(_only_user(node))
        more["residual"] = residual
        if type(layer) is LowRankConv2d and _is_last_use(model, residual, node):
            more["in_place"] = True
    activation = _activation(model, _only_user(chain[-1]))
    if activation:
        chain.append(_only_user(chain[-1]))
    if len(chain) == 1 or _written_between(model, node, chain[-1]):
        return
    layer.activation = activation or "none"
    with model.graph.inserting_before(chain[-1]):  # where the residual is known
        new = model.graph.call_module(node.target, node.args, {**node.kwargs, **more})
    new.meta = chain[-1].meta
    chain[-1].replace_all_uses_with(new)
    for gone in reversed(chain):
        model.graph.erase_node(gone)


def _residual(user: fx.Node | None, node: fx.Node) -> fx.Node | None:
    """The other term, where ``user`` adds to the node a tensor of its shape and dtype."""
    if user is None or user.op not in ("call_function", "call_method") or len(user.args) != 2 or user.kwargs:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    known = user.target in SUMS or (user.target == SUM_IN_PLACE and user.args[0] is node)
    if not known or not isinstance(other, fx.Node) or other is node:
        return None
    return other if _kind(other) == _kind(node) else None


def _is_last_use(model: nn.Module, residual: fx.Node, node: fx.Node) -> bool:
    """Whether a layer made this tensor, only layers read it (they keep no view of it), and the sum does so last."""
    *before, _ = sorted(residual.users)
    return node not in before and all(_calls(model, other, LAYERS) for other in (residual, *before))


def _written_between(model: nn.Module, node: fx.Node, last: fx.Node) -> bool:
    """Whether anything from the layer to the last of what it absorbs, where it will run, writes over a tensor."""
    between = node
    while (between := between.next) is not last:
        if is_in_place(model, between) and not (between.target == SUM_IN_PLACE and between.args[0] is node):
            return True
    return False


def _activation(model: nn.Module, user: fx.Node | None) -> str | None:
    """The name of the activation that ``user`` is, among those a low-rank layer can do."""
    if user is None or user.kwargs.get("approximate", "none") != "none":
        return None
    if user.op == "call_module":
        module = model.get_submodule(user.target)
        exact = is_plain(module) and getattr(module, "approximate", "none") == "none"
        return next((name for name, kind in MODULES.items() if type(module) is kind and exact), None)
    return CALLS.get(user.target) if user.op in ("call_function", "call_method") else None


def _copying_views(model: fx.GraphModule) -> None:
    """``view`` meets outputs in channels_last, and has to copy."""
    for node in model.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[-1], torch.dtype):
            node.target = "reshape"
