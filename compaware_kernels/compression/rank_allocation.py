"""Rank allocation: per-layer ranks that minimize the truncation error under a budget for the whole model."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape

import torch
from torch import Tensor, nn

from .. import ranks
from .._utils.copied import copied
from .._utils.eval_mode import set_mode
from .._utils.parallel import in_parallel
from ..folds import row_axes
from ..nn.discovery import Layer, foldable_layers
from ..nn.module_surgery import replace
from ..nn.registry import low_rank_type
from ..nn.truncation import Truncation, work
from ..nn.unwrap import without_wrappers
from ..ops.validation import check_finite
from .arguments import ExampleInputs, Inputs
from .calibration import Calibration
from .compress import fixed_layers
from .macs import count_macs

__all__ = ["allocate"]


@dataclass(frozen=True)
class _Layer:
    """Cost-error curve of one layer: choices 1, 2, ... are ranks, the last one is to stay dense.

    Attributes:
        full: full rank min(m, n), which stands for dense.  costs: of each choice, ascending.  errors: squared Frobenius
            norm of the truncation error of each choice, descending to 0.  norm: squared Frobenius norm of the weight.
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
    example_inputs: ExampleInputs,
    *,
    of: str = "macs",
    by: str = "relative",
    fold: str = "paper",
    skip: Sequence[str] = (),
    calibration: Iterable[ExampleInputs] | None = None,
    example_kwargs: Mapping[str, object] | None = None,
    progress: bool | None = None,
) -> dict[str, ranks.Rule]:
    """Rank allocation under a budget for the whole model, as rules for ``ck.compress(ranks=..., goal="size")``.

    With ``goal="speed"``, :func:`compaware_kernels.compress` rounds ranks up and keeps layers dense, which
    may exceed the budget.

    ``by`` names the objective, with ``e_l(r) = sum_{i > r} sigma_i^2`` the truncation error of layer l at rank r:

    * ``relative``: ``sum_l e_l(r_l) / ||W_l||_F^2``
    * ``absolute``: ``sum_l e_l(r_l)``, the C step of Idelbayev & Carreira-Perpinan, CVPR 2020 ("LC")
    * ``equal``: ``max_l e_l(r_l) / ||W_l||_F^2``, equal relative errors (Liebenwein et al., ALDS, NeurIPS 2021)
    * ``greedy``: the objective of ``relative``, one rank at a time from 1 on, the best error decrease per cost first
      (the same result, unless a layer may stay dense)
    * ``share``: no objective, every layer keeps the same share of its full rank; a baseline

    The sums are minimized through the Lagrangian ``e_l(r) + lambda cost_l(r)``, separately per layer, which is exact up
    to an unused rest of the budget; the rest is spent greedily, on the best error decrease per cost.

    Args:
        model, example_inputs, example_kwargs, fold, skip, calibration, progress: as for
            :func:`compaware_kernels.compress`, which must be called with the same; with calibration inputs, errors are
            those of layer outputs.
        budget: share (0 to 1] of the dense cost of all layers that can be factorized.
        of: cost, ``macs`` (multiply-adds on the example inputs) or ``params``.

    Returns:
        rank rules by layer name (special characters escaped for fnmatch); a layer that should stay dense gets its full
        rank.

    Raises:
        ValueError: unknown ``of``, ``by`` or fold; a budget outside (0, 1], or below the cost of rank 1 everywhere
            (which the error states); NaN or Inf in a weight or in a layer's calibration input; ``of="macs"`` of a model
            whose multiply-adds torch's counter fails on.
        TypeError: example_inputs or a batch of calibration inputs is a tensor instead of a tuple.
    """
    inputs = Inputs.of(example_inputs, example_kwargs)
    row_axes(fold, 0)
    if of not in ("macs", "params") or by not in _WAYS:
        raise ValueError(f"wanted of=macs or params, by={' or '.join(_WAYS)}; got of={of!r}, by={by!r}")
    if not (isinstance(budget, (int, float)) and 0 < budget <= 1):
        raise ValueError(f"budget: wanted a share of the dense cost, above 0 and up to 1; got {budget!r}")
    layers = _layers(without_wrappers(model), inputs, of, fold, skip, calibration, progress)
    dense, least = (sum(float(layer.costs[i]) for layer in layers) for i in (-1, 0))
    if budget * dense < least:
        raise ValueError(f"budget: rank 1 everywhere needs {least / dense:.4g} of the dense {of}; got {budget}")
    chosen = _WAYS[by](layers, budget * dense) if layers else []
    return {escape(layer.name): ranks.fixed(layer.rank(i)) for layer, i in zip(layers, chosen, strict=True)}


