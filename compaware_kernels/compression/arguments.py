"""What the functions of this room take alike: rank rules, by layer or for all, and example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from ..nn.discovery import require_matches

__all__ = ["RankRule", "inputs_tuple", "rank_of", "rule_of", "rules_by_pattern"]

RankRule = Callable[[Tensor], int]  # singular values [G, k] -> a rank


def inputs_tuple(example_inputs: Sequence[object]) -> tuple:
    """Positional inputs of a model as a tuple.  Raises TypeError for a tensor, whose batch axis a tuple would split."""
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs: wanted a tuple of the model's inputs, (x,); got a tensor")
    return tuple(example_inputs)


def rules_by_pattern(ranks: RankRule | Mapping[str, RankRule] | None, names: Sequence[str]) -> dict[str, RankRule]:
    """Rules by layer name pattern: one rule is that of all layers, none that of no layer.

    Raises:
        ValueError: a pattern matches none of the layers' ``names``.
    """
    rules = dict(ranks) if isinstance(ranks, Mapping) else {} if ranks is None else {"*": ranks}
    require_matches(list(rules), names, "ranks")
    return rules


def rule_of(rules: Mapping[str, RankRule], name: str) -> RankRule | None:
    """The rule of the first pattern that matches the layer's name; None if none does."""
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def rank_of(name: str, rule: RankRule, s: Tensor) -> int:
    """The rank that the rule gives for singular values ``s`` ``[G, k]``.  Raises ValueError unless it is whole."""
    rank = rule(s)
    if not isinstance(rank, int) or rank < 0:
        raise ValueError(f"{name}: the rank rule must return a whole number >= 0; got {rank!r}")
    return rank
