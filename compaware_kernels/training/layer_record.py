"""One layer in a proximal step: weight, bias, center and thresholds; checks and write-back of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..distributed.dtensor import distribute_bias, is_dtensor, local, placed, redistribute_like
from ..folds import oriented
from ..nn import parametrization
from ..nn.discovery import Layer
from ..ops.validation import check_apart, check_finite, check_weight, check_weights, check_writable
from ..proximal.cuda import backend as gpu
from ..proximal.error_feedback import STEPS, residual, widened
from ..proximal.record import Record
from .residuals import Residuals
from .schedule_free import Average

__all__ = ["LayerRecord", "center_weight", "check_records", "write_back"]


@dataclass(eq=False, kw_only=True)
class LayerRecord(Record):
    """Record of a layer's weight ``[O, C/G, *K]`` (output axis first), with the thresholds of its penalties.

    The weight and the bias are clones, so that a step that fails changes nothing; on CUDA they are the parameters
    themselves, because the device step is all-or-nothing. Those that have residuals are copies in fp32 everywhere.
    """

    layer: Layer
    taus: dict[str, float]  # penalty -> threshold > 0
    guarded: bool  # whether the device finds NaN and Inf, and then changes nothing
    in_place: bool  # whether weight and bias are the layer's parameters themselves
    weight_residual: Tensor | None = None
    bias_residual: Tensor | None = None
    average: Average | None = None  # of the weight, under a schedule-free optimizer
    bias_average: Average | None = None

    @classmethod
    def of(
        cls,
        layer: Layer,
        rows: Tensor,
        bias: Tensor | None,
        center: Layer | None,
        fold: str,
        taus: dict[str, float],
        residuals: Residuals | None,
        average: Average | None,
        bias_average: Average | None,
    ) -> LayerRecord:
        """Record of a layer for one step.

        Args:
            rows: the layer's weight, output axis first.
            bias: ``[O]``, if a penalty shrinks it together with the weight.
            center: the layer with the weight C, for penalties on W - C.
            fold: see :mod:`compaware_kernels.folds`.
            taus: penalty -> threshold > 0.
            residuals: of the weights in half precision, which get one if they have none; None: no error feedback.
            average, bias_average: under a schedule-free optimizer, of the weight and of the bias.
        """
        if average is not None:
            rows = oriented(average.x, type(layer.module), layer.groups)
        if bias_average is not None:
            bias = bias_average.x
        residuals = residuals if average is None and bias_average is None else None
        alone = center is None and average is None and bias_average is None
        guarded = alone and gpu.on_gpu([rows]) and not layer.is_parametrized and not is_dtensor(rows)
        E = None if residuals is None else residuals.of(f"{layer.name}.weight", rows)
        E_bias, in_place = None, guarded and E is None
        if bias is not None:
            bias = bias.detach() if in_place else distribute_bias(bias.detach().clone(), rows)
            E_bias = None if residuals is None or in_place else residuals.of(f"{layer.name}.bias", bias)
            bias = bias if E_bias is None else widened(bias, E_bias)
        if not in_place:
            rows = rows.clone() if E is None else widened(rows, E, _steps(layer))
        if guarded and E is not None:
            rows = residuals.same_copy(layer.name, rows)
        C = None if center is None else center_weight(layer, center)
        return cls(rows, layer.name, bias=bias, center=C, groups=layer.groups, fold=fold, layer=layer, taus=taus,
                   guarded=guarded, in_place=in_place, weight_residual=E, bias_residual=E_bias, average=average,
                   bias_average=bias_average)  # fmt: skip

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
    check_weights([(part, r.layer.name, not r.guarded) for r in records for part in r.results])
    for record in records:
        if record.center is not None:
            check_weight(local(record.center), f"center of {record.layer.name}")
    written = [(local(p), record.layer.name) for record in records for p in record.written]
    for parameter, name in written:
        check_writable(parameter, name)
    check_apart([parameter for parameter, _ in written], [name for _, name in written])


def write_back(records: Sequence[LayerRecord]) -> None:
    """Write the results into the layers and their residuals, all or none. Parametrized weights, which may fail, first.

    Raises:
        ValueError: a parametrization cannot represent the result, or it overflows; no layer has changed.
    """
    clones = sorted((r for r in records if not r.in_place), key=lambda r: not r.layer.is_parametrized)
    lists = [r.layer.parametrizations for r in clones if r.layer.is_parametrized]
    undo = [(parametrizations, parametrization.copied_state(parametrizations)) for parametrizations in lists]
    biases = [None if r.bias is None else redistribute_like(r.bias, r.layer.module.bias) for r in clones]
    _check_overflow(clones)
    try:
        for record in clones:
            if record.average is None:
                record.layer.set_rows(record.weight.to(record.layer.weight.dtype))
            else:
                record.average.move(oriented(record.weight, type(record.layer.module), record.groups))
        for record, bias in zip(clones, biases, strict=True):
            if record.bias_average is not None:
                record.bias_average.move(bias)
            elif bias is not None:
                record.layer.module.bias.copy_(bias)
    except BaseException:
        for parametrizations, state in undo:
            parametrizations.load_state_dict(state)
        raise
    for record in clones:
        _keep_residuals(record)


def _steps(layer: Layer) -> int:
    """Steps of a weight's residual in an ulp. Parametrized weights come back with errors of a few ulps, not of half."""
    return STEPS // 16 if layer.is_parametrized else STEPS


def _check_overflow(records: Sequence[LayerRecord]) -> None:
    """Raise ValueError if a result in fp32 is beyond the largest number of its weight's dtype."""
    for record in records:
        if record.weight_residual is not None and not record.guarded:
            check_finite(local(record.weight).to(record.layer.weight.dtype), record.layer.name)


def _keep_residuals(record: LayerRecord) -> None:
    """Keep what rounding has cut off of the result, measured on what the layer holds now."""
    if record.weight_residual is not None:
        stored = local(record.layer.rows.detach())
        local(record.weight_residual).copy_(residual(local(record.weight), stored, _steps(record.layer)))
    if record.bias_residual is not None:
        X = local(record.bias)
        local(record.bias_residual).copy_(residual(X, X.to(record.layer.module.bias.dtype)))
