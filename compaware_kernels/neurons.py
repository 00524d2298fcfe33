"""Remove dead neurons: outputs of a Linear or convolution whose weights are all exactly zero, where that is exact.

A dead neuron still emits its bias. Following it through the model (``torch.fx``), that constant passes activations,
batch norms and poolings, and ends in the bias of the layers that read it. The removal is refused where it would not be
exact: the neuron feeds the model's output, a sum or a concatenation, a grouped convolution, or a zero-padded
convolution reads it with a constant other than zero (at the border the constant is missing).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves

from .folds import CONVS, foldable_layers
from .layers import _LowRank
from .surgery import NORMS, is_resizable, keep_inputs, keep_outputs

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
                  nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)  # fmt: skip
ELEMENTWISE_CALLS = (
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.gelu, F.silu, F.elu, F.leaky_relu, F.hardswish,
    F.sigmoid, F.tanh, F.dropout, "relu", "relu_", "sigmoid", "tanh",
)  # fmt: skip
POOL_CALLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
              F.adaptive_avg_pool3d)  # fmt: skip
RESHAPES = (torch.flatten, "flatten", "view", "reshape")


class _Kept(Exception):
    """Why a layer's dead neurons have to stay."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _LowRank) or super().is_leaf_module(module, name)


@dataclass
class _Walk:
    """What becomes of one layer's dead neurons downstream."""

    removable: Tensor  # bool [O]
    norms: list[tuple[str, int]] = field(default_factory=list)  # (module, features per neuron)
    readers: list[tuple[str, int, Tensor]] = field(default_factory=list)  # ... and the constant each neuron sends


def remove_dead_neurons(
    model: nn.Module, example_inputs: tuple, skip: tuple[str, ...] = ()
) -> tuple[nn.Module, dict[str, int], dict[str, str]]:
    """A copy of ``model`` (in eval mode exactly the same function) without its removable dead neurons.

    Returns:
        the copy; neurons removed per layer; and per layer that kept dead neurons, why.
    """
    dead = {layer.name: _dead(layer.module) for layer in foldable_layers(model, skip)[0]}
    dead = {name: mask for name, mask in dead.items() if mask.any()}
    if not dead:
        return model, {}, {}
    small = copy.deepcopy(model).eval()
    try:
        graph, shapes = _trace(small, example_inputs)
    except Exception as error:  # tracing runs the user's code: whatever it raises, the neurons stay, and we say so
        return model, {}, dict.fromkeys(dead, f"dead neurons kept: torch.fx cannot trace the model ({error})")
    removed, kept = {}, {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in dead:
            try:
                removed[node.target] = _remove(small, graph, shapes, node)
            except _Kept as reason:
                kept[node.target] = f"dead neurons kept: {reason}"
    if removed and not _same_outputs(model, small, example_inputs):
        return model, {}, kept | dict.fromkeys(removed, "dead neurons kept: removing them changes the outputs")
    for name, module in model.named_modules():
        small.get_submodule(name).training = module.training
    return small, removed, kept


def _dead(module: nn.Module) -> Tensor:
    """Outputs whose weights are all zero; at least one output stays, for a layer cannot have none."""
    dead = (module.weight.detach().flatten(1) == 0).all(1)
    if len(dead) and dead.all():
        dead[0] = False
    return dead


def _trace(model: nn.Module, example_inputs: tuple) -> tuple[fx.Graph, dict[fx.Node, torch.Size]]:
    graph = _Tracer().trace(model)
    with torch.no_grad():
        ShapeProp(fx.GraphModule(model, graph)).propagate(*example_inputs)
    metas = {node: node.meta.get("tensor_meta") for node in graph.nodes}
    return graph, {node: meta.shape for node, meta in metas.items() if hasattr(meta, "shape")}


def _remove(model: nn.Module, graph: fx.Graph, shapes: dict[fx.Node, torch.Size], node: fx.Node) -> int:
    """Remove the dead neurons of one layer, in ``model``; returns how many went.  Raises _Kept."""
    layer = _resizable(model, graph, node)
    dead = _dead(layer)
    axis = len(shapes[node]) - 1 if isinstance(layer, nn.Linear) else 1
    bias = torch.zeros(len(dead)) if layer.bias is None else layer.bias.detach().cpu()
    walk = _Walk(removable=dead.cpu())
    _follow(model, graph, shapes, node, axis, torch.where(dead.cpu(), bias, 0), 1, walk)
    if not walk.removable.any():
        raise _Kept("a zero-padded convolution reads their constant output, which is missing at the border")
    keep = (~walk.removable).nonzero()[:, 0]
    model.set_submodule(node.target, keep_outputs(layer, keep))
    for name, per_neuron in walk.norms:
        model.set_submodule(name, keep_outputs(model.get_submodule(name), _features(keep, per_neuron)))
    for name, per_neuron, constant in walk.readers:
        sent = torch.where(walk.removable, constant, 0).repeat_interleave(per_neuron)
        reader = model.get_submodule(name)
        sent = sent.to(reader.weight.device)
        model.set_submodule(name, keep_inputs(reader, _features(keep, per_neuron).to(sent.device), sent))
    return int(walk.removable.sum())


def _features(neurons: Tensor, per_neuron: int) -> Tensor:
    """The flattened feature indices of neurons that own ``per_neuron`` consecutive features each."""
    return (neurons[:, None] * per_neuron + torch.arange(per_neuron)).flatten()


def _follow(
    model: nn.Module,
    graph: fx.Graph,
    shapes: dict[fx.Node, torch.Size],
    node: fx.Node,
    axis: int,
    constant: Tensor,
    per_neuron: int,
    walk: _Walk,
) -> None:
    """Follow the neurons on ``axis`` of ``node``'s output into every reader.  Raises _Kept.

    Args:
        constant: ``[O]`` what each dead neuron sends here.
        per_neuron: how many consecutive features on ``axis`` belong to one neuron (after flattening).
    """
    for user in node.users:
        if user not in shapes and user.op != "output":
            continue  # x.size(), x.shape: not a tensor; wrong uses show in the comparison of outputs
        here = (axis, constant, per_neuron)
        if user.op == "call_module":
            module = _module(model, user)
            if isinstance(module, nn.Linear) or type(module) in CONVS:
                _read(_resizable(model, graph, user), user, shapes[node], *here, walk)
                continue
            here = _through_module(model, graph, user, module, shapes, node, *here, walk)
        elif user.op in ("call_function", "call_method") and user.args and user.args[0] is node:
            here = _through_call(user, shapes, node, *here)
        else:
            raise _Kept("they feed the model's output" if user.op == "output" else f"they feed {user.name}")
        _follow(model, graph, shapes, user, *here, walk)


def _read(reader: nn.Module, user: fx.Node, shape: torch.Size, axis: int, constant: Tensor, per_neuron: int,
          walk: _Walk) -> None:  # fmt: skip
    """A Linear or convolution reads the neurons: here the walk ends."""
    if axis != (len(shape) - 1 if isinstance(reader, nn.Linear) else 1):
        raise _Kept(f"{user.target} does not read them as its inputs")
    if not isinstance(reader, nn.Linear) and reader.padding_mode == "zeros" and _is_padded(reader):
        walk.removable &= constant == 0
    walk.readers.append((user.target, per_neuron, constant))


def _is_padded(module: nn.Module) -> bool:
    padding = module.padding
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in module.kernel_size)
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def _through_module(model, graph, user, module, shapes, node, axis, constant, per_neuron, walk):
    """The neurons' axis, constant and features per neuron behind a module that keeps them apart.  Raises _Kept."""
    if isinstance(module, ELEMENTWISE):
        return axis, module(constant.clone()), per_neuron
    if isinstance(module, NORMS) and axis == 1 and per_neuron == 1 and module.track_running_stats:
        _resizable(model, graph, user)
        walk.norms.append((user.target, per_neuron))
        return axis, _normalised(module, constant), per_neuron
    if isinstance(module, (*MAX_POOLS, *ADAPTIVE_POOLS, *AVERAGE_POOLS)) and axis == 1 and per_neuron == 1:
        if isinstance(module, AVERAGE_POOLS) and _is_padded(module):
            walk.removable &= constant == 0
        return axis, constant, per_neuron
    if isinstance(module, nn.Flatten):
        return _flattened(user, shapes, node, axis, constant, per_neuron)
    raise _Kept(f"they feed {user.target} ({type(module).__name__})")


