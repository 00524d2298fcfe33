"""Operator fusion for inference: batch norms into weights, activations and residual sums into low-rank layers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._utils.copied import copied
from .._utils.eval_mode import set_mode
from ..folds import CONVS, TRANSPOSED
from ..nn.conv import LowRankConv2d
from ..nn.discovery import Layer
from ..nn.lowrank import MODULES, LowRank
from ..nn.module_surgery import NORMS, is_plain, is_shared, resized, sizes, to_channels_last
from ..nn.registry import LOW_RANK
from ..nn.unwrap import without_wrappers
from .arguments import ExampleInputs, Inputs
from .comparison import difference
from .fx_trace import is_in_place, trace

__all__ = ["fuse"]

DENSE = (nn.Linear, *CONVS, *TRANSPOSED)
LAYERS = (*DENSE, *LOW_RANK.values())
CALLS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip
SUMS = (operator.add, torch.add, "add")  # += is traced as +
SUM_IN_PLACE = "add_"  # modifies its first argument


def fuse(
    model: nn.Module, example_inputs: ExampleInputs, example_kwargs: Mapping[str, object] | None = None
) -> nn.Module:
    """Fused copy of a model for inference, with fewer passes over memory.

    * A batch norm after a (transposed) convolution, linear or low-rank layer is folded into its weights.
    * ReLU, ReLU6, SiLU, exact GELU and a residual sum after a low-rank layer become part of its kernel (epilogue):
      ``y = act(U (V x) + bias + residual)``.
    * 2-D convolutions get channels_last weights.

    Args:
        model: traceable by ``torch.fx``; its low-rank layers need not be.
        example_inputs: positional inputs, ``(x,)``, or a mapping of keyword arguments; their shapes tell residual sums
            from broadcast sums, and the outputs of both models are compared on them.
        example_kwargs: further keyword arguments. Flags, numbers and None among the arguments, and the defaults of
            those not given, become constants where the model cannot be traced otherwise.

    Returns:
        an ``fx.GraphModule`` in eval mode with the model's submodules under their names. Fuse last: a checkpoint does
        not record fused operators (:func:`compaware_kernels.save` the model before fusing).

    Raises:
        TypeError: example_inputs is a tensor instead of a tuple.
        ValueError: torch.fx cannot trace the model, or the fused model gives other outputs.
    """
    inputs, reference = Inputs.of(example_inputs, example_kwargs), copied(without_wrappers(model))
    reference = set_mode(nn.Sequential(reference) if isinstance(reference, LowRank) else reference, False)
    try:
        graph, _ = trace(reference, inputs)
    except Exception as error:  # tracing runs user code, which may raise anything
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"fuse: torch.fx cannot trace the model: {why}") from error
    fused = fx.GraphModule(copied(reference), graph)
    for change in (_remove_identity, _fold_norm, _fuse_epilogue):
        for node in list(fused.graph.nodes):
            if node.op == "call_module":
                change(fused, node)
    _views_to_reshapes(to_channels_last(fused))
    fused.delete_all_unused_submodules()
    fused.recompile()
    if why := difference(reference, fused, inputs):
        raise ValueError(f"fuse: the fused model does not give the outputs of the model on the example inputs: {why}")
    return set_mode(fused, False)  # which repacks the changed weights of low-rank layers


# --- node predicates --------------------------------------------------------------------------------------------------


def _calls(model: nn.Module, node: fx.Node, kinds: Sequence[type]) -> bool:
    """Whether the node calls a module of exactly these types, without hooks or overridden forward."""
    if node.op != "call_module":
        return False
    module = model.get_submodule(node.target)
    return type(module) in kinds and all(map(is_plain, module.modules()))


def _is_own(model: fx.GraphModule, node: fx.Node, kinds: Sequence[type]) -> bool:
    """As :func:`_calls`, and no other node or module calls, reads or shares it or its parameters."""
    if not _calls(model, node, kinds):
        return False
    inside = f"{node.target}."
    others = (n for n in model.graph.nodes if n is not node and n.op in ("call_module", "get_attr"))
    parts = model.get_submodule(node.target).modules()
    return not any(f"{n.target}.".startswith(inside) for n in others) and not any(is_shared(model, p) for p in parts)


def _is_bare(node: fx.Node, layer: LowRank) -> bool:
    """Whether this call of a low-rank layer has neither a fused activation nor a residual."""
    given = inspect.signature(layer.forward).bind(*node.args, **node.kwargs).arguments
    return layer.activation == "none" and "residual" not in given


def _only_user(node: fx.Node) -> fx.Node | None:
    """The only consumer of the node's output; None if there are several, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _tensor_meta(node: fx.Node) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and dtype of the node's output; None if it is not a tensor."""
    meta = node.meta.get("tensor_meta")
    return (meta.shape, meta.dtype) if hasattr(meta, "shape") else None


# --- graph rewrites ---------------------------------------------------------------------------------------------------


def _remove_identity(model: fx.GraphModule, node: fx.Node) -> None:
    """Remove Identity and Dropout: no-ops in eval mode that would hide residual sums from the other rewrites."""
    if _calls(model, node, (nn.Identity, nn.Dropout)) and node.args:
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)


def _fold_norm(model: fx.GraphModule, node: fx.Node) -> None:
    """Fold a batch norm that is the layer's only consumer into the layer's weight and bias."""
    norm, name = _only_user(node), node.target
    if norm is None or not (_is_own(model, node, LAYERS) and _calls(model, norm, NORMS)):
        return
    layer, statistics = model.get_submodule(name), model.get_submodule(norm.target)
    if isinstance(layer, LowRank):
        if not _is_bare(node, layer):
            return
        layer, name = layer.second, f"{name}.second"
    # The output has as many axes as the weight: excludes unbatched inputs, and Linear on [N, L, F], normed along L.
    if type(layer) in DENSE and len(_tensor_meta(node)[0]) == layer.weight.ndim and statistics.running_mean is not None:
        model.set_submodule(name, _with_norm_folded(layer, statistics))
        norm.replace_all_uses_with(node)
        model.graph.erase_node(norm)


@torch.no_grad()
def _with_norm_folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Copy of the layer with the batch norm folded in: ``scale W``, ``scale (b - mean) + beta``, in fp64."""
    scale, shift = (norm.running_var.double() + norm.eps).rsqrt(), -norm.running_mean.double()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = shift if layer.bias is None else shift + layer.bias
    new, rows = resized(layer, *sizes(layer), bias=True), Layer("", layer).rows.double()
    Layer("", new).set_rows(rows * scale.reshape(-1, *[1] * (rows.ndim - 1)))
    new.bias.copy_(shift * scale if norm.bias is None else shift * scale + norm.bias)
    return new


