"""Dead-neuron removal: delete output channels whose weights are all zero, with constant propagation of their biases.

A dead neuron still emits its bias. The ``torch.fx`` graph shows where that constant goes: through activations, batch
norms and poolings, until it is folded into the bias of the consuming layers. Removal is refused where it would not be
exact: the neuron feeds the model's output, a sum or a concatenation, a grouped convolution, or, with a nonzero
constant, a zero-padded convolution (the border sees zeros instead of the constant). Any op not known to be exact is
refused; finally both models are compared on the example inputs, as a check, not as the proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .._utils.copied import copied
from .._utils.eval_mode import set_mode
from ..folds import CONVS
from ..nn.discovery import Layer, foldable_layers
from ..nn.module_surgery import NORMS, is_plain, is_shared, keep_inputs, keep_outputs, replace, why_fixed
from .arguments import ExampleInputs, Inputs
from .comparison import difference
from .fx_trace import is_in_place, trace

__all__ = ["remove_dead_neurons"]

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
POOLS = (
    *AVERAGE_POOLS, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
ELEMENTWISE_CALLS = (
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.gelu, F.silu, F.elu, F.leaky_relu, F.hardswish,
    F.sigmoid, F.tanh, "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_",
)  # fmt: skip
POOL_CALLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
              F.adaptive_avg_pool3d)  # fmt: skip
RESHAPES = (torch.flatten, "flatten", "view", "reshape")


class _NotExact(Exception):
    """Raised with the reason why a layer's dead neurons cannot be removed."""


class _Propagated(NamedTuple):
    """State of constant propagation at one edge of the graph: where the neurons are, and what dead ones emit."""

    axis: int  # of the tensor, that indexes neurons
    constant: Tensor  # [O], output of each dead neuron; arbitrary for live ones
    per_neuron: int  # consecutive features on ``axis`` that belong to one neuron, after flattening


def remove_dead_neurons(
    model: nn.Module,
    example_inputs: ExampleInputs | Inputs,
    skip: tuple[str, ...] = (),
    example_kwargs: Mapping[str, object] | None = None,
) -> tuple[nn.Module, dict[str, int], dict[str, str]]:
    """Copy of ``model`` without its removable dead neurons; in eval mode exactly the same function.

    Layers that match ``skip`` keep their outputs, but may lose inputs that are constant. Example inputs: as for
    :func:`compaware_kernels.compress`.

    Returns:
        the copy; number of removed neurons per layer; and for each layer that kept dead neurons, the reason.
    """
    dead = [layer.name for layer in foldable_layers(model, skip)[0] if _dead_outputs(layer).any()]
    if not dead:
        return model, {}, {}
    inputs = Inputs.of(example_inputs, example_kwargs)
    reference, small = set_mode(copied(model), False), set_mode(copied(model), False)
    try:
        graph, shapes = trace(reference, inputs)
    except Exception as error:  # tracing runs user code, which may raise anything: report it, keep the neurons
        why = f"torch.fx cannot trace the model ({' '.join(str(error).split())})"
        return model, {}, dict.fromkeys(dead, f"dead neurons kept: {why}")
    removed, kept = {}, {}
    for name in dead:
        try:
            removed[name] = _Removal(small, graph, shapes, name).apply()
        except _NotExact as reason:
            kept[name] = f"dead neurons kept: {reason}"
    if removed and (why := difference(reference, small, inputs)):
        return model, {}, kept | dict.fromkeys(removed, f"dead neurons kept: after their removal, {why}")
    for name, module in model.named_modules():
        small.get_submodule(name).training = module.training
    return small, removed, kept


def _dead_outputs(layer: Layer) -> Tensor:
    """Mask ``[O]`` of outputs whose weights are all zero; if all are, the first stays: a layer needs an output."""
    dead = (layer.rows.detach().flatten(1) == 0).all(1)
    if len(dead) and dead.all():
        dead[0] = False
    return dead.cpu()


