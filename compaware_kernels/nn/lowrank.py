"""Base class of low-rank layers: two factors, fused forward, weight packing, loading of dense checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .._utils.autocast import without_autocast
from ..folds import oriented, to_matrix
from ..ops import backends, lowrank_ways, tuner
from ..ops.lowrank import ACTIVATIONS, Geometry, lowrank_pack
from ..ops.lowrank_ways import DENSE, ONE_KERNEL, TWO_STEPS
from ..ops.transforms import is_transformed
from .factored_weight import FactoredWeight
from .module_surgery import copy_requires_grad, is_plain
from .truncation import factors

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

__all__ = ["FACTORS", "MODULES", "LowRank"]

FACTORS = ("first", "second")  # names of the submodules
INPUTS = 16  # shapes that a layer measures; those of text, or of images of any size, have no end
FASTER = "measured to be faster"
SAMPLES = 32  # numbers of a factor that are compared with those that were packed, as in the CPU kernel
MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}  # fused activation -> module


class Choice(NamedTuple):
    """How a layer runs on an input: the way, of ``ops.lowrank_ways``; why it is not one kernel; the function, if it
    does not run as modules of torch."""

    way: str
    reason: str = ""
    run: lowrank_ways.Run | None = None


class LowRank(nn.Module, ABC):
    """Low-rank layer ``y = act(second(first(x)) + residual)``, for inference on the CPU in the fastest way measured.

    The ways (:mod:`compaware_kernels.ops.lowrank_ways`) are timed when the layer meets an input shape for the first
    time. On GPUs, and with ``COMPAWARE_TUNE=off``, one fused kernel runs if it takes the arguments, else two steps.

    The activation is ``none`` until :func:`compaware_kernels.fuse` fuses the one that follows the layer. ``in_place``
    permits writing y over the residual. The weights are those of ``first`` and ``second``; in the layout of the way
    that runs they are packed once, and again after a change, which doubles the memory of the weights.

    It has the attributes of the dense layer, for those who read them: sizes and geometry, ``bias``, and a read-only
    ``weight``, the product of the factors (:class:`.factored_weight.FactoredWeight`).
    """

    __jit_unused_properties__: ClassVar = ["weight"]
    # What a layer that replaces this one does not take over from it.
    own_attributes: ClassVar = ("rank", "fold", "activation", "_packed", "_packed_from", "_choices", "_prepacked")
    own_hooks: ClassVar = ()

    dense: type[nn.Module]
    first: nn.Module
    second: nn.Module
    op: str  # fused op in torch.ops.compaware
    rank: int
    fold: str = "paper"
    groups: int = 1
    activation: str = "none"
    _packed: Tensor | None = None
    _packed_from: tuple | None = None
    _choices: dict[tuple, Choice]  # measured, by input
    _prepacked: dict[
        str, tuple[list[Tensor], tuple]
    ]  # way -> weights, and the state of the factors they were made from

    def __init__(self):
        super().__init__()
        self._choices, self._prepacked = {}, {}
        self._register_load_state_dict_pre_hook(_convert_state_dict, with_module=True)
        self.register_load_state_dict_post_hook(_pack_after_load)

    def forward(self, input: Tensor, residual: Tensor | None = None, in_place: bool = False) -> Tensor:
        choice = self._choice(input, residual, in_place)
        first, second = self._modules["first"], self._modules["second"]  # several times as fast as attribute access
        if choice.run:
            V, of_second = first._parameters["weight"], second._parameters
            U, packed = of_second["weight"], None
            if choice.way != TWO_STEPS:
                packed = self._packed_now(V, U) if choice.way == ONE_KERNEL else self._prepacked_now(choice.way, V, U)
            return choice.run(input, V, U, of_second["bias"], residual, packed)
        if not torch.compiler.is_compiling():
            backends.log_once(type(self).__name__, backends.TWO_STEPS, choice.reason)
        y = self._dense(input) if choice.way == DENSE else second(first(input))
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)

    def why_two_step(self, x: Tensor) -> str:
        """Why ``forward`` does not run both factors in one fused kernel on this input; "" if it does."""
        return self._choice(x).reason

    def ways(self, x: Tensor) -> list[str]:
        """The ways of which ``forward`` may take the fastest on this input: one, where nothing is measured."""
        if self._why_apart(x) or self._why_not_geometry():
            return [TWO_STEPS]
        if tuner.enabled() and self._measures(x, None):
            return lowrank_ways.ways(self._call(x, None, False))
        return [self._choice(x).way]

    def _choice(self, x: Tensor, residual: Tensor | None = None, in_place: bool = False) -> Choice:
        """How ``forward`` runs: as measured, or by rules where nothing is measured."""
        if reason := self._why_apart(x):
            return Choice(TWO_STEPS, reason)
        over = in_place and residual is not None and not torch.is_grad_enabled()
        measures, key = self._measures(x, residual), None
        if measures and not torch.compiler.is_compiling():
            key = x.shape, x.stride(), self.activation, residual is None, over, torch.get_num_threads()
            if found := self._choices.get(key):
                return found
        if reason := self._why_not_geometry():
            return Choice(TWO_STEPS, reason)
        if key and tuner.enabled():
            return self._choose(key, x, residual, over)
        way = self._compiled(x, residual, over) if measures and not key else ""
        if not way:
            V, U = self._modules["first"]._parameters["weight"], self._modules["second"]._parameters["weight"]
            backend, reason = backends.choose(self.op, x.device, x, V, U, self.groups, self.fold)
            if backend is backends.PLAIN:
                return Choice(TWO_STEPS, reason or f"no kernel for {x.device.type}")
        if way in ("", ONE_KERNEL):
            geometry = self._geometry()
            return Choice(ONE_KERNEL, "", lowrank_ways.one_kernel(geometry or (self.activation,), over and geometry))
        return Choice(way, FASTER)

    def _why_apart(self, x: Tensor) -> str:
        """Why the factors must run one after the other, whatever is faster; "" if they need not."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or not isinstance(x, Tensor):
            return "traced or exported: standard ops only"
        if x.is_nested:
            return "a nested tensor"
        first, second = self._modules["first"], self._modules["second"]
        if type(first) is not self.dense or type(second) is not self.dense:
            return "a factor is no plain layer"
        if not (is_plain(first) and is_plain(second)):
            return "a factor has hooks or a forward of its own"
        V, U = first._parameters["weight"], second._parameters["weight"]
        if torch.is_grad_enabled() and (x.requires_grad or V.requires_grad or U.requires_grad):
            return "gradients are wanted, for which two steps keep the intermediate"
        if is_transformed():
            return "under transforms of torch.func and in forward mode"
        return "no batch axis" if V.ndim == 4 and x.ndim != 4 else ""

    def _measures(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether ways other than those of the rules may run: in inference on the CPU, outside of torch's modes."""
        V, bias = self._modules["first"]._parameters["weight"], self._modules["second"]._parameters["bias"]
        if self.training or not x.is_cpu or x.dtype is not V.dtype or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() and any(A is not None and A.requires_grad for A in (bias, residual)):
            return False
        if torch.compiler.is_compiling():
            return _is_static(x)
        # Modes count or record the ops of this package, or have tensors without numbers.
        return type(x) is Tensor and type(V) is nn.Parameter and V.is_cpu and not torch._C._len_torch_dispatch_stack()

    def _choose(self, key: tuple, x: Tensor, residual: Tensor | None, over: bool) -> Choice:
        """The choice for a new input; if there have been many, that for the input most like it in size."""
        if len(self._choices) >= INPUTS:
            alike = [other for other in self._choices if other[2:] == key[2:]]
            if alike:
                return self._choices[min(alike, key=lambda other: abs(other[0].numel() - x.numel()))]
        call = self._call(x, residual, over)
        way = lowrank_ways.fastest(call) if x.numel() else TWO_STEPS
        why = "" if way == ONE_KERNEL else f"{way}: {FASTER}"
        self._choices[key] = Choice(way, why, lowrank_ways.function(way, call))
        return self._choices[key]

    def _compiled(self, x: Tensor, residual: Tensor | None, over: bool) -> str:
        """The way in a graph for a compiler; "" if none is measured."""
        return lowrank_ways.fastest_compiled(*self._call(x, residual, over))

    def _call(self, x: Tensor, residual: Tensor | None, over: bool) -> lowrank_ways.Call:
        """What a measurement of this call depends on."""
        geometry, second = self._geometry(), self._modules["second"]._parameters
        V, U = self._modules["first"]._parameters["weight"], second["weight"]
        last = tuple(geometry is not None and suggest_memory_format(A) == torch.channels_last for A in (x, V))
        shape = tuple(x.shape) if geometry else (x.numel() // x.shape[-1], x.shape[-1])
        return lowrank_ways.Call(
            shape, tuple(V.shape), tuple(U.shape), x.dtype, last, second["bias"] is not None, residual is not None,
            over, self.activation, tuple(geometry)[:-1] if geometry else None,
        )  # fmt: skip

    def _geometry(self) -> Geometry | None:
        """Geometry of a 2-D convolution; None for a linear layer."""
        return None

    def _dense(self, x: Tensor) -> Tensor:
        """The dense layer on the product of the factors, which a compiler folds into one constant."""
        raise NotImplementedError(f"{type(self).__name__} has one way only")

    def _why_not_geometry(self) -> str:
        """Why the geometry (padding, dimension) rules out the fused kernel; "" if it does not."""
        return ""

    @classmethod
    @abstractmethod
    def like(cls, layer: nn.Module, rank: int, fold: str = "paper") -> Self:
        """New low-rank layer, untrained, with the sizes, geometry, bias, device and dtype of the dense ``layer``."""

    @classmethod
    def from_dense(cls, layer: nn.Module, rank: int, fold: str = "paper") -> Self:
        """Low-rank layer of the best rank-r approximation of the folded dense weight (truncated SVD, per group)."""
        self = cls.like(layer, rank, fold)
        return self._copy_from(layer, *self._factors(layer.weight))

    @classmethod
    def from_factors(cls, layer: nn.Module, rank: int, fold: str, U: Tensor, V: Tensor) -> Self:
        """As :meth:`from_dense`, with the factors ``[G, m, r]`` and ``[G, r, n]`` of the folded weight given."""
        return cls.like(layer, rank, fold)._copy_from(layer, U, V)

    def to_sequential(self) -> nn.Sequential:
        """The layer in plain torch: ``nn.Sequential(first, second)``, sharing the parameters.

        A fused activation becomes a third module.
        """
        after = [] if self.activation == "none" else [MODULES[self.activation]()]
        return nn.Sequential(self.first, self.second, *after)

    @property
    def weight(self) -> Tensor:
        """Dense weight, the product of the factors, formed when it is used; its dtype, device and shape are not."""
        # A compiler drops a product of which only the dtype is read, and has no use for a class of tensors of its own;
        # torch.jit.trace records reads of the shape, and under torch.fx the factors are proxies.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(self.first.weight, Tensor)
        return self.product() if traced else FactoredWeight(self)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    @property
    @abstractmethod
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: ``[O, C/G, *K]``, of a transposed convolution ``[C, O/G, *K]``."""

    @abstractmethod
    def product(self) -> Tensor:
        """Dense weight: the folded ``U V``, in the dtype of the factors, differentiable."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in ("weight", "bias"):  # torch would say that the attribute exists already
            raise TypeError(f"{name} of a low-rank layer: wanted reads only, it is that of its factors; got an "
                            "assignment: set first.weight, second.weight or second.bias")  # fmt: skip
        super().register_parameter(name, param)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        return self if mode else self._pack()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        return self if self.training else self._pack()

    def __prepare_scriptable__(self):
        """Called by ``torch.jit.script``, which writes what this returns into the user's model."""
        raise TypeError(f"torch.jit.script: wanted layers of torch; got {type(self).__name__}: "
                        "script ck.to_plain(model), or trace or export the model as it is")  # fmt: skip

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None, "_packed_from": None, "_choices": {}, "_prepacked": {}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"_choices": {}, "_prepacked": {}} | state)
        if not self.training:
            self._pack()

    def _pack(self):
        """Pack the factors for the CPU kernel, if it takes them; what is prepacked in other layouts is forgotten."""
        self._packed = self._packed_from = None
        self._choices, self._prepacked = {}, {}
        if type(self.first) is not self.dense or type(self.second) is not self.dense:
            return self  # a replaced factor may have no weight
        V, U = self.first.weight, self.second.weight
        if V.is_cpu and V.dtype == torch.float32 and type(V) is nn.Parameter and not self._why_not_geometry():
            self._packed, self._packed_from = lowrank_pack(V.detach(), U.detach(), self.groups), _factor_versions(V, U)
        return self

    def _packed_now(self, V: Tensor, U: Tensor) -> Tensor | None:
        # A compiled graph uses the last packed weights; the kernel repacks them if they have changed since.
        if not torch.compiler.is_compiling() and self._packed_from != _factor_versions(V, U):
            self._pack()
        return self._packed

    def _prepacked_now(self, way: str, V: Tensor, U: Tensor) -> list[Tensor]:
        """The factors or their product in oneDNN's layout, made anew if the factors have changed since."""
        packed, made_from = self._prepacked.get(way, (None, None))
        if packed is None or not _unchanged(made_from, V, U):
            with torch.inference_mode(False), torch.no_grad(), without_autocast():
                packed = lowrank_ways.pack(
                    way, V.detach(), U.detach(), self._geometry(), lambda: self.product().detach()
                )
            self._prepacked[way] = packed, _state(V, U)
        return packed

    def _copy_from(self, layer: nn.Module, U: Tensor, V: Tensor) -> LowRank:
        """Set the weights from U ``[G, m, r]`` and V ``[G, r, n]``, bias and mode from the dense ``layer``."""
        with torch.no_grad():
            for factor, weight in zip((self.first, self.second), self._unfolded(U, V), strict=True):
                factor.weight.copy_(weight)
            if layer.bias is not None:
                self.second.bias.copy_(layer.bias)
        copy_requires_grad(layer, self)
        return self.train(layer.training)

    def _copy_to(self, layer: nn.Module) -> nn.Module:
        """Set the dense ``layer`` to the product of the factors, and to the bias and mode of this layer."""
        with torch.no_grad(), without_autocast():
            layer.weight.copy_(self.product())
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        copy_requires_grad(self, layer)
        return layer.train(self.training)

    def _extra(self) -> str:
        """Rank, number of weights, fused activation, and the ways that were measured to be the fastest."""
        parameters, dense = self.first.weight.numel() + self.second.weight.numel(), math.prod(self.dense_shape)
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        ways = " | ".join(dict.fromkeys(choice.way for choice in self._choices.values()))
        measured = f", measured fastest: {ways}" if ways else ""
        return f"rank={self.rank}, weights={parameters:,} of {dense:,} ({parameters / dense:.0%}){fused}{measured}"

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Factors U ``[G, m, r]`` and V ``[G, r, n]`` of the best approximation of a folded dense weight."""
        return factors(to_matrix(oriented(weight, self.dense, self.groups), self.fold, self.groups), self.rank)

    @abstractmethod
    def _unfolded(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """``first.weight`` and ``second.weight`` from U ``[G, m, r]`` and V ``[G, r, n]`` of the folded weight."""


def _factor_versions(V: Tensor, U: Tensor) -> tuple[int, ...]:
    """Version of the factors: differs after a factor was replaced or modified in place."""
    if V.is_inference() or U.is_inference():  # these have no version counter; samples are compared
        return V.data_ptr(), U.data_ptr()
    return V.data_ptr(), U.data_ptr(), V._version, U._version


def _state(V: Tensor, U: Tensor) -> tuple:
    """State of the factors: their versions, and samples that show a write through ``.data``."""
    views = [_sample(W.detach()) for W in (V, U)]
    return _factor_versions(V, U), [(view, view.clone()) for view in views]


def _sample(W: Tensor) -> Tensor:
    """View of some numbers of W; of all, if it has gaps."""
    if not torch.ops.aten.is_non_overlapping_and_dense(W):
        return W
    return W.as_strided((min(SAMPLES, W.numel()),), (max(1, W.numel() // SAMPLES),))


def _unchanged(state: tuple, V: Tensor, U: Tensor) -> bool:
    versions, samples = state
    return versions == _factor_versions(V, U) and all(torch.equal(now, then) for now, then in samples)


def _is_static(x: Tensor) -> bool:
    """Whether a compiler knows the shape of x as numbers."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(has_static_value(size) for size in x.shape)


def _convert_state_dict(module: LowRank, state: dict, prefix: str, *_) -> None:
    """Pre-hook: accept state dicts of ``to_sequential()`` (renamed) and of the dense layer (factorized by SVD)."""
    for old, new in (("0.weight", "first.weight"), ("1.weight", "second.weight"), ("1.bias", "second.bias"),
                     ("bias", "second.bias")):  # fmt: skip
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)
    if prefix + "weight" in state:
        first, second = module._unfolded(*module._factors(state.pop(prefix + "weight")))
        state[prefix + "first.weight"], state[prefix + "second.weight"] = first, second


def _pack_after_load(module: LowRank, _) -> None:
    """Post-hook: repack the loaded weights of a layer in eval mode."""
    if not module.training:
        module._pack()


LowRank.own_hooks = (_convert_state_dict, _pack_after_load)
