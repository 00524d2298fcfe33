"""Foldable layers of a model (Linear, convolutions, transposed convolutions): finding, reading and writing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._utils.dtypes import DTYPES
from ..folds import CONVS, TRANSPOSED, oriented, to_matrix
from . import parametrization
from .holders import kind_of, why_read_or_overridden
from .module_surgery import short_name
from .unwrap import name_without_wrappers, wrapped_module

__all__ = ["Layer", "foldable_layers", "require_matches", "why_no_matrix"]


@dataclass(frozen=True)
class Layer:
    """A foldable layer: its qualified name in the model, and the module that owns the ``weight``."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """``module.weight``: a parameter, or a tensor that a parametrization computes from parameters."""
        return self.module.weight

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight itself, or the originals of its parametrization: the parameters that an optimizer updates."""
        return list(self.parametrizations.parameters(recurse=False)) if self.is_parametrized else [self.weight]

    @property
    def is_parametrized(self) -> bool:
        """Whether ``torch.nn.utils.parametrize`` computes the weight."""
        return parametrize.is_parametrized(self.module, "weight")

    @property
    def parametrizations(self) -> parametrize.ParametrizationList:
        """The parametrizations of a parametrized layer's weight, with their originals."""
        return self.module.parametrizations["weight"]

    @property
    def groups(self) -> int:
        """Groups G of a convolution; 1 for a Linear."""
        return getattr(self.module, "groups", 1)

    @property
    def rows(self) -> Tensor:
        """The weight with the output axis first, ``[O, C/G, *K]``: one row per neuron."""
        return oriented(self.weight, type(self.module), self.groups)

    @torch.no_grad()
    def set_rows(self, W: Tensor) -> None:
        """Write a weight ``[O, C/G, *K]`` (see :attr:`rows`) into the layer, in place.

        Raises:
            ValueError: the layer's parametrization cannot represent the weight (:func:`.parametrization.assign`).
        """
        W = oriented(W, type(self.module), self.groups)
        if not self.is_parametrized:
            self.weight.copy_(W)
            return
        try:
            parametrization.assign(self.parametrizations, W)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def matrix(self, fold: str = "paper") -> Tensor:
        """The weight folded to one matrix per group, ``[G, m, n]``; see :func:`compaware_kernels.folds.to_matrix`."""
        return to_matrix(self.rows, fold, self.groups)


def foldable_layers(
    model: nn.Module, skip: Sequence[str] = (), *, training: bool = False
) -> tuple[list[Layer], dict[str, str]]:
    """Foldable layers of ``model``, and the reason for every other layer that owns a weight of two or more axes.

    Args:
        skip: name patterns (``fnmatch``: ``"head"``, ``"layer4.*"``) of layers to leave alone.
        training: for training: include parametrized weights that can be written (:mod:`.parametrization`), leave out
            layers that can never become two factors (:func:`.holders.why_read_or_overridden`), and drop from the names
            the parts that torch.compile and activation checkpointing add.

    Returns:
        the layers, and for all others a mapping from name to reason: not foldable, skipped by name, or a weight that
        an earlier layer shares.

    Raises:
        ValueError: a pattern of ``skip`` matches no layer.
    """
    layers, skipped = [], {}
    modules = [(name_without_wrappers(name) if training else name, module) for name, module in _weighted_modules(model)]
    by_name = {name for name, _ in modules if any(fnmatchcase(name, pattern) for pattern in skip)}
    owners = {id(p): name for name, module in modules if name in by_name for p in _own_parameters(module)}
    fixed = why_read_or_overridden(model) if training else {}
    for name, module in modules:
        reason, layer = "skipped by name" if name in by_name else _not_foldable(module, training), Layer(name, module)
        reason = reason or fixed.get(id(module))
        if reason is None:
            owner = owners.setdefault(id(layer.parameters[0]), name)
            reason = None if owner == name else f"shares its weight with {owner}"
        if reason is None:
            layers.append(layer)
        else:
            skipped[name] = reason
    require_matches(skip, [layer.name for layer in layers] + list(skipped), "skip")
    return layers, skipped


def require_matches(patterns: Sequence[str], names: Sequence[str], what: str) -> None:
    """Check that every ``fnmatch`` pattern matches a name.

    Raises:
        ValueError: one does not; ``what`` names the argument.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{what}: the pattern {pattern!r} matches no layer; layers: {', '.join(names) or 'none'}")


def _weighted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module that owns a parameter of two or more axes; originals count for their module."""
    for name, module in model.named_modules():
        inside = isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f".{name}."
        if inside or wrapped_module(module) is not None:
            continue
        own = [p for p in module.parameters(recurse=False) if p.ndim >= 2 or nn.parameter.is_lazy(p)]
        if own or parametrize.is_parametrized(module):
            yield name, module


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of the module itself, and the originals of its parametrized ones."""
    lists = module.parametrizations.values() if parametrize.is_parametrized(module) else ()
    return [p for part in (module, *lists) for p in part.parameters(recurse=False)]


def _not_foldable(module: nn.Module, training: bool) -> str | None:
    """Why the module's weight does not fold to matrices, or None."""
    kind = short_name(type(module))
    parametrized = list(module.parametrizations) if parametrize.is_parametrized(module) else []
    if parametrized and not (training and parametrized == ["weight"]):
        return f"{kind}: parametrized ({', '.join(parametrized)}); remove the parametrization first"
    if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
        return f"{kind}: not initialized yet; run the model once first"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind}: scripted or traced; compress the model first, script it afterwards"
    if not isinstance(module, (nn.Linear, *CONVS, *TRANSPOSED)):
        return f"{kind}: only Linear and (transposed) convolutions fold to matrices"
    if not parametrized and not isinstance(module.weight, nn.Parameter):
        return (
            f"{kind}: its weight is no parameter, but made by a hook; torch.nn.utils.parametrizations can be written to"
        )
    by = module.parametrizations["weight"] if parametrized else None
    for stored in [module.weight] if by is None else by.parameters(recurse=False):  # to compute a weight may change it
        if why := why_no_matrix(stored):
            return f"{kind}: {why}"
    return parametrization.why_not_writable(by) if parametrized else None


def why_no_matrix(weight: Tensor) -> str:
    """Why no singular values of a weight can be computed here: its dtype, layout or device; "" if they can be."""
    if weight.is_meta:
        return "its weight is on the meta device, without values; load the weights first"
    if weight.layout is not torch.strided or weight.is_nested:
        return f"its weight is {'nested' if weight.is_nested else str(weight.layout).removeprefix('torch.')}, not dense"
    if weight.dtype not in DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; only real floating-point weights factorize"
    if is_traceable_wrapper_subclass(weight) and not hasattr(weight, "placements"):  # a DTensor has placements
        return f"its weight is a {kind_of(type(weight))}, not a plain tensor"
    return "" if weight.numel() else f"its weight {list(weight.shape)} is empty"
