"""Foldable layers of a model (Linear, convolutions, transposed convolutions): finding, reading and writing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..folds import CONVS, TRANSPOSED, oriented, to_matrix
from . import parametrization
from .unwrap import name_without_wrappers, wrapped_module

__all__ = ["Layer", "foldable_layers", "require_matches"]


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
        training: for training: include parametrized weights that can be written (:mod:`.parametrization`), and drop
            from the names the parts that torch.compile and activation checkpointing add.

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
    for name, module in modules:
        reason, layer = "skipped by name" if name in by_name else _not_foldable(module, training), Layer(name, module)
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
    kind = type(module).__name__
    parametrized = list(module.parametrizations) if parametrize.is_parametrized(module) else []
    if parametrized and not (training and parametrized == ["weight"]):
        return f"{kind}: parametrized ({', '.join(parametrized)}); remove the parametrization first"
    if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
        return f"{kind}: not initialized yet; run the model once first"
    if not isinstance(module, (nn.Linear, *CONVS, *TRANSPOSED)):
        return f"{kind}: only Linear and (transposed) convolutions fold to matrices"
    if parametrize.is_parametrized(module, "weight"):
        return parametrization.why_not_writable(module.parametrizations["weight"])
    if not isinstance(module.weight, nn.Parameter):
        return (
            f"{kind}: its weight is no parameter, but made by a hook; torch.nn.utils.parametrizations can be written to"
        )
    return None
