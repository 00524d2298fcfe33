"""Compression of a trained network at all settings, low rank and sparse, the same for every arm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ranks
from ..compression import checkpoint
from ..compression.compress import CompressReport, compress
from ..compression.convert import to_dense
from ..nn.discovery import foldable_layers
from .arms import threshold
from .config import Config
from .data import Source
from .fit import Diverged, Trained, accuracy, require_finite, tune

__all__ = ["Point", "points", "prune", "whole"]

LOW_RANK, SPARSE = "low rank", "sparse"


@dataclass
class Point:
    """Compressed network, measured.  Sizes and multiply-adds (for one image) of a sparse one count what is not zero.

    Attributes:
        bytes: fp32 values; a sparse layer also has one bit per weight that says where they are.
        validation, test: per cent of the images right.  tuned_...: after fine-tuning, else None, as
            where that diverged.
        structure: of a low-rank one, for :func:`compaware_kernels.compression.checkpoint.restructured`.
        milliseconds: for a batch, where it was timed.
    """

    kind: str
    setting: str
    params: int
    macs: int
    bytes: int
    validation: float
    test: float
    tuned_validation: float | None = None
    tuned_test: float | None = None
    structure: dict[str, dict] | None = None
    milliseconds: float | None = None


def points(run: Trained, config: Config, seed: int, data: Source, advance: Callable[[], None]) -> list[Point]:
    """Compress, measure and fine-tune at every setting; ``advance`` is called after each.

    Low rank: dead neurons removed, then every layer cut to the rank that a rule gives and factorised where that is
    smaller. Sparse: the weights that matter least are set to zero, then dead neurons removed.

    Raises:
        Diverged: two factors of a layer are finite, but not their product.
    """
    found, example, dense = [], (data.example(1),), to_dense(run.model)
    require_finite(dense)
    for rule in config.rules:
        small, report = compress(dense, ranks.parse(rule), example, goal="size")
        point = _measured(Point(LOW_RANK, rule, report.params, report.macs, report.bytes, 0, 0), small, data)
        _tune(point, small, data, config, seed)
        point.structure = checkpoint.structure_of(small)
        found.append(point)
        advance()
    for sparsity in config.sparsities:
        pruned, masks = prune(run, sparsity)
        point = _measured(Point(SPARSE, f"{sparsity:g}", *_sparse_sizes(pruned, example), 0, 0), pruned, data)
        _tune(point, pruned, data, config, seed, masks)
        found.append(point)
        advance()
    return found


@torch.no_grad()
def prune(run: Trained, sparsity: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the network in which at least that share of the weights is zero, and what is not, by layer."""
    pruned, scores = copy.deepcopy(run.model), run.arm.scores()
    level, masks = threshold(scores, sparsity), {}
    for layer in foldable_layers(pruned)[0]:
        if layer.name in scores:
            layer.weight.mul_(scores[layer.name] > level)
            masks[layer.name] = layer.weight != 0
    return pruned, masks


def _sparse_sizes(pruned: nn.Module, example: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """Parameters, multiply-adds and bytes, not counting zeros and inputs of dead neurons."""
    small, report = compress(pruned, {}, example, goal="size")
    weights = {layer.name: layer.weight for layer in foldable_layers(small)[0]}
    params, macs, size = report.params, report.macs, report.bytes
    for row in report.layers:
        weight = weights[row.name]
        zeros = int((weight == 0).sum())
        if zeros:
            params -= zeros
            macs -= round(row.macs * zeros / weight.numel())
            size -= 4 * zeros - -(-weight.numel() // 8)
    return params, macs, size


def whole(run: Trained, data: Source) -> CompressReport:
    """Sizes of the trained network, uncompressed."""
    return compress(run.model, {}, (data.example(1),), goal="size", remove_dead=False)[1]


def _measured(point: Point, model: nn.Module, data: Source) -> Point:
    point.validation, point.test = _accuracies(model, data)
    return point


def _tune(
    point: Point, model: nn.Module, data: Source, config: Config, seed: int, masks: dict[str, Tensor] | None = None
) -> None:
    """Fine-tune and measure the network; if that diverges, the point stays without fine-tuned accuracies."""
    if not config.tune_epochs:
        return
    try:
        tune(model, data, config, seed, masks)
    except Diverged:
        return
    point.tuned_validation, point.tuned_test = _accuracies(model, data)


def _accuracies(model: nn.Module, data: Source) -> tuple[float, float]:
    return accuracy(model, data.validation()), accuracy(model, data.test())
