"""A whole model -> a smaller model, with a report: dead neurons removed, low-rank layers factorised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import ranks as rank_rules
from .factorize import singular_values
from .folds import Layer, foldable_layers, require_matches
from .layers import LOW_RANK, low_rank_type
from .neurons import remove_dead_neurons
from .tables import text_table

RankRule = Callable[[Tensor], int]


@dataclass
class LayerReport:
    """One layer before and after.  Multiply-adds are for the example inputs; sizes count weight and bias."""

    name: str
    kind: str
    params_before: int
    params: int
    macs_before: int
    macs: int
    bytes_before: int
    bytes: int
    rank: int | None = None  # of the factors; None where the layer stayed dense
    full_rank: int | None = None
    neurons_removed: int = 0
    reason: str = ""  # why it stayed dense, or kept dead neurons


@dataclass
class CompressReport:
    """What :func:`compress` did.  ``str(report)`` is a table; ``report.to_dict()`` is plain data for JSON."""

    layers: list[LayerReport]
    params_before: int
    params: int
    macs_before: int
    macs: int
    bytes_before: int
    bytes: int
    skipped: dict[str, str] = field(default_factory=dict)  # layers that do not fold to matrices, and why

    def to_dict(self) -> dict:
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
    example_inputs: Sequence[object],
    *,
    fold: str = "paper",
    skip: Sequence[str] = (),
    remove_dead: bool = True,
) -> tuple[nn.Module, CompressReport]:
    """Factorise the low-rank layers of a model and remove its dead neurons.  The model itself is not changed.

    Dead neurons (weights all zero) go first, where removing them is exact (:mod:`compaware_kernels.neurons`). Then each
    layer's folded matrix is cut to the rank that the rule gives and replaced by two factors (truncated SVD), unless
    that would not be smaller: ``r >= m n / (m + n)``, or no fewer multiply-adds on the example inputs.

    Args:
        model: any module; Linear, Conv1d, Conv2d and Conv3d are compressed, what else has weights is listed as skipped.
        ranks: a rule of :mod:`compaware_kernels.ranks` (``ck.ranks.energy(0.99)``), or any function from singular
            values ``[G, k]`` to a rank; or rules by layer name pattern, first match wins, no match stays dense.
        example_inputs: positional inputs of the model, ``(x,)``; multiply-adds are counted on them.
        fold: ``paper`` | ``spatial`` | ``input``.
        skip: name patterns of layers to leave alone.
        remove_dead: whether to remove dead neurons.

    Returns:
        the new model, and a :class:`CompressReport`.

    Raises:
        ValueError: unknown fold, a pattern that matches no layer, NaN or Inf in a weight, a rule that returns no rank.
        TypeError: example_inputs is a tensor instead of a tuple.
    """
    if isinstance(example_inputs, Tensor):
        raise TypeError("example_inputs: wanted a tuple of the model's inputs, (x,); got a tensor")
    inputs = tuple(example_inputs)
    layers, skipped = foldable_layers(model, skip)
    rules = ranks if isinstance(ranks, Mapping) else {"*": ranks}
    require_matches(list(rules), [layer.name for layer in layers], "ranks")
    for layer in layers:
        if not layer.weight.isfinite().all():
            raise ValueError(f"{layer.name}: its weight contains NaN or Inf; nothing was compressed")

    macs_before = _count_macs(model, inputs)
    small, removed, notes = copy.deepcopy(model), {}, {}
    if remove_dead:
        small, removed, notes = remove_dead_neurons(small, inputs, tuple(skip))
    macs_dense = _count_macs(small, inputs)
    replaced = _factorize(small, layers, rules, fold, notes)
    macs = _count_macs(small, inputs)
    for name, layer in replaced.items():
        if macs.get(name, 0) >= macs_dense.get(name, 0) > 0:
            small.set_submodule(name, layer)
            _note(notes, name, f"its factors need {macs[name]:,} multiply-adds, the dense layer {macs_dense[name]:,}")
    return small, _report(model, small, layers, skipped, macs_before, _count_macs(small, inputs), removed, notes)


def _factorize(
    model: nn.Module, layers: list[Layer], rules: Mapping[str, RankRule], fold: str, notes: dict[str, str]
) -> dict[str, nn.Module]:
    """Replace layers of ``model`` by their factors; returns the replaced ones by name, and notes why others stay."""
    replaced = {}
    for name in (layer.name for layer in layers):
        dense = model.get_submodule(name)
        rule = next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)
        reason, rank = _choose(model, name, dense, rule, fold)
        if reason:
            _note(notes, name, reason)
        else:
            replaced[name] = dense
            model.set_submodule(name, low_rank_type(dense).from_dense(dense, rank, fold))
    return replaced


def _choose(model: nn.Module, name: str, dense: nn.Module, rule: RankRule | None, fold: str) -> tuple[str, int]:
    """Why the layer stays dense, or "" and its rank."""
    M = Layer(name, dense).matrix(fold)
    m, n = M.shape[-2:]
    if rule is None:
        return "no rank rule matches its name", 0
    if type(dense) not in LOW_RANK:
        return f"a {type(dense).__name__} may use its weight in ways of its own", 0
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return f"nn.{type(parent).__name__} reads its weight directly", 0
    rank = rule(singular_values(M))
    if not isinstance(rank, int) or rank < 0:
        raise ValueError(f"{name}: the rank rule must return a whole number >= 0; got {rank!r}")
    rank, limit = max(rank, 1), rank_rules.break_even(m, n)
    if rank > limit:
        return f"rank {rank} of a {m} x {n} matrix is not smaller (break-even: {limit})", 0
    return "", rank


def _note(notes: dict[str, str], name: str, text: str) -> None:
    notes[name] = f"{notes[name]}; {text}" if name in notes else text


def _count_macs(model: nn.Module, inputs: tuple) -> dict[str, int]:
    """Multiply-adds per submodule (and of the whole model under "") of one forward pass in eval mode."""
    modes = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention kernels are not counted
    try:
        model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training
    root = type(model).__name__
    counts = counter.get_flop_counts().items()
    macs = {key.removeprefix(f"{root}."): sum(ops.values()) // 2 for key, ops in counts if key.startswith(f"{root}.")}
    return macs | {"": counter.get_total_flops() // 2}


def _report(model, small, layers, skipped, macs_before, macs, removed, notes) -> CompressReport:
    entries = [
        _layer_report(layer, small.get_submodule(layer.name), macs_before, macs, removed, notes) for layer in layers
    ]
    (params_before, bytes_before), (params, bytes_) = _size(model), _size(small)
    return CompressReport(entries, params_before, params, macs_before[""], macs[""], bytes_before, bytes_, skipped)


def _layer_report(layer: Layer, now: nn.Module, macs_before, macs, removed, notes) -> LayerReport:
    (params_before, bytes_before), (params, bytes_) = _size(layer.module), _size(now)
    rank = getattr(now, "rank", None)
    full = min(Layer(layer.name, layer.module).matrix(getattr(now, "fold", "paper")).shape[-2:])
    return LayerReport(
        layer.name, type(layer.module).__name__, params_before, params, macs_before.get(layer.name, 0),
        macs.get(layer.name, 0), bytes_before, bytes_, rank, full, removed.get(layer.name, 0),
        notes.get(layer.name, ""),
    )  # fmt: skip


def _size(module: nn.Module) -> tuple[int, int]:
    """Parameters, and their bytes; a shared parameter counts once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}" + (f" ({after / before:.0%})" if before else "")
