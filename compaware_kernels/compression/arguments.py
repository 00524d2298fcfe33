"""Argument parsing shared by compress, allocate, fuse and export_lora: rank rules and example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from ..nn.discovery import require_matches

__all__ = ["RankRule", "inputs_tuple", "rank_of", "rule_of", "rules_by_pattern"]

RankRule = Callable[[Tensor], int]  # singular values [G, k] -> rank


def inputs_tuple(example_inputs: Sequence[object]) -> tuple:
    """Positional model inputs as a tuple.  Raises TypeError for a tensor: ``tuple(x)`` would split its batch axis."""
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs: wanted a tuple of the model's inputs, (x,); got a tensor")
    return tuple(example_inputs)


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