class _Removal:
    """Removal of one layer's dead neurons: propagate their constants, then resize the layer, norms and consumers."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shapes: dict[fx.Node, torch.Size], name: str):
        self.model, self.graph, self.shapes, self.name = model, graph, shapes, name
        self.removable = _dead_outputs(Layer(name, model.get_submodule(name)))  # [O]; consumers may exclude some
        self.norms: list[str] = []
        self.readers: list[tuple[str, _Propagated]] = []

    def apply(self) -> int:
        """Remove them from ``model``; returns their number.  Raises _NotExact, with the model unchanged."""
        layer, node = self._resizable(self.name), self._call(self.name)
        axis = len(self.shapes[node]) - 1 if isinstance(layer, nn.Linear) else self._channel_axis(type(layer), node)
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
        self._propagate(node, _Propagated(axis, bias.cpu(), 1))
        if not self.removable.any():
            raise _NotExact("a zero-padded convolution reads their constant output, which is missing at the border")
        keep = (~self.removable).nonzero()[:, 0]
        for name in (self.name, *self.norms):
            replace(self.model, name, keep_outputs(self.model.get_submodule(name), keep))
        for name, sent in self.readers:
            reader, n = self.model.get_submodule(name), sent.per_neuron
            features = (keep[:, None] * n + torch.arange(n)).flatten()
            constant = torch.where(self.removable, sent.constant, 0).repeat_interleave(n)
            replace(self.model, name, keep_inputs(reader, features, constant.to(reader.weight.device)))
        return int(self.removable.sum())

    def _propagate(self, node: fx.Node, sent: _Propagated, branched: bool = False) -> None:
        """Propagate the constants from the output of ``node`` to every consumer.  Raises _NotExact."""
        users = [user for user in node.users if not self._reads_only_size(user)]
        branched = branched or len(users) > 1
        for user in users:
            if user.op == "output":
                raise _NotExact("they feed the model's output")
            if branched and is_in_place(self.model, user):
                raise _NotExact(f"{user.name} changes them in place, and not only it reads them")
            if user.op == "call_module":
                module = self.model.get_submodule(user.target)
                if isinstance(module, nn.Linear) or type(module) in CONVS:
                    self._consume(node, user, sent)
                    continue
                after = self._through_module(node, user, module, sent)
            else:
                after = self._through_call(node, user, sent)
            self._propagate(user, after, branched)

    def _consume(self, node: fx.Node, user: fx.Node, sent: _Propagated) -> None:
        """A Linear or convolution consumes the neurons: propagation ends here.  Raises _NotExact."""
        reader = self._resizable(user.target)
        linear = isinstance(reader, nn.Linear)
        if sent.axis != (len(self.shapes[node]) - 1 if linear else self._channel_axis(type(reader), node)):
            raise _NotExact(f"{user.target} does not read them as its inputs")
        if not linear and reader.padding_mode == "zeros" and _is_padded(reader):
            self.removable &= sent.constant == 0
        self.readers.append((user.target, sent))

    def _channel_axis(self, kind: type | Callable, node: fx.Node) -> int:
        """Channel axis of ``node``, an input or output of a convolution or pooling.  Raises _NotExact."""
        if len(self.shapes[node]) != 2 + int(kind.__name__[-2]):  # Conv2d, AvgPool3d, max_pool1d
            raise _NotExact(f"{node.name} has no batch axis")
        return 1

    def _through_module(self, node: fx.Node, user: fx.Node, module: nn.Module, sent: _Propagated) -> _Propagated:
        """State after a module that does not mix neurons.  Raises _NotExact for any other."""
        channels = sent.axis == 1 and sent.per_neuron == 1
        if not is_plain(module):
            raise _NotExact(f"{user.target} has hooks or a forward of its own")
        if isinstance(module, ELEMENTWISE):
            return sent._replace(constant=module(sent.constant.clone()))
        if isinstance(module, NORMS) and channels and module.track_running_stats:
            self._resizable(user.target)
            self.norms.append(user.target)
            return sent._replace(constant=_normalized(module, sent.constant))
        if isinstance(module, POOLS) and channels and self._channel_axis(type(module), node):
            if isinstance(module, AVERAGE_POOLS) and (_is_padded(module) or getattr(module, "divisor_override", None)):
                self.removable &= sent.constant == 0
            return sent
        if isinstance(module, nn.Flatten):
            return self._flattened(node, user, sent)
        raise _NotExact(f"they feed {user.target} ({type(module).__name__})")

    def _through_call(self, node: fx.Node, user: fx.Node, sent: _Propagated) -> _Propagated:
        """State after a function or method that does not mix neurons.  Raises _NotExact for any other."""
        channels = sent.axis == 1 and sent.per_neuron == 1
        if user.args[:1] == (node,):
            if user.target in RESHAPES:
                return self._flattened(node, user, sent)
            if user.all_input_nodes == [node]:
                if user.target in ELEMENTWISE_CALLS:
                    function = getattr(torch.Tensor, user.target) if user.op == "call_method" else user.target
                    return sent._replace(constant=function(sent.constant.clone(), *user.args[1:], **user.kwargs))
                if user.target is F.dropout and not _argument(user, 2, "training", True):
                    return sent
                if user.target in POOL_CALLS and channels and self._channel_axis(user.target, node):
                    return sent
                if user.target in ("mean", torch.mean) and channels:
                    dims = _argument(user, 1, "dim", ())
                    dims = [dims] if isinstance(dims, int) else list(dims or ())
                    if dims and all(d % len(self.shapes[node]) > 1 for d in dims):
                        return sent
        raise _NotExact(f"they feed {user.name}")

    def _flattened(self, node: fx.Node, user: fx.Node, sent: _Propagated) -> _Propagated:
        """State after a flatten to ``[N, features]``, one neuron being several features.  Raises _NotExact."""
        before, after = self.shapes[node], self.shapes[user]
        sizes = tree_leaves((user.args[1:], user.kwargs))
        if user.target in ("view", "reshape") and isinstance(sizes[-1], int) and sizes[-1] != -1:
            raise _NotExact(f"{user.name} has a fixed number of features")
        if sent.axis == 1 and len(before) >= 2 and after == (before[0], math.prod(before[1:])):
            return sent._replace(per_neuron=sent.per_neuron * math.prod(before[2:]))
        raise _NotExact(f"they feed {user.name}, which is not a plain flatten to [N, features]")

    def _reads_only_size(self, user: fx.Node) -> bool:
        """Whether ``user`` reads only the tensor's size.  Raises _NotExact if more than reshapes use it."""
        asks = (user.op == "call_method" and user.target == "size") or (
            user.target is getattr and user.args[1] == "shape"
        )
        if asks and not self._only_reshapes(user):
            raise _NotExact(f"{user.name} is used for more than reshaping")
        return asks

    def _only_reshapes(self, size: fx.Node) -> bool:
        """Whether a size is used, directly or through arithmetic, by reshapes only."""
        return all(
            user.target in RESHAPES if user in self.shapes else user.op == "call_function" and self._only_reshapes(user)
            for user in size.users
        )

    def _call(self, name: str) -> fx.Node:
        """The only call of a module in the graph.  Raises _NotExact if there are several, or none."""
        calls = [node for node in self.graph.nodes if node.op == "call_module" and node.target == name]
        if len(calls) != 1:
            raise _NotExact(
                f"{name} is used more than once" if calls else f"the model does not call {name} as a module"
            )
        return calls[0]

    def _resizable(self, name: str) -> nn.Module:
        """The layer or norm of this name.  Raises _NotExact if it cannot be resized (hooks, sharing)."""
        module = self.model.get_submodule(name)
        self._call(name)
        if reason := why_fixed(module):
            raise _NotExact(f"{name} is {reason}")
        if is_shared(self.model, module) or any(
            node.op == "get_attr" and node.target.startswith(f"{name}.") for node in self.graph.nodes
        ):
            raise _NotExact(f"{name} is used more than once")
        return module


def _is_padded(module: nn.Module) -> bool:
    padding = module.padding
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in module.kernel_size)
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def _normalized(norm: nn.Module, constant: Tensor) -> Tensor:
    """Batch norm in eval mode of a constant per channel, ``[O]`` -> ``[O]``, on the CPU."""
    mean, var = norm.running_mean, norm.running_var
    out = F.batch_norm(constant[None].to(mean), mean, var, norm.weight, norm.bias, training=False, eps=norm.eps)
    return out[0].detach().cpu()


def _argument(node: fx.Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
