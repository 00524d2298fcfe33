"""Argument parsing shared by compress, allocate, fuse and export_lora: rank rules and example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..nn.discovery import require_matches

__all__ = ["ExampleInputs", "Inputs", "RankRule", "rank_of", "rule_of", "rules_by_pattern"]

ExampleInputs = Sequence[object] | Mapping[str, object]  # positional inputs of a model, or keyword arguments
RankRule = Callable[[Tensor], int]  # singular values [G, k] -> rank


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a model: positional ones and keywords."""

    args: tuple = ()
    kwargs: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: ExampleInputs | Inputs, example_kwargs: Mapping[str, object] | None = None) -> Inputs:
        """Arguments from a tuple of positional inputs, or a mapping of keywords; and from further keywords.

        Raises:
            TypeError: a tensor, because ``tuple(x)`` would split its batch axis; keywords that are no mapping from
                names, or given twice.
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        kwargs = _keywords({} if example_kwargs is None else example_kwargs, "example_kwargs")
        if isinstance(example_inputs, Mapping):
            given = _keywords(example_inputs, "example_inputs")
            if twice := ", ".join(sorted(given.keys() & kwargs.keys())):
                raise TypeError(f"example_kwargs: wanted other names than in example_inputs; got {twice} in both")
            return cls((), given | kwargs)
        if isinstance(example_inputs, (Tensor, str)) or not isinstance(example_inputs, Iterable):
            got = "a tensor" if isinstance(example_inputs, Tensor) else type(example_inputs).__name__
            raise TypeError(f"example_inputs: wanted a tuple of the model's inputs, (x,); got {got}")
        return cls(tuple(example_inputs), kwargs)

    def run(self, model: Callable[..., object]) -> object:
        """The model's output.

        Raises:
            ValueError: the model fails, and one of its weights, which is named, is on the meta device.
        """
        try:
            return model(*self.args, **self.kwargs)
        except Exception as error:
            weights = model.named_parameters() if isinstance(model, nn.Module) else ()
            name = next((name for name, weight in weights if weight.is_meta), None)
            if name is None:
                raise
            raise ValueError(f"{name}: wanted a weight with values; got one on the meta device") from error

    def cloned(self) -> Inputs:
        """The same arguments with clones of the tensors: a model may modify its inputs in place."""
        return Inputs(*tree_map_only(Tensor, Tensor.clone, (self.args, self.kwargs)))

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also in lists and mappings."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def device(self) -> torch.device:
        """Device of the first tensor; the CPU if there is none."""
        return next((tensor.device for tensor in self.tensors()), torch.device("cpu"))

    def bound(self, model: nn.Module) -> inspect.BoundArguments:
        """The arguments by the names of the parameters of ``model.forward``.  Raises TypeError if they do not fit."""
        return inspect.signature(model.forward).bind(*self.args, **self.kwargs)


def _keywords(given: object, what: str) -> dict[str, object]:
    """The keyword arguments ``given``.  Raises TypeError for anything but a mapping from names."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{what}: wanted a mapping from names of arguments; got {type(given).__name__}")
    return dict(given)


def rules_by_pattern(ranks: RankRule | Mapping[str, RankRule] | None, names: Sequence[str]) -> dict[str, RankRule]:
    """Rank rules by layer name pattern (fnmatch): a single rule applies to every layer, None to no layer.

    Raises:
        ValueError: a pattern matches none of the layers' ``names``; not if there are none, where nothing can match.
    """
    rules = dict(ranks) if isinstance(ranks, Mapping) else {} if ranks is None else {"*": ranks}
    require_matches(list(rules) if names else [], names, "ranks")
    return rules


def rule_of(rules: Mapping[str, RankRule], name: str) -> RankRule | None:
    """Rank rule of the first pattern that matches the layer's name; None if no pattern matches."""
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def rank_of(name: str, rule: RankRule, s: Tensor) -> int:
    """Rank that the rule returns for singular values ``s`` ``[G, k]``.  Raises ValueError unless it is an int >= 0."""
    rank = rule(s)
    if not isinstance(rank, int) or rank < 0:
        raise ValueError(f"{name}: the rank rule must return a whole number >= 0; got {rank!r}")
    return rank
