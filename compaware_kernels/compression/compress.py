"""Model compression: remove dead neurons, factorize layers by truncated SVD, and report what changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from .._utils.copied import copied, with_the_same_parameters
from .._utils.eval_mode import layer_by_layer, set_mode
from .._utils.tables import text_table
from ..folds import FOLDS, row_axes
from ..nn.discovery import Layer, foldable_layers
from ..nn.holders import tied_weights, why_dense
from ..nn.lowrank import LowRank
from ..nn.module_surgery import replace, to_channels_last
from ..nn.unwrap import without_wrappers
from . import latency_model
from .arguments import ExampleInputs, Inputs, RankRule, rule_of, rules_by_pattern
from .calibration import Calibration
from .comparison import difference
from .dead_neurons import remove_dead_neurons
from .factorize import Factorizer, note, size
from .macs import count_macs
from .reads import weights_read

__all__ = ["CompressReport", "LayerReport", "compress", "fixed_layers"]

READ = "the model reads its weight, for which the product of the factors is formed each time"


@dataclass
class LayerReport:
    """Report of one layer: parameters, multiply-adds (on the example inputs) and bytes, before and after."""

    name: str
    kind: str
    params_before: int
    params: int
    macs_before: int | None  # None: torch's FLOP counter fails on the model
    macs: int | None
    bytes_before: int
    bytes: int
    rank: int | None = None  # of the factors; None if the layer stayed dense
    full_rank: int | None = None
    neurons_removed: int = 0
    gain: float | None = None  # dense time / low-rank time, predicted or measured; None for goal="size"
    reason: str = ""  # why it stayed dense, was factorized or kept dead neurons


@dataclass
class CompressReport:
    """Report of :func:`compress`: totals and one row per layer.  ``str(report)``: a table; ``to_dict()``: JSON data."""

    layers: list[LayerReport]
    params_before: int
    params: int
    macs_before: int | None  # None: torch's FLOP counter fails on the model
    macs: int | None
    bytes_before: int
    bytes: int
    skipped: dict[str, str] = field(default_factory=dict)  # layers that cannot be folded to matrices -> why

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (r.name, r.kind, f"{r.rank}/{r.full_rank}" if r.rank else "dense", r.neurons_removed or "",
             _change(r.params_before, r.params), _change(r.macs_before, r.macs), r.reason)
            for r in self.layers
        ]  # fmt: skip
        rows += [(name, "", "left", "", "", "", reason) for name, reason in self.skipped.items()]
        total = ("total", "", "", "", _change(self.params_before, self.params), _change(self.macs_before, self.macs),
                 f"{_change(self.bytes_before, self.bytes)} bytes")  # fmt: skip
        columns = ("layer", "kind", "rank", "neurons removed", "parameters", "multiply-adds", "note")
        return text_table(columns, [*rows, total], right=(2, 3, 4, 5))


def compress(
    model: nn.Module,
    ranks: RankRule | Mapping[str, RankRule],
    example_inputs: ExampleInputs,
    *,
    fold: str = "paper",
    goal: str = "speed",
    measure: bool = False,
    skip: Sequence[str] = (),
    remove_dead: bool = True,
    calibration: Iterable[ExampleInputs] | None = None,
    example_kwargs: Mapping[str, object] | None = None,
    progress: bool | None = None,
) -> tuple[nn.Module, CompressReport]:
    """Compress a model: remove dead neurons and factorize layers by truncated SVD.  The model itself is not changed.

    Dead neurons (all weights zero) are removed first, where that is exact (:mod:`.dead_neurons`). Then each layer's
    folded matrix ``[G, m, n]`` is truncated to the rank r given by its rule and replaced by two factors, unless they
    would be no smaller: ``r >= m n / (m + n)``, or no fewer multiply-adds on the example inputs. The low-rank layer
    takes over the dense one's hooks, buffers and attributes. A layer that cannot be replaced without a change of
    something else stays dense: one with a forward of its own, one that others hold, and one whose weight is tied to
    another's, as its factors would be separate and stored besides. The report has the reason.

    With ``goal="speed"`` a layer is factorized only if that also makes it faster on the device, thread count and
    shapes of the example inputs: predicted by :mod:`.latency_model`, or measured with ``measure=True``, which also
    times the whole model against the dense one and returns the faster of the two. Ranks are rounded up to a multiple
    of 8 where the factors stay smaller than dense: this costs no time, but may exceed a budget of
    :func:`compaware_kernels.allocate`. 2-D convolutions get channels_last weights where the model allows it.

    Args:
        model: any module; Linear, Conv1d, Conv2d and Conv3d are compressed, other layers with weights are listed as
            skipped. Training wrappers around it or its submodules (torch.compile, DistributedDataParallel,
            AveragedModel, activation checkpointing) are removed.
        ranks: a rule of :mod:`compaware_kernels.ranks` (``ck.ranks.energy(0.99)``), or any function from singular
            values ``[G, k]`` to a rank; or rules by layer name pattern: the first match applies,
            a layer without one stays dense.
        example_inputs: positional inputs of the model, ``(x,)``, or a mapping of keyword arguments, such as a batch of
            a tokenizer; multiply-adds are counted on them. A mapping in a tuple is a positional input.
        fold: ``paper`` | ``spatial`` | ``input``, or ``auto``: per layer the fastest (``goal="size"``: the smallest).
        goal: ``speed`` | ``size``.
        measure: measure times instead of predicting them; only with ``goal="speed"``.
        skip: name patterns of layers to leave unchanged.
        remove_dead: remove dead neurons.
        calibration: a few unlabeled model inputs, ``[(x,), ...]`` or mappings of keyword arguments: ranks and
            truncation then minimize the error of layer outputs instead of weights
            (:mod:`compaware_kernels.compression.calibration`).
        example_kwargs: keyword arguments of the model beside ``example_inputs``; calibration inputs bring their own.
        progress: whether to show a progress bar on stderr if it takes long; None: if that is a terminal.

    Returns:
        the compressed model, and a :class:`CompressReport`.

    Raises:
        ValueError: unknown fold or goal, ``measure`` with ``goal="size"``, a pattern that matches no layer, NaN or Inf
            in a weight or in a layer's calibration input, no calibration inputs, a rule that returns no rank.
        TypeError: example_inputs is a tensor instead of a tuple, or a keyword argument is given twice.
    """
    inputs = Inputs.of(example_inputs, example_kwargs)
    if goal not in ("speed", "size") or (measure and goal == "size"):
        raise ValueError(f"goal must be speed or size, and only speed is measured; got {goal!r}, measure={measure}")
    model, folds = without_wrappers(model), FOLDS if fold == "auto" else (fold,)
    row_axes(folds[0], 0)
    layers, skipped = foldable_layers(model, skip)
    names = [layer.name for layer in layers]
    rules, fixed = rules_by_pattern(ranks, names), fixed_layers(model, names)
    for layer in layers:
        if not layer.weight.isfinite().all():
            raise ValueError(f"{layer.name}: its weight contains NaN or Inf; nothing was compressed")

    small, removed, notes = set_mode(copied(model), False), {}, {}
    if remove_dead:
        small, removed, notes = remove_dead_neurons(small, inputs, tuple(skip))
    open_names = [name for name in names if name not in fixed]
    watched = names if goal == "speed" else []
    with weights_read(small, open_names) as read, latency_model.recording(small, watched) as seen:
        macs_dense = count_macs(small, inputs)
    macs_before = count_macs(model, inputs) if removed else macs_dense
    moments = None
    if calibration is not None:
        wanted = [name for name in open_names if rule_of(rules, name)]
        moments = Calibration(small, wanted, calibration, folds, progress)
    dense, faster_on, macs = with_the_same_parameters(small), None, None
    if goal == "speed":
        fixed |= dict.fromkeys(read, READ)
        small, faster_on = _channels_last(small, names, inputs, seen)
    whole = {layer.name: small.get_submodule(layer.name) for layer in layers}
    factorizer = Factorizer(rules, fixed, folds, faster_on, measure, moments, progress)
    small, gains = factorizer.run(small, names, notes)
    if not gains:
        small, macs = dense, macs_dense
    elif goal == "size":
        small, macs = _restore_costlier_layers(small, whole, macs_dense, gains, inputs, notes)
    elif measure and latency_model.fastest([dense, small], inputs) == 0:
        for name in gains:
            note(notes, name, "put back: the whole model was measured to be no faster")
        small, gains, macs = dense, {}, macs_dense
    for name in read & gains.keys():
        note(notes, name, READ)
    now = dict(small.named_modules())
    for name, module in model.named_modules():  # parents before children
        set_mode(now[name], module.training)
    macs = count_macs(small, inputs) if macs is None else macs
    return small, _report(model, small, layers, skipped, macs_before, macs, removed, notes, gains)


def fixed_layers(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Reasons by name of the layers that :func:`compress` leaves dense, whatever their rank."""
    tied = tied_weights(model, names).items()
    apart = {
        name: f"shares its weight with {other}: factors would be separate, and stored besides" for name, other in tied
    }
    return apart | why_dense(model, names)


