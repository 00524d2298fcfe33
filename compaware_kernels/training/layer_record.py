"""One layer in a proximal step: weight, bias, center and thresholds; checks and write-back of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..distributed.dtensor import distribute_bias, is_dtensor, local, placed, redistribute_like
from ..nn import parametrization
from ..nn.discovery import Layer
from ..ops.validation import check_apart, check_weight, check_weights, check_writable
from ..proximal.cuda import backend as gpu
from ..proximal.record import Record

__all__ = ["LayerRecord", "center_weight", "check_records", "write_back"]


@dataclass(eq=False, kw_only=True)
class LayerRecord(Record):
    """Record of a layer's weight ``[O, C/G, *K]`` (output axis first), with the thresholds of its penalties.

    The weight and the bias are clones, so that a step that fails changes nothing; on CUDA they are the parameters
    themselves, because the device step is all-or-nothing.
    """

    layer: Layer
    taus: dict[str, float]  # penalty -> threshold > 0
    in_place: bool  # whether weight and bias are the layer's parameters themselves

    @classmethod
    def of(
        cls, layer: Layer, rows: Tensor, bias: Tensor | None, center: Layer | None, fold: str, taus: dict[str, float]
    ) -> LayerRecord:
        """Record of a layer for one step.

        Args:
            rows: the layer's weight, output axis first.
            bias: ``[O]``, if a penalty shrinks it together with the weight.
            center: the layer with the weight C, for penalties on W - C.
            fold: see :mod:`compaware_kernels.folds`.
            taus: penalty -> threshold > 0.
        """
        bias = None if bias is None else bias.detach()
        in_place = center is None and gpu.on_gpu([rows]) and not layer.is_parametrized and not is_dtensor(rows)
        if not in_place:
            rows = rows.clone()
            bias = None if bias is None else distribute_bias(bias.clone(), rows)
        C = None if center is None else center_weight(layer, center)
        return cls(rows, layer.name, bias=bias, center=C, groups=layer.groups, fold=fold, layer=layer, taus=taus,
                   in_place=in_place)  # fmt: skip

    @property
    def tensors(self) -> list[Tensor]:
        """Weight, bias and center, without those that are None."""
        return [t for t in (self.weight, self.bias, self.center) if t is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> LayerRecord:
        """The record with other :attr:`tensors`."""
        names = [name for name in ("weight", "bias", "center") if getattr(self, name) is not None]
        return replace(self, **dict(zip(names, tensors, strict=True)))

    @property
    def results(self) -> list[Tensor]:
        """This rank's shards of the tensors that the penalties change: weight, and bias if there is one."""
        return [local(t) for t in (self.weight, self.bias) if t is not None]

    @property
    def written(self) -> list[Tensor]:
        """The layer's parameters that :func:`write_back` changes."""
        return self.layer.parameters + ([] if self.bias is None else [self.layer.module.bias])

    @property
    def keys(self) -> list[str]:
        """Keys of the layer's bases in a WarmState, one per group."""
        return [f"{self.key}.{g}" for g in range(self.groups)]

    @property
    def cost(self) -> int:
        """Approximate multiplications of its SVT, numel x min(O/G, C/G prod(K)); equal on all steps and ranks."""
        size = self.weight.numel()
        return size * min(len(self.weight) // self.groups, size // len(self.weight))


def center_weight(layer: Layer, center: Layer) -> Tensor:
    """The center's weight, output axis first, with the dtype, device and placements of the layer's."""
    rows, C = layer.rows.detach(), center.rows.detach()
    return (placed(C, rows) if is_dtensor(rows) else C).to(rows.dtype).to(rows.device)


def check_records(records: Sequence[LayerRecord]) -> None:
    """Check dtypes and values before a step. Values on a GPU are left to the device step, which does not synchronize.

    Raises:
        TypeError: a dtype that the operators do not support; with the layer's name.
        ValueError: NaN or Inf in a weight, bias or center, or a parameter that cannot be written in place
            or shares memory with another layer's; with the layer's name.
    """
    check_weights([(part, r.layer.name, not r.in_place) for r in records for part in r.results])
    for record in records:
        if record.center is not None:
            check_weight(local(record.center), f"center of {record.layer.name}")
    written = [(local(p), record.layer.name) for record in records for p in record.written]
    for parameter, name in written:
        check_writable(parameter, name)
    check_apart([parameter for parameter, _ in written], [name for _, name in written])


def write_back(records: Sequence[LayerRecord]) -> None:
    """Write the results into the layers, all or none. Parametrized weights, which may fail, come first.

    Raises:
        ValueError: a parametrization cannot represent the result; no layer has changed.
    """
    clones = sorted((r for r in records if not r.in_place), key=lambda r: not r.layer.is_parametrized)
    lists = [r.layer.parametrizations for r in clones if r.layer.is_parametrized]
    undo = [(parametrizations, parametrization.copied_state(parametrizations)) for parametrizations in lists]
    biases = [None if r.bias is None else redistribute_like(r.bias, r.layer.module.bias) for r in clones]
    try:
        for record in clones:
            record.layer.set_rows(record.weight)
    except ValueError:
        for parametrizations, state in undo:
            parametrizations.load_state_dict(state)
        raise
    for record, bias in zip(clones, biases, strict=True):
        if bias is not None:
            record.layer.module.bias.copy_(bias)
