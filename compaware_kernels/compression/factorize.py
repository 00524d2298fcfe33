"""Layers of a model that become low-rank layers: rank, fold and speed-up of each, and the layers themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from .. import ranks as rank_rules
from .._utils.memory import distinct
from .._utils.parallel import in_parallel
from ..nn.discovery import Layer
from ..nn.module_surgery import replace
from ..nn.registry import low_rank_type
from ..nn.truncation import Truncation, work
from . import latency_model
from .arguments import Inputs, RankRule, rank_of, rule_of
from .calibration import Calibration, WeightedSVD

__all__ = ["Factorizer", "note", "size"]

EIGHT = 8  # ranks are rounded up to multiples of it where speed counts: this costs no time


class _Choice(NamedTuple):
    """What a layer becomes: the truncation of the folded weight to this rank."""

    name: str
    fold: str
    rank: int
    truncation: Truncation | WeightedSVD


@dataclass(frozen=True)
class Factorizer:
    """Factorization of the layers of a model by rank rules; given ``inputs``, only where it makes them faster."""

    rules: Mapping[str, RankRule]  # by name pattern
    fixed: Mapping[str, str]  # layers that stay dense -> why
    folds: Sequence[str]
    inputs: Inputs | None = None
    measure: bool = False
    calibration: Calibration | None = None
    progress: bool | None = None

    def run(
        self, model: nn.Module, names: Sequence[str], notes: dict[str, str]
    ) -> tuple[nn.Module, dict[str, float | None]]:
        """Replace layers of ``model`` by low-rank ones.

        Returns the model and the speed-up of each replaced layer (None without inputs); ``notes`` gets the reasons.
        """
        seen = {} if self.inputs is None else latency_model.record(model, names, self.inputs)
        why = {name: self._why_dense(name, model.get_submodule(name), seen) for name in names}
        for name in names:
            if why[name]:
                note(notes, name, why[name])
        gains, choices = {}, []
        for name, (reason, candidates) in self._ranked(model, [name for name in names if not why[name]]).items():
            choice, gain = None, None
            if candidates:
                choice, gain, reason = self._choose(model.get_submodule(name), candidates, seen.get(name))
            if reason:
                note(notes, name, reason)
            if choice:
                gains[name] = gain
                choices.append(choice)
        return self._replaced(model, choices), gains

    def _why_dense(self, name: str, dense: nn.Module, seen: Mapping[str, tuple[Tensor, Tensor]]) -> str:
        """Why a layer stays dense whatever its singular values; "" if they decide."""
        if rule_of(self.rules, name) is None:
            return "no rank rule matches its name"
        if name in self.fixed or self.inputs is None:
            return self.fixed.get(name, "")
        if name not in seen:
            return "the example inputs do not reach it"
        return "" if self.measure else _never_faster(dense, self.folds, *seen[name])

    def _ranked(self, model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, list[_Choice]]]:
        """For each layer the candidates, one per fold with a matrix of its own, or the reason why there is none."""
        parts = [(name, fold, M) for name in names for fold, M in self._matrices(name, model.get_submodule(name))]
        truncations = [
            (name, fold, self.calibration.svd(name, fold, M) if self.calibration else Truncation(M))
            for name, fold, M in parts
        ]
        ranks = in_parallel(self._rank, truncations, lambda part: work(part[2].M), "ranks", self.progress)
        found: dict[str, tuple[str, list[_Choice]]] = {name: ("", []) for name in names}
        for (name, fold, truncation), rank in zip(truncations, ranks, strict=True):
            m, n = truncation.M.shape[-2:]
            if rank is None:
                rank = rank_of(name, rule_of(self.rules, name), truncation.s)
            rank, limit = max(rank, 1), rank_rules.break_even(m, n)
            eights = -(-rank // EIGHT) * EIGHT
            if rank <= limit:
                rank = eights if self.inputs is not None and eights <= limit else rank
                found[name][1].append(_Choice(name, fold, rank, truncation))
            else:
                reason = f"rank {rank} of a {m} x {n} matrix is not smaller (break-even: {limit})"
                found[name] = (reason, found[name][1])
        return {name: ("" if candidates else reason, candidates) for name, (reason, candidates) in found.items()}

    def _matrices(self, name: str, dense: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """(fold, matrix ``[G, m, n]``); folds of the same matrix count once, such as all of a 1 x 1 kernel."""
        matrices = {}
        for fold in self.folds:
            M = Layer(name, dense).matrix(fold)
            matrices.setdefault(M.shape, (fold, M))
        return matrices.values()

    def _rank(self, part: tuple[str, str, Truncation | WeightedSVD]) -> int | None:
        """The rank by a rule of :mod:`compaware_kernels.ranks`; None for a function of the user's."""
        rule = rule_of(self.rules, part[0])
        return part[2].rank(rule) if isinstance(rule, rank_rules.Rule) else None

    def _choose(
        self, dense: nn.Module, candidates: Sequence[_Choice], io: tuple[Tensor, Tensor] | None
    ) -> tuple[_Choice | None, float | None, str]:
        """The smallest candidate, or the fastest; its speed-up, and a reason."""
        if io is None:
            like = low_rank_type(dense).like
            return min(candidates, key=lambda c: len(candidates) > 1 and size(like(dense, c.rank, c.fold))), None, ""
        pairs = [(choice.fold, choice.rank) for choice in candidates]
        best, gain, reason = latency_model.choose(dense, pairs, *io, self.measure)
        return (None if best is None else candidates[pairs.index(best)]), gain, reason

    def _replaced(self, model: nn.Module, choices: Sequence[_Choice]) -> nn.Module:
        """The model with the chosen layers replaced."""

        def factors(choice: _Choice) -> tuple[Tensor, Tensor]:
            return choice.truncation.factors(choice.rank, choice.truncation.M.dtype)

        found = in_parallel(factors, choices, lambda choice: work(choice.truncation.M), "factors", self.progress)
        for (name, fold, rank, _), (U, V) in zip(choices, found, strict=True):
            dense = model.get_submodule(name)
            model = replace(model, name, low_rank_type(dense).from_factors(dense, rank, fold, U, V))
        return model


def note(notes: dict[str, str], name: str, text: str) -> None:
    """Add a text to the notes of a layer."""
    notes[name] = f"{notes[name]}; {text}" if name in notes else text


def size(module: nn.Module) -> tuple[int, int]:
    """Number of parameters and of their bytes; shared memory counts once."""
    parameters = distinct(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _never_faster(dense: nn.Module, folds: Sequence[str], x: Tensor, y: Tensor) -> str:
    """Why no rank is predicted to make a layer with this input and output faster, so that it needs no SVD; else ""."""
    limits = {fold: rank_rules.break_even(*Layer("", dense).matrix(fold).shape[-2:]) for fold in folds}
    least = [(fold, EIGHT if limit >= EIGHT else 1) for fold, limit in limits.items()]
    choice, _, reason = latency_model.choose(dense, least, x, y, measured=False)
    return "" if choice else f"even {reason}"
