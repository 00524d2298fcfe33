"""A whole model for inference: batch norms go into the weights, activations and residual sums into low-rank layers."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .folds import CONVS
from .graphs import same_outputs, trace
from .low_rank import MODULES, LowRank
from .surgery import NORMS, is_plain, is_shared

CALLS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip
SUMS = (operator.add, torch.add, "add")
SUMS_IN_PLACE = (operator.iadd, "add_")  # of their first argument


def fuse(model: nn.Module, example_inputs: Sequence[object]) -> nn.Module:
    """A copy of the model for inference, with fewer passes over memory.

    * A batch norm after a convolution, linear or low-rank layer goes into its weights.
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
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs: wanted a tuple of the model's inputs, (x,); got a tensor")
    reference, inputs = copy.deepcopy(model).eval(), tuple(example_inputs)
    try:
        graph, shapes = trace(reference, inputs)
    except Exception as error:  # tracing runs the user's code
        raise ValueError(f"fuse: torch.fx cannot trace the model: {' '.join(str(error).split())}") from error
    fused = fx.GraphModule(copy.deepcopy(reference), graph)
    _remove_identities(fused)
    calls = Counter(node.target for node in fused.graph.nodes if node.op == "call_module")
    shapes = {node.name: shape for node, shape in shapes.items()}
    for node in list(fused.graph.nodes):
        if _is_own(fused, node, calls, (nn.Linear, *CONVS, LowRank)):
            _fold_norm(fused, node, calls, shapes)
    for node in list(fused.graph.nodes):
        if _is_own(fused, node, calls, LowRank):
            _absorb(fused, node, shapes)
    fused.delete_all_unused_submodules()
    fused.recompile()
    fused = fused.to(memory_format=torch.channels_last)
    if not same_outputs(reference, fused, inputs):
        raise ValueError("fuse: the fused model does not give the outputs of the model on the example inputs")
    return fused


def _remove_identities(model: fx.GraphModule) -> None:
    """Modules that do nothing in eval mode hide what is a residual."""
    for node in list(model.graph.nodes):
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if type(module) in (nn.Identity, nn.Dropout) and is_plain(module) and node.args:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def _is_own(model: nn.Module, node: fx.Node, calls: Counter, kinds) -> bool:
    """Whether the node calls a module of these kinds that nothing else calls or shares, and that does what it says."""
    if node.op != "call_module" or calls[node.target] > 1:
        return False
    module = model.get_submodule(node.target)
    parts = list(module.modules())
    return isinstance(module, kinds) and all(is_plain(part) and not is_shared(model, part) for part in parts)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fold_norm(model: fx.GraphModule, node: fx.Node, calls: Counter, shapes: dict[str, torch.Size]) -> None:
    """A batch norm that alone reads this layer goes into its weights."""
    user, layer = _only_user(node), model.get_submodule(node.target)
    if user is None or not _is_own(model, user, calls, NORMS):
        return
    norm = model.get_submodule(user.target)
    last = layer.second if isinstance(layer, LowRank) else layer
    per_channel = type(last) in CONVS or (type(last) is nn.Linear and len(shapes[node.name]) == 2)
    if norm.running_mean is None or not per_channel:
        return
    new = (fuse_linear_bn_eval if isinstance(last, nn.Linear) else fuse_conv_bn_eval)(last, norm)
    if isinstance(layer, LowRank):
        layer.second = new
    else:
        model.set_submodule(node.target, new)
    user.replace_all_uses_with(node)
    model.graph.erase_node(user)


def _absorb(model: fx.GraphModule, node: fx.Node, shapes: dict[str, torch.Size]) -> None:
    """The residual sum and the activation that alone read this low-rank layer are done by it."""
    chain, residual = [node], _residual(_only_user(node), node, shapes)
    if residual is not None:
        chain.append(_only_user(node))
    layer, activation = model.get_submodule(node.target), _activation(model, _only_user(chain[-1]))
    if activation and layer.activation == "none":
        chain.append(_only_user(chain[-1]))
        layer.activation = activation
    if len(chain) > 1:
        with model.graph.inserting_before(chain[-1]):  # where the residual is known
            more = {"residual": residual, "in_place": _is_last_use(model, residual)} if residual else {}
            new = model.graph.call_module(node.target, node.args, {**node.kwargs, **more})
        chain[-1].replace_all_uses_with(new)
        for gone in reversed(chain):
            model.graph.erase_node(gone)


def _is_last_use(model: nn.Module, residual: fx.Node) -> bool:
    """Whether a layer made this tensor, only layers read it (they keep no view of it), and the sum does so last."""

    def is_layer(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(model.get_submodule(node.target), (nn.Linear, *CONVS, LowRank))

    *before, last = sorted(residual.users)
    return is_layer(residual) and all(is_layer(user) for user in before) and last.op != "output"


def _residual(user: fx.Node | None, node: fx.Node, shapes: dict[str, torch.Size]) -> fx.Node | None:
    """The other term, where ``user`` adds to the node a tensor of its shape."""
    if user is None or user.op not in ("call_function", "call_method") or len(user.args) != 2 or user.kwargs:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    known = user.target in SUMS or (user.target in SUMS_IN_PLACE and user.args[0] is node)
    if not known or not isinstance(other, fx.Node) or other is node:
        return None
    return other if shapes.get(other.name) == shapes.get(node.name) is not None else None


def _activation(model: nn.Module, user: fx.Node | None) -> str | None:
    """The name of the activation that ``user`` is, among those a low-rank layer can do."""
    if user is None or user.kwargs.get("approximate", "none") != "none":
        return None
    if user.op == "call_module":
        module = model.get_submodule(user.target)
        exact = is_plain(module) and getattr(module, "approximate", "none") == "none"
        return next((name for name, kind in MODULES.items() if type(module) is kind and exact), None)
    return CALLS.get(user.target) if user.op in ("call_function", "call_method") else None