def _fuse_epilogue(model: fx.GraphModule, node: fx.Node) -> None:
    """Fuse a residual sum and an activation that follow this low-rank layer, and nothing else reads, into its call."""
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
    with model.graph.inserting_before(chain[-1]):  # here the residual has been computed
        new = model.graph.call_module(node.target, node.args, {**node.kwargs, **more})
    new.meta = chain[-1].meta
    chain[-1].replace_all_uses_with(new)
    for gone in reversed(chain):
        model.graph.erase_node(gone)


def _residual(user: fx.Node | None, node: fx.Node) -> fx.Node | None:
    """The other term if ``user`` adds a tensor of the same shape and dtype to the node's output; else None."""
    if user is None or user.op not in ("call_function", "call_method") or len(user.args) != 2 or user.kwargs:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    known = user.target in SUMS or (user.target == SUM_IN_PLACE and user.args[0] is node)
    if not known or not isinstance(other, fx.Node) or other is node:
        return None
    return other if _tensor_meta(other) == _tensor_meta(node) else None


def _is_last_use(model: nn.Module, residual: fx.Node, node: fx.Node) -> bool:
    """Whether the sum may overwrite the residual: made by a layer, read by layers only (no views), the sum last."""
    *before, _ = sorted(residual.users)
    return node not in before and all(_calls(model, other, LAYERS) for other in (residual, *before))


def _written_between(model: nn.Module, node: fx.Node, last: fx.Node) -> bool:
    """Whether an in-place op lies between the layer and ``last``: the fused call, moved there, may read its result."""
    between = node
    while (between := between.next) is not last:
        if is_in_place(model, between) and not (between.target == SUM_IN_PLACE and between.args[0] is node):
            return True
    return False


def _activation(model: nn.Module, user: fx.Node | None) -> str | None:
    """Name of the activation that ``user`` computes, if a low-rank layer can fuse it; else None."""
    if user is None or user.kwargs.get("approximate", "none") != "none":
        return None
    if user.op == "call_module":
        module = model.get_submodule(user.target)
        exact = is_plain(module) and getattr(module, "approximate", "none") == "none"
        return next((name for name, kind in MODULES.items() if type(module) is kind and exact), None)
    return CALLS.get(user.target) if user.op in ("call_function", "call_method") else None


def _views_to_reshapes(model: fx.GraphModule) -> None:
    """Replace ``view`` by ``reshape``: outputs are now channels_last, of which a view may not exist."""
    for node in model.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[-1], torch.dtype):
            node.target = "reshape"
