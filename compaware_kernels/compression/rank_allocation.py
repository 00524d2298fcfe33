"""A budget for a whole model -> a rank for every layer: :func:`allocate`."""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from glob import escape

import torch
from torch import Tensor, nn

from .. import ranks
from ..folds import row_axes
from ..nn.discovery import foldable_layers
from ..nn.factorization import singular_values
from ..nn.module_surgery import replace
from ..nn.registry import low_rank_type, why_dense
from ..nn.unwrap import without_wrappers
from ..ops.validation import check_finite
from .calibration import Calibration
from .macs import count_macs

__all__ = ["allocate"]


@dataclass(frozen=True)
class _Layer:
    """One layer's choices, the cheapest first; the last is to stay dense.

    Attributes:
        full: its full rank, which stands for dense.  costs: of each choice, ascending.  errors: squared Frobenius norm
            of what each choice cuts off, descending to 0.  norm: squared, of the whole.
    """

    name: str
    full: int
    costs: Tensor
    errors: Tensor
    norm: float

    def rank(self, choice: int) -> int:
        return self.full if choice == len(self.costs) - 1 else choice + 1


def allocate(
    model: nn.Module,
    budget: float,
    example_inputs: Sequence[object],
    *,
    of: str = "macs",
    by: str = "relative",
    fold: str = "paper",
    skip: Sequence[str] = (),
    calibration: Iterable[tuple] | None = None,
) -> dict[str, ranks.Rule]:
    """Ranks with which the model's layers together keep a budget: ``ck.compress(ranks=..., goal="size")``.

    For speed, :func:`compaware_kernels.compress` rounds ranks up and leaves layers dense: that keeps no budget.

    ``by`` says what is least under the budget, with ``e_l(r) = sum_{i > r} sigma_i^2`` what layer l loses at rank r:

    * ``relative``: ``sum_l e_l(r_l) / ||W_l||_F^2``
    * ``absolute``: ``sum_l e_l(r_l)``, the C step of Idelbayev & Carreira-Perpinan, CVPR 2020 ("LC")
    * ``equal``: ``max_l e_l(r_l) / ||W_l||_F^2``, all layers lose alike (Liebenwein et al., ALDS, NeurIPS 2021)
    * ``greedy``: ``relative``'s sum, one rank after another from 1 on: each time the one that gains most for its cost
      (which is the same, unless a layer may stay dense)
    * ``share``: nothing, every layer keeps the same share of its full rank; to compare with

    The sums are minimised through their Lagrangian ``e_l(r) + lambda cost_l(r)``, layer by layer, which is exact but
    for what is left of the budget; that is spent on whatever ranks gain most for it.

    Args:
        model, example_inputs, fold, skip, calibration: as for :func:`compaware_kernels.compress`, and for it to get,
            too; with calibration inputs, losses are those of the outputs.
        budget: share (0 to 1) of what the layers that can become two factors cost dense.
        of: ``macs``, multiply-adds on the example inputs, or ``params``.

    Returns:
        rules by layer name (special characters as fnmatch wants them); layers that are better off dense have their full
        rank.

    Raises:
        ValueError: unknown ``of``, ``by`` or fold; a budget that is no share, or smaller than what rank 1 everywhere
            needs (which is said); NaN or Inf in a weight or in what a layer reads while calibrating.
        TypeError: example_inputs or a batch of calibration inputs is a tensor instead of a tuple.
    """
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs: wanted a tuple of the model's inputs, (x,); got a tensor")
    row_axes(fold, 0)
    if of not in ("macs", "params") or by not in _WAYS:
        raise ValueError(f"wanted of=macs or params, by={' or '.join(_WAYS)}; got of={of!r}, by={by!r}")
    if not (isinstance(budget, (int, float)) and 0 < budget <= 1):
        raise ValueError(f"budget: wanted a share of the dense cost, above 0 and up to 1; got {budget!r}")
    layers = _layers(without_wrappers(model), tuple(example_inputs), of, fold, skip, calibration)
    dense, least = (sum(float(layer.costs[i]) for layer in layers) for i in (-1, 0))
    if budget * dense < least:
        raise ValueError(f"budget: rank 1 everywhere needs {least / dense:.4g} of the dense {of}; got {budget}")
    chosen = _WAYS[by](layers, budget * dense) if layers else []
    return {escape(layer.name): ranks.fixed(layer.rank(i)) for layer, i in zip(layers, chosen, strict=True)}


