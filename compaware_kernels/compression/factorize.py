"""Layers of a model that become low-rank layers: rank, fold and speed-up of each, and the layers themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
from .arguments import RankRule, rank_of, rule_of
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
    """Factorization of the layers of a model by rank rules.

    Attributes:
        rules: by name pattern.  fixed: reasons by name of the layers that stay dense.
        faster_on: inputs and outputs of the layers, to factorize only those that become faster; None: all.
        measure: measure times instead of predicting them.
    """

    rules: Mapping[str, RankRule]
    fixed: Mapping[str, str]
    folds: Sequence[str]
    faster_on: Mapping[str, tuple[Tensor, Tensor]] | None = None
    measure: bool = False
    calibration: Calibration | None = None
    progress: bool | None = None
    predictions: dict[tuple, tuple] = field(default_factory=dict, init=False)

    def run(
        self, model: nn.Module, names: Sequence[str], notes: dict[str, str]
    ) -> tuple[nn.Module, dict[str, float | None]]:
        """Replace layers of ``model`` by low-rank ones.

        Returns the model and the speed-up of each replaced layer (None if it is not asked for); ``notes`` gets the
        reasons.
        """
        why = {name: self._why_dense(name, model.get_submodule(name)) for name in names}
        for name in names:
            if why[name]:
                note(notes, name, why[name])
        gains, choices = {}, []
        for name, (reason, candidates) in self._ranked(model, [name for name in names if not why[name]]).items():
            choice, gain = None, None
            if candidates:
                choice, gain, reason = self._choose(name, model.get_submodule(name), candidates)
            if reason:
                note(notes, name, reason)
            if choice:
                gains[name] = gain
                choices.append(choice)
        return self._replaced(model, choices), gains

    def _why_dense(self, name: str, dense: nn.Module) -> str:
        """Why a layer stays dense whatever its singular values; "" if they decide."""
        if rule_of(self.rules, name) is None:
            return "no rank rule matches its name"
        if name in self.fixed or self.faster_on is None:
            return self.fixed.get(name, "")
        if name not in self.faster_on:
            return "the example inputs do not reach it"
        return "" if self.measure else self._never_faster(name, dense)

    def _never_faster(self, name: str, dense: nn.Module) -> str:
        """Why no rank is predicted to make a layer faster, so that it needs no singular values; else ""."""
        limits = {fold: rank_rules.break_even(*Layer("", dense).matrix(fold).shape[-2:]) for fold in self.folds}
        least = [(fold, EIGHT if limit >= EIGHT else 1) for fold, limit in limits.items()]
        choice, _, reason = self._fastest(name, dense, least)
        return "" if choice else f"even {reason}"

    def _ranked(self, model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, list[_Choice]]]:
        """For each layer the candidates, one per fold with a matrix of its own, or the reason why there is none."""
        parts = [(name, fold, M) for name in names for fold, M in self._matrices(name, model.get_submodule(name))]
        ranked = in_parallel(self._rank, parts, lambda part: work(part[2]), "ranks", self.progress)
        found: dict[str, tuple[str, list[_Choice]]] = {name: ("", []) for name in names}
        for (name, fold, _), (truncation, rank) in zip(parts, ranked, strict=True):
            m, n = truncation.M.shape[-2:]
            if rank is None:
                rank = rank_of(name, rule_of(self.rules, name), truncation.s)
            rank, limit = max(rank, 1), rank_rules.break_even(m, n)
            eights = -(-rank // EIGHT) * EIGHT
            if rank <= limit:
                rank = eights if self.faster_on is not None and eights <= limit else rank
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

    def _truncation(self, name: str, fold: str, M: Tensor) -> Truncation | WeightedSVD:
        """Truncated SVD of M ``[G, m, n]`` in the metric of the layer's inputs, if there are any."""
        return self.calibration.svd(name, fold, M) if self.calibration else Truncation(M, vectors=not self.faster_on)

    def _rank(self, part: tuple[str, str, Tensor]) -> tuple[Truncation | WeightedSVD, int | None]:
        """The truncation, and the rank by a rule of :mod:`compaware_kernels.ranks`; None for a function of the user."""
        truncation, rule = self._truncation(*part), rule_of(self.rules, part[0])
        return truncation, truncation.rank(rule) if isinstance(rule, rank_rules.Rule) else None

    def _choose(
        self, name: str, dense: nn.Module, candidates: Sequence[_Choice]
    ) -> tuple[_Choice | None, float | None, str]:
        """The smallest candidate, or the fastest; its speed-up, and a reason."""
        if self.faster_on is None:
            like = low_rank_type(dense).like
            return min(candidates, key=lambda c: len(candidates) > 1 and size(like(dense, c.rank, c.fold))), None, ""
        pairs = [(choice.fold, choice.rank) for choice in candidates]
        best, gain, reason = self._fastest(name, dense, pairs)
        return (None if best is None else candidates[pairs.index(best)]), gain, reason

    def _fastest(self, name: str, dense: nn.Module, pairs: Sequence[tuple[str, int]]):
        """As :func:`.latency_model.choose`; layers of one kind that get inputs of one shape share a prediction."""
        x, y = self.faster_on[name]
        if self.measure or x.is_nested:
            return latency_model.choose(dense, pairs, x, y, self.measure)
        key = (repr(dense), dense.weight.dtype, x.dtype, x.device, x.shape, x.stride(), y.shape, *pairs)
        if key not in self.predictions:
            self.predictions[key] = latency_model.choose(dense, pairs, x, y, measured=False)
        return self.predictions[key]

    def _replaced(self, model: nn.Module, choices: Sequence[_Choice]) -> nn.Module:
        """The model with the chosen layers replaced."""

        def factors(choice: _Choice) -> tuple[Tensor, Tensor]:
            return choice.truncation.factors(choice.rank, choice.truncation.M.dtype)

        found = in_parallel(factors, choices, lambda choice: work(choice.truncation.M), "factorize", self.progress)
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
