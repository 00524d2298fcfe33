"""Layers of a model that ProximalStep shrinks, with their strengths; found again when modules are replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..nn.discovery import Layer, foldable_layers, require_matches
from ..nn.unwrap import name_without_wrappers
from .penalties import PENALTIES

__all__ = ["LayerFinder", "Strength"]

Strength = float | Mapping[str, float]


class LayerFinder:
    """Finds the layers of a model and the strengths of their penalties.

    Args:
        skip: name patterns of layers not to shrink.
        strengths: penalty -> strength, one number or numbers by layer name pattern.
    """

    def __init__(self, model: nn.Module, skip: Sequence[str], strengths: Mapping[str, Strength]):
        self.model, self.skip, self.strengths = model, tuple(skip), dict(strengths)
        self._modules: list[nn.Module] = []

    def check_order(self, order: Sequence[str]) -> None:
        """Raise ValueError for an unknown or repeated penalty, or one that has a strength and is missing."""
        if len(set(order)) != len(order) or not set(order) <= set(PENALTIES):
            raise ValueError(f"order: wanted some of {', '.join(PENALTIES)}, each at most once; got {tuple(order)}")
        for penalty, spec in self.strengths.items():
            if penalty not in order and (any(spec.values()) if isinstance(spec, Mapping) else spec):
                raise ValueError(f"order: wanted {penalty} in it, which has a strength; got {tuple(order)}")

    def is_current(self) -> bool:
        """Whether the model has the same modules as at the last :meth:`find`."""
        modules = list(self.model.modules())
        return len(modules) == len(self._modules) and all(map(lambda m, n: m is n, modules, self._modules))

    def find(self) -> tuple[list[Layer], dict[str, str], dict[str, dict[str, float]]]:
        """Layers; name -> reason for others that have weights; layer -> penalty -> strength.

        Raises:
            ValueError: a strength that is negative or not finite; the first time also a pattern that matches no layer.
        """
        first, self._modules = not self._modules, list(self.model.modules())
        present = [name_without_wrappers(name) for name, _ in self.model.named_modules()]
        skip = [pattern for pattern in self.skip if first or any(fnmatchcase(name, pattern) for name in present)]
        layers, skipped = foldable_layers(self.model, skip, training=True)
        names = [layer.name for layer in layers]
        strengths = {
            name: {penalty: _strength(spec, name, penalty) for penalty, spec in self.strengths.items()}
            for name in names
        }
        for penalty, spec in self.strengths.items() if first else ():
            require_matches(list(spec) if isinstance(spec, Mapping) else [], names, penalty)
        return layers, skipped, strengths


def _strength(spec: Strength, name: str, penalty: str) -> float:
    """Strength of a penalty for one layer: the number, or that of the first matching name pattern, else 0."""
    value = (
        next((v for pattern, v in spec.items() if fnmatchcase(name, pattern)), 0.0)
        if isinstance(spec, Mapping)
        else spec
    )
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{penalty}: wanted a finite strength >= 0; got {value!r} for {name}")
    return float(value)
