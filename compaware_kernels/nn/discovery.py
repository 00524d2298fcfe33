"""The layers of a model whose weights fold to matrices: found, named, read and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..folds import CONVS, TRANSPOSED, oriented, to_matrix
from . import parametrization
from .unwrap import inner, plain_name


@dataclass(frozen=True)
class Layer:
    """A layer that folds: its name in the model, and the module with its ``weight``."""

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """``module.weight``: a parameter, or what a parametrization makes of some."""
        return self.module.weight

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer moves when it moves the weight."""
        return list(self.chain.parameters(recurse=False)) if self.is_parametrized else [self.weight]

    @property
    def is_parametrized(self) -> bool:
        return parametrize.is_parametrized(self.module, "weight")

    @property
    def chain(self) -> parametrize.ParametrizationList:
        """What makes the weight of a parametrized layer."""
        return self.module.parametrizations["weight"]

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def rows(self) -> Tensor:
        """The weight with outputs first: ``[O, ...]``, one neuron each."""
        return oriented(self.weight, type(self.module), self.groups)

    @torch.no_grad()
    def set_rows(self, W: Tensor) -> None:
        """Write what :attr:`rows` has into the weight.  Raises ValueError where a parametrization cannot hold it."""
        W = oriented(W, type(self.module), self.groups)
        if not self.is_parametrized:
            self.weight.copy_(W)
            return
        try:
            parametrization.assign(self.chain, W)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def matrix(self, fold: str = "paper") -> Tensor:
        """The folded weight ``[G, m, n]``."""
        return to_matrix(self.rows, fold, self.groups)


def foldable_layers(
    model: nn.Module, skip: Sequence[str] = (), *, training: bool = False
) -> tuple[list[Layer], dict[str, str]]:
    """The layers of ``model`` that fold to matrices, and every other layer with weights, with the reason it does not.

    Args:
        skip: name patterns (``fnmatch``: ``"head"``, ``"layer4.*"``) of layers to leave alone.
        training: as a trainer sees them: parametrized weights that can be written to fold, too, and names are without
            what compiled or checkpointed submodules add to them.

    Raises:
        ValueError: a pattern of ``skip`` matches no layer (most likely a typing error).
    """
    layers, skipped = [], {}
    modules = [(plain_name(name) if training else name, module) for name, module in _weighted_modules(model)]
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
    """Raise ValueError for the first pattern that matches none of the names."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{what}: the pattern {pattern!r} matches no layer; layers: {', '.join(names) or 'none'}")


def _weighted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own a parameter of two or more axes, each once, not looking inside parametrizations."""
    for name, module in model.named_modules():
        inside = isinstance(module, parametrize.ParametrizationList) or ".parametrizations." in f".{name}."
        if inside or inner(module) is not None:
            continue
        own = [p for p in module.parameters(recurse=False) if p.ndim >= 2 or nn.parameter.is_lazy(p)]
        if own or parametrize.is_parametrized(module):
            yield name, module


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of the module itself, and those that its own are computed from."""
    chains = module.parametrizations.values() if parametrize.is_parametrized(module) else ()
    return [p for part in (module, *chains) for p in part.parameters(recurse=False)]


def _not_foldable(module: nn.Module, training: bool) -> str | None:
    kind = type(module).__name__
    chains = list(module.parametrizations) if parametrize.is_parametrized(module) else []
    if chains and not (training and chains == ["weight"]):
        return f"{kind}: parametrized ({', '.join(chains)}); remove the parametrization first"
    if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
        return f"{kind}: not initialised yet; run the model once first"
    if not isinstance(module, (nn.Linear, *CONVS, *TRANSPOSED)):
        return f"{kind}: only Linear and (transposed) convolutions fold to matrices"
    if parametrize.is_parametrized(module, "weight"):
        return parametrization.why_not(module.parametrizations["weight"])
    if not isinstance(module.weight, nn.Parameter):
        return (
            f"{kind}: its weight is no parameter, but made by a hook; torch.nn.utils.parametrizations can be written to"
        )
    return None