def _restore_costlier_layers(
    small: nn.Module,
    whole: dict[str, nn.Module],
    before: dict[str, int] | None,
    gains: dict,
    inputs: Inputs,
    notes: dict[str, str],
) -> tuple[nn.Module, dict[str, int] | None]:
    """Restore dense layers whose factors need no fewer multiply-adds on the example inputs, if those can be counted.

    Returns the model, and its multiply-adds if they are known.
    """
    macs = count_macs(small, inputs)
    if macs is None or before is None:
        return small, macs
    costly = [name for name in gains if macs.get(name, 0) >= before.get(name, 0) > 0]
    for name in costly:
        small = replace(small, name, whole[name])
        del gains[name]
        note(notes, name, f"its factors need {macs[name]:,} multiply-adds, the dense layer {before[name]:,}")
    return small, None if costly else macs


Seen = Mapping[str, tuple[Tensor, Tensor]]  # inputs and outputs of layers


def _channels_last(model: nn.Module, names: Sequence[str], inputs: Inputs, seen: Seen) -> tuple[nn.Module, Seen]:
    """The model with channels_last weights if its outputs stay the same, else as it is; and what its layers see."""
    if not any(type(module) in (nn.Conv2d, nn.ConvTranspose2d) for module in model.modules()):
        return model, seen
    changed = to_channels_last(with_the_same_parameters(model))
    with layer_by_layer(changed), latency_model.recording(changed, names) as seen_then:
        why = difference(model, changed, inputs)
    return (model, seen) if why else (changed, seen_then)


