"""One layer on its way through a proximal step: what its penalties work on, and the write-back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..distributed.dtensor import as_before, by_rows, is_dtensor, local, placed
from ..nn import parametrization
from ..nn.discovery import Layer
from ..ops.validation import check_weight, check_weights
from ..proximal.cuda import backend as gpu
from ..proximal.record import Record


@dataclass(eq=False, kw_only=True)
class LayerRecord(Record):
    """The record of a layer's weight (outputs first), with the thresholds of its penalties.

    The weight and the bias are clones, so that a step that fails changes nothing; on CUDA they are the parameters
    themselves, because the device step is all-or-nothing.
    """

    layer: Layer
    taus: dict[str, float]  # by penalty, those above 0
    in_place: bool  # whether weight and bias are the layer's own

    @classmethod
    def of(
        cls, layer: Layer, rows: Tensor, bias: Tensor | None, center: Layer | None, fold: str, taus: dict[str, float]
    ) -> LayerRecord:
        """rows: the layer's weight, outputs first.  bias: if it belongs to the rows that are shrunk."""
        bias = None if bias is None else bias.detach()
        in_place = center is None and gpu.on_gpu([rows]) and not layer.is_parametrized and not is_dtensor(rows)
        if not in_place:
            rows = rows.clone()
            bias = None if bias is None else by_rows(bias.clone(), rows)
        C = None if center is None else center_of(layer, center)
        return cls(rows, layer.name, bias=bias, center=C, groups=layer.groups, fold=fold, layer=layer, taus=taus,
                   in_place=in_place)  # fmt: skip

    @property
    def tensors(self) -> list[Tensor]:
        """Weight, bias and center, those there are."""
        return [t for t in (self.weight, self.bias, self.center) if t is not None]

    def like(self, tensors: Sequence[Tensor]) -> LayerRecord:
        """The same with other :attr:`tensors`."""
        names = [name for name in ("weight", "bias", "center") if getattr(self, name) is not None]
        return replace(self, **dict(zip(names, tensors, strict=True)))

    @property
    def results(self) -> list[Tensor]:
        """This rank's shards of what the penalties change."""
        return [local(t) for t in (self.weight, self.bias) if t is not None]

    @property
    def keys(self) -> list[str]:
        """Of what a WarmState remembers."""
        return [f"{self.key}.{g}" for g in range(self.groups)]

    @property
    def cost(self) -> int:
        """About how many multiplications its SVT takes; the same at every step and on every rank."""
        size = self.weight.numel()
        return size * min(len(self.weight) // self.groups, size // len(self.weight))


def center_of(layer: Layer, center: Layer) -> Tensor:
    """The center's rows, in the dtype, on the device and over the processes as the layer's."""
    rows, C = layer.rows.detach(), center.rows.detach()
    return (placed(C, rows) if is_dtensor(rows) else C).to(rows.dtype).to(rows.device)


def check(records: Sequence[LayerRecord]) -> None:
    """Raise TypeError for a dtype that has no operator, ValueError for NaN or Inf; with the layer's name.

    Values on a GPU are left to the device step, which finds them without synchronization.
    """
    check_weights([(part, r.layer.name, not r.in_place) for r in records for part in r.results])
    for record in records:
        if record.center is not None:
            check_weight(local(record.center), f"center of {record.layer.name}")


def write_back(records: Sequence[LayerRecord]) -> None:
    """Write the clones to the layers. Parametrizations may refuse: they come first, and are undone.

    Raises:
        ValueError: a parametrization cannot hold the result; every layer is as it was.
    """
    clones = sorted((r for r in records if not r.in_place), key=lambda r: not r.layer.is_parametrized)
    undo = [(r.layer.chain, parametrization.state(r.layer.chain)) for r in clones if r.layer.is_parametrized]
    biases = [None if r.bias is None else as_before(r.bias, r.layer.module.bias) for r in clones]
    try:
        for record in clones:
            record.layer.set_rows(record.weight)
    except ValueError:
        for chain, before in undo:
            chain.load_state_dict(before)
        raise
    for record, bias in zip(clones, biases, strict=True):
        if bias is not None:
            record.layer.module.bias.copy_(bias)