def _normalised(norm: nn.Module, constant: Tensor) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    out = F.batch_norm(constant[None].to(mean), mean, var, norm.weight, norm.bias, training=False, eps=norm.eps)
    return out[0].detach().cpu()


def _through_call(user, shapes, node, axis, constant, per_neuron):
    """As :func:`_through_module`, for functions and methods."""
    if user.target in ELEMENTWISE_CALLS:
        function = getattr(torch.Tensor, user.target) if user.op == "call_method" else user.target
        return axis, function(constant.clone(), *user.args[1:], **user.kwargs), per_neuron
    if user.target in POOL_CALLS and axis == 1 and per_neuron == 1:
        return axis, constant, per_neuron
    if user.target in ("mean", torch.mean) and axis == 1 and per_neuron == 1:
        dims = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        if dims and all(d % len(shapes[node]) > 1 for d in dims):
            return axis, constant, per_neuron
    if user.target in RESHAPES:
        return _flattened(user, shapes, node, axis, constant, per_neuron)
    raise _Kept(f"they feed {user.name}")


def _flattened(user, shapes, node, axis, constant, per_neuron):
    before, after = shapes[node], shapes[user]
    if axis == 1 and len(before) >= 2 and after == (before[0], math.prod(before[1:])):
        return 1, constant, per_neuron * math.prod(before[2:])
    raise _Kept(f"they feed {user.name}, which is not a plain flatten to [N, features]")


def _module(model: nn.Module, node: fx.Node) -> nn.Module:
    return model.get_submodule(node.target)


def _resizable(model: nn.Module, graph: fx.Graph, node: fx.Node) -> nn.Module:
    """The module of ``node``, where its size may be changed.  Raises _Kept."""
    module = _module(model, node)
    if not is_resizable(module):
        raise _Kept(f"{node.target} is a {type(module).__name__}" + (" with groups" if type(module) in CONVS else ""))
    calls = sum(other.op == "call_module" and other.target == node.target for other in graph.nodes)
    owners = [
        m for m in model.modules() if any(p is q for p in m.parameters(recurse=False) for q in module.parameters())
    ]
    if (
        calls > 1
        or len(owners) > 1
        or any(n.op == "get_attr" and n.target.startswith(node.target) for n in graph.nodes)
    ):
        raise _Kept(f"{node.target} is used more than once")
    return module


def _same_outputs(model: nn.Module, small: nn.Module, example_inputs: tuple) -> bool:
    """Whether both give the same outputs in eval mode, up to the rounding of a sum in another order."""
    reference = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            wanted, got = tree_leaves(reference(*example_inputs)), tree_leaves(small(*example_inputs))
    except RuntimeError:
        return False
    pairs = [(a, b) for a, b in zip(wanted, got, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e3 * torch.finfo(a.dtype).eps * a.abs().max()) if a.numel() else True