def _layers(
    model: nn.Module, inputs: tuple, of: str, fold: str, skip: Sequence[str], calibration: Iterable[tuple] | None
) -> list[_Layer]:
    """The layers that :func:`compress` may factorise, with their choices: ranks that need less of both, and dense."""
    found = [layer for layer in foldable_layers(model, skip)[0] if not why_dense(model, layer.name)]
    names, one = [layer.name for layer in found], copy.deepcopy(model).eval()
    for layer in found:
        check_finite(layer.weight, layer.name)
        one = replace(one, layer.name, low_rank_type(layer.module).like(layer.module, 1, fold))
    macs, one_macs = count_macs(model, inputs), count_macs(one, inputs)
    seen = None if calibration is None else Calibration(model, names, calibration, (fold,))
    chosen = []
    for layer in found:
        M = layer.matrix(fold)
        G, m, n = M.shape
        limit, cost, each = ranks.break_even(m, n), G * m * n, G * (m + n)
        if dense := macs.get(layer.name):
            limit = min(limit, math.ceil(dense / one_macs[layer.name]) - 1)
        if of == "macs":
            cost, each = dense, one_macs[layer.name] if dense else 0
        if cost:
            s = seen.spectrum(layer.name, fold, M) if seen else singular_values(M)
            chosen.append(_choices(layer.name, s, cost, each, limit))
    return chosen


def _choices(name: str, s: Tensor, dense: float, one: float, limit: int) -> _Layer:
    """Ranks up to the limit, and dense; the groups of a convolution share a rank."""
    squares = s.square().sum(0)
    count = min(len(squares), limit)
    lost = squares.flip(0).cumsum(0).flip(0)  # by all from i on
    errors = torch.cat([lost, lost.new_zeros(1)])[1 : count + 1]
    costs = torch.arange(1, count + 1, dtype=torch.float64) * one
    return _Layer(name, len(squares), torch.cat([costs, costs.new_tensor([dense])]),
                  torch.cat([errors, errors.new_zeros(1)]), float(lost[0]))  # fmt: skip


def _equal(layers: list[_Layer], budget: float) -> list[int]:
    """Bisection over all errors that there are."""
    levels = torch.cat([layer.errors / (layer.norm or 1.0) for layer in layers]).unique()

    def at(level: float) -> list[int]:
        return [int((layer.errors / (layer.norm or 1.0) > level).sum()) for layer in layers]

    low, high = 0, len(levels) - 1  # at(levels[high]) keeps the budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _cost(layers, at(float(levels[middle]))) <= budget else (middle + 1, high)
    return at(float(levels[high]))


def _share(layers: list[_Layer], budget: float) -> list[int]:
    """Bisection over the share."""

    def at(share: float) -> list[int]:
        return [min(math.ceil(share * layer.full), len(layer.costs)) - 1 for layer in layers]

    low, high = 1e-9, 1.0  # at(low) keeps the budget
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(layers, at(middle)) <= budget else (low, middle)
    return at(high if _cost(layers, at(high)) <= budget else low)


def _least_sum(layers: list[_Layer], budget: float, weight: Callable[[_Layer], float]) -> list[int]:
    """Bisection over the price of cost, then what is left is spent."""
    if _cost(layers, dense := [len(layer.costs) - 1 for layer in layers]) <= budget:
        return dense

    def at(price: float) -> list[int]:
        return [int((weight(layer) * layer.errors + price * layer.costs).argmin()) for layer in layers]

    scale = max(weight(layer) * layer.norm / float(layer.costs[0]) for layer in layers) or 1.0
    low, high = 1e-18 * scale, 1e3 * scale  # prices
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _cost(layers, at(middle)) <= budget else (middle, high)
    return _spend(layers, at(high), budget, weight)


def _spend(layers: list[_Layer], chosen: list[int], budget: float, weight: Callable[[_Layer], float]) -> list[int]:
    """Raise ranks while the budget allows it, the one that gains most for its cost first."""
    chosen, left = list(chosen), budget - _cost(layers, chosen)
    costs, errors = ([getattr(layer, name).tolist() for layer in layers] for name in ("costs", "errors"))
    weights, steps = [weight(layer) for layer in layers], []

    def offer(i: int) -> None:
        at, last = chosen[i], len(costs[i]) - 1
        for to in {at + 1, last} - {at, last + 1}:
            cost, gain = costs[i][to] - costs[i][at], weights[i] * (errors[i][at] - errors[i][to])
            if gain > 0:
                heapq.heappush(steps, (-gain / cost, cost, i, at, to))

    for i in range(len(layers)):
        offer(i)
    while steps:
        _, cost, i, at, to = heapq.heappop(steps)
        if chosen[i] == at and cost <= left:
            chosen[i], left = to, left - cost
            offer(i)
    return chosen


def _cost(layers: list[_Layer], chosen: list[int]) -> float:
    return sum(float(layer.costs[i]) for layer, i in zip(layers, chosen, strict=True))


_WAYS: dict[str, Callable[[list[_Layer], float], list[int]]] = {
    "relative": lambda layers, budget: _least_sum(layers, budget, lambda layer: 1 / (layer.norm or 1.0)),
    "absolute": lambda layers, budget: _least_sum(layers, budget, lambda layer: 1.0),
    "equal": _equal,
    "greedy": lambda layers, budget: _spend(layers, [0] * len(layers), budget, lambda layer: 1 / (layer.norm or 1.0)),
    "share": _share,
}