def _layers(
    model: nn.Module,
    inputs: Inputs,
    of: str,
    fold: str,
    skip: Sequence[str],
    calibration: Iterable[ExampleInputs] | None,
    progress: bool | None,
) -> list[_Layer]:
    """Cost-error curves of all layers that :func:`compress` may factorize: ranks cheaper than dense, and dense."""
    found = foldable_layers(model, skip)[0]
    fixed = fixed_layers(model, [layer.name for layer in found])
    found = [layer for layer in found if layer.name not in fixed]
    names, small = [layer.name for layer in found], set_mode(copied(model), False)
    for layer in found:
        check_finite(layer.weight, layer.name)
        small = replace(small, layer.name, low_rank_type(layer.module).like(layer.module, 1, fold))
    macs, one_macs = count_macs(model, inputs), count_macs(small, inputs)
    if macs is None or one_macs is None:
        if of == "macs":
            raise ValueError("of: the multiply-adds of this model cannot be counted; wanted of='params'; got 'macs'")
        macs, one_macs = {}, {}
    seen = None if calibration is None else Calibration(model, names, calibration, (fold,), progress)
    wanted = [(layer, layer.matrix(fold), *_costs(layer, fold, of, macs, one_macs)) for layer in found]
    wanted = [(layer, M, cost, each, limit) for layer, M, cost, each, limit in wanted if cost]

    def curve(part: tuple[Layer, Tensor, float, float, int]) -> _Layer:
        layer, M, cost, each, limit = part
        s = seen.spectrum(layer.name, fold, M) if seen else Truncation(M, vectors=False).singular_values(limit)
        return _cost_error_curve(layer.name, s, cost, each, limit)

    return in_parallel(curve, wanted, lambda part: work(part[1]), "singular values", progress)


def _costs(
    layer: Layer, fold: str, of: str, macs: Mapping[str, int], one_macs: Mapping[str, int]
) -> tuple[float, float, int]:
    """Cost of a dense layer and of one rank, and the largest rank that is cheaper; 0 if the inputs do not reach it."""
    G, m, n = layer.matrix(fold).shape
    limit, dense, one = ranks.break_even(m, n), macs.get(layer.name), one_macs.get(layer.name)
    if dense and one:
        limit = min(limit, math.ceil(dense / one) - 1)
    if of == "params":
        return G * m * n, G * (m + n), limit
    return (dense, one, limit) if dense and one else (0, 0, limit)


def _cost_error_curve(name: str, s: Tensor, dense: float, one: float, limit: int) -> _Layer:
    """Cost-error curve from ``s`` ``[G, k]``: ranks up to ``limit``, and dense; groups share a rank, errors add up."""
    squares = s.square().sum(0)
    count = min(len(squares), limit)
    lost = squares.flip(0).cumsum(0).flip(0)  # sum of sigma_j^2, j >= i
    errors = torch.cat([lost, lost.new_zeros(1)])[1 : count + 1]
    costs = torch.arange(1, count + 1, dtype=torch.float64) * one
    return _Layer(name, len(squares), torch.cat([costs, costs.new_tensor([dense])]),
                  torch.cat([errors, errors.new_zeros(1)]), float(lost[0]))  # fmt: skip


def _equal(layers: list[_Layer], budget: float) -> list[int]:
    """Choices of least maximal relative error: bisection over all relative errors that occur."""
    levels = torch.cat([layer.errors / (layer.norm or 1.0) for layer in layers]).unique()

    def at(level: float) -> list[int]:
        return [int((layer.errors / (layer.norm or 1.0) > level).sum()) for layer in layers]

    low, high = 0, len(levels) - 1  # invariant: at(levels[high]) keeps the budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _cost(layers, at(float(levels[middle]))) <= budget else (middle + 1, high)
    return at(float(levels[high]))


def _share(layers: list[_Layer], budget: float) -> list[int]:
    """Choices of the largest common share of full rank: bisection over the share."""

    def at(share: float) -> list[int]:
        return [min(math.ceil(share * layer.full), len(layer.costs)) - 1 for layer in layers]

    low, high = 1e-9, 1.0  # invariant: at(low) keeps the budget
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cost(layers, at(middle)) <= budget else (low, middle)
    return at(high if _cost(layers, at(high)) <= budget else low)


def _minimize_sum(layers: list[_Layer], budget: float, weight: Callable[[_Layer], float]) -> list[int]:
    """Choices of least weighted error sum: bisection over the Lagrange multiplier, then a greedy use of the rest."""
    if _cost(layers, dense := [len(layer.costs) - 1 for layer in layers]) <= budget:
        return dense

    def at(price: float) -> list[int]:
        return [int((weight(layer) * layer.errors + price * layer.costs).argmin()) for layer in layers]

    scale = max(weight(layer) * layer.norm / float(layer.costs[0]) for layer in layers) or 1.0
    low, high = 1e-18 * scale, 1e3 * scale  # Lagrange multipliers
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _cost(layers, at(middle)) <= budget else (middle, high)
    return _raise_greedily(layers, at(high), budget, weight)


def _raise_greedily(
    layers: list[_Layer], chosen: list[int], budget: float, weight: Callable[[_Layer], float]
) -> list[int]:
    """Greedy: raise ranks while the budget allows, the best weighted error decrease per cost first."""
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
    """Total cost of a choice per layer."""
    return sum(float(layer.costs[i]) for layer, i in zip(layers, chosen, strict=True))


_WAYS: dict[str, Callable[[list[_Layer], float], list[int]]] = {
    "relative": lambda layers, budget: _minimize_sum(layers, budget, lambda layer: 1 / (layer.norm or 1.0)),
    "absolute": lambda layers, budget: _minimize_sum(layers, budget, lambda layer: 1.0),
    "equal": _equal,
    "greedy": lambda layers, budget: _raise_greedily(
        layers, [0] * len(layers), budget, lambda layer: 1 / (layer.norm or 1.0)
    ),
    "share": _share,
}
