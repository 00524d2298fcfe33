"""Base class of low-rank layers: two factors, fused forward, weight packing, loading of dense checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .._utils.autocast import without_autocast
from ..folds import oriented, to_matrix
from ..ops import backends
from ..ops.lowrank import ACTIVATIONS, lowrank_pack
from ..ops.transforms import is_transformed
from .factored_weight import FactoredWeight
from .module_surgery import copy_requires_grad, is_plain
from .truncation import factors

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

__all__ = ["FACTORS", "MODULES", "LowRank"]

FACTORS = ("first", "second")  # names of the submodules
MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}  # fused activation -> module


class LowRank(nn.Module, ABC):
    """Low-rank layer ``y = act(second(first(x)) + residual)``, by one fused kernel if one takes the arguments.

    The activation is ``none`` until :func:`compaware_kernels.fuse` fuses the one that follows the layer. ``in_place``
    permits writing y over the residual. The kernels read ``first.weight`` and ``second.weight``; for the CPU kernel
    they are packed once, and again after a change, which doubles the memory of the weights.

    It has the attributes of the dense layer, for those who read them: sizes and geometry, ``bias``, and a read-only
    ``weight``, the product of the factors (:class:`.factored_weight.FactoredWeight`).
    """

    __jit_unused_properties__: ClassVar = ["weight"]
    # What a layer that replaces this one does not take over from it.
    own_attributes: ClassVar = ("rank", "fold", "activation", "_packed", "_packed_from")
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

    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(_convert_state_dict, with_module=True)
        self.register_load_state_dict_post_hook(_pack_after_load)

    def forward(self, input: Tensor, residual: Tensor | None = None, in_place: bool = False) -> Tensor:
        reason = self.why_two_step(input)
        first, second = self._modules["first"], self._modules["second"]  # several times as fast as attribute access
        if not reason:
            V, of_second = first._parameters["weight"], second._parameters
            return self._in_one(input, V, of_second["weight"], of_second["bias"], residual, in_place)
        if not torch.compiler.is_compiling():
            backends.log_once(type(self).__name__, backends.TWO_STEPS, reason)
        y = second(first(input))
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)

    def why_two_step(self, x: Tensor) -> str:
        """Why ``forward`` runs the factors one after the other on this input; "" if one fused kernel runs both."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or not isinstance(x, Tensor):
            return "traced or exported: standard ops only"
        if x.is_nested:
            return "a nested tensor"
        first, second = self._modules["first"], self._modules["second"]
        if type(first) is not self.dense or type(second) is not self.dense:
            return "a factor is no plain layer"
        if not (is_plain(first) and is_plain(second)):
            return "a factor has hooks or a forward of its own"
        if reason := self._why_not_geometry():
            return reason
        V, U = first._parameters["weight"], second._parameters["weight"]
        if torch.is_grad_enabled() and (x.requires_grad or V.requires_grad or U.requires_grad):
            return "gradients are wanted, for which two steps keep the intermediate"
        if is_transformed():
            return "under transforms of torch.func and in forward mode"
        if V.ndim == 4 and x.ndim != 4:
            return "no batch axis"
        backend, reason = backends.choose(self.op, x.device, x, V, U, self.groups, self.fold)
        return (reason or f"no kernel for {x.device.type}") if backend is backends.PLAIN else ""

    def _why_not_geometry(self) -> str:
        """Why the geometry (padding, dimension) rules out the fused kernel; "" if it does not."""
        return ""

    def _in_one(self, x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, in_place: bool):
        """Both factors by the fused op.  Called only if :meth:`why_two_step` gives no reason against it."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel, and why_two_step did not say so")

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
        return {**self.__dict__, "_packed": None, "_packed_from": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not self.training:
            self._pack()

    def _pack(self):
        """Pack the factors for the CPU kernel, if it takes them."""
        self._packed = self._packed_from = None
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
        """Rank, number of weights and fused activation, for ``extra_repr``."""
        parameters, dense = self.first.weight.numel() + self.second.weight.numel(), math.prod(self.dense_shape)
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return f"rank={self.rank}, weights={parameters:,} of {dense:,} ({parameters / dense:.0%}){fused}"

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Factors U ``[G, m, r]`` and V ``[G, r, n]`` of the best approximation of a folded dense weight."""
        return factors(to_matrix(oriented(weight, self.dense, self.groups), self.fold, self.groups), self.rank)

    @abstractmethod
    def _unfolded(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """``first.weight`` and ``second.weight`` from U ``[G, m, r]`` and V ``[G, r, n]`` of the folded weight."""


def _factor_versions(V: Tensor, U: Tensor) -> tuple[int, ...]:
    """Version of the factors: differs after a factor was replaced or modified in place."""
    try:
        return V.data_ptr(), U.data_ptr(), V._version, U._version
    except RuntimeError:  # inference tensors have no version counter; the kernel compares samples
        return V.data_ptr(), U.data_ptr()


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