def _report(model, small, layers, skipped, macs_before, macs, removed, notes, gains) -> CompressReport:
    entries = [
        _layer_report(layer, small.get_submodule(layer.name), macs_before, macs, removed, notes, gains)
        for layer in layers
    ]
    (params_before, bytes_before), (params, bytes_) = size(model), size(small)
    macs_before, macs = _count(macs_before, ""), _count(macs, "")
    return CompressReport(entries, params_before, params, macs_before, macs, bytes_before, bytes_, skipped)


def _layer_report(layer: Layer, now: nn.Module, macs_before, macs, removed, notes, gains) -> LayerReport:
    (params_before, bytes_before), (params, bytes_) = size(layer.module), size(now)
    rank, fold = (now.rank, now.fold) if isinstance(now, LowRank) else (None, "paper")
    full = min(Layer(layer.name, layer.module).matrix(fold).shape[-2:])
    return LayerReport(
        layer.name, type(layer.module).__name__, params_before, params, _count(macs_before, layer.name),
        _count(macs, layer.name), bytes_before, bytes_, rank, full, removed.get(layer.name, 0),
        gains.get(layer.name), notes.get(layer.name, ""),
    )  # fmt: skip


def _count(macs: dict[str, int] | None, name: str) -> int | None:
    """Multiply-adds of a module; 0 if the example inputs do not reach it, None if they could not be counted."""
    return None if macs is None else macs.get(name, 0)


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return " -> ".join("unknown" if count is None else f"{count:,}" for count in (before, after))
    return f"{before:,} -> {after:,}" + (f" ({after / before:.0%})" if before else "")
