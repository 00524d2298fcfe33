"""The penalties' proximal steps on copies of the layers' weights, which may be divided among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..distributed.dtensor import by_rows, column_groups, is_dtensor, local, placed, shrink_rows_
from ..nn.discovery import Layer
from ..ops.validation import check_finite
from ..proximal import functional
from ..proximal.cuda import backend as gpu
from ..proximal.cuda.finite_guard import Guard
from ..proximal.warm_state import WarmState

PENALTIES = ("nuclear", "group", "l1")


@dataclass(eq=False)
class Job:
    """One layer on its way through a proximal step."""

    layer: Layer
    weight: Tensor  # a copy of the layer's rows [O, ...]; on a GPU themselves: no step there is taken by halves
    bias: Tensor | None  # [O], as weight: its bias, if that is trained
    center: Tensor | None  # as weight
    taus: dict[str, float]

    @classmethod
    def of(cls, layer: Layer, bias: Tensor | None, center: Layer | None, taus: dict[str, float]) -> Job:
        rows = layer.rows.detach()
        if center is None and gpu.on_gpu([rows]) and not layer.is_parametrized and not is_dtensor(rows):
            bias = bias.detach() if bias is not None and taus["group"] else None
            return cls(layer, rows, bias, None, taus)
        weight, C = rows.clone(), None if center is None else center_of(layer, center)
        return cls(layer, weight, None if bias is None else by_rows(bias.detach().clone(), weight), C, taus)

    @property
    def in_place(self) -> bool:
        """Whether the layer's weight is what was worked on."""
        return not self.layer.is_parametrized and local(self.weight).data_ptr() == local(self.layer.rows).data_ptr()

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias, self.center) if t is not None]

    def like(self, tensors: Sequence[Tensor]) -> Job:
        """The same with other :attr:`tensors`."""
        names = [name for name in ("weight", "bias", "center") if getattr(self, name) is not None]
        return replace(self, **dict(zip(names, tensors, strict=True)))

    @property
    def results(self) -> list[Tensor]:
        """What of the copies lies here."""
        return [local(t) for t in (self.weight, self.bias) if t is not None]

    @property
    def keys(self) -> list[str]:
        """Of what a WarmState remembers."""
        return [f"{self.layer.name}.{g}" for g in range(self.layer.groups)]

    @property
    def cost(self) -> int:
        """About how many multiplications its proximal steps take; the same at every step and on every process."""
        size = self.weight.numel()
        return size * min(len(self.weight) // self.layer.groups, size // len(self.weight))


def center_of(layer: Layer, center: Layer) -> Tensor:
    """The center's rows, in the dtype, on the device and over the processes as the layer's."""
    rows, C = layer.rows.detach(), center.rows.detach()
    return (placed(C, rows) if is_dtensor(rows) else C).to(rows.dtype).to(rows.device)


def shrink(jobs: Sequence[Job], order: Sequence[str], fold: str, warm: WarmState) -> None:
    """Apply the penalties in turn to the jobs' copies, in place."""

    guard = _guard(jobs, warm)

    def nuclear(jobs: list[Job], taus: list[float], names: list[str]) -> None:
        centers = [job.center for job in jobs] if jobs and jobs[0].center is not None else None
        groups, weights = [job.layer.groups for job in jobs], [job.weight for job in jobs]
        calls = warm.calls
        functional.svt_(weights, taus, state=warm, center=centers, fold=fold, groups=groups, names=names)
        warm.calls = calls  # which counts steps: how often a process calls depends on what it owns

    steps: dict[str, Callable] = {
        "nuclear": nuclear,
        "group": partial(_group, guard=guard),
        "l1": partial(_l1, guard=guard),
    }
    for penalty in order:
        used = [job for job in jobs if job.taus[penalty] > 0]
        steps[penalty](used, [job.taus[penalty] for job in used], [job.layer.name for job in used])
    if guard:
        guard.all_finite = None


def _guard(jobs: Sequence[Job], warm: WarmState) -> Guard | None:
    """Of all penalties on one GPU, if the nuclear norm, which guards itself, is not the only one."""
    parts = [(part, job.layer.name) for job in jobs for part in job.results]
    devices = {part.device for part, _ in parts}
    alone = not any(job.taus["group"] > 0 or job.taus["l1"] > 0 for job in jobs)
    if (
        alone
        or len(devices) > 1
        or not gpu.on_gpu([part for part, _ in parts])
        or not all(job.in_place for job in jobs)
    ):
        return None
    guard = warm.guards.setdefault(devices.pop(), Guard())
    try:
        guard.look(*map(list, zip(*parts, strict=True)))
    except ValueError:
        for engine in warm.engines.values():
            engine.arriving = None  # which says the same
        raise
    return guard


def check(jobs: Sequence[Job]) -> None:
    """Raise ValueError, with the layer's name, for NaN or Inf in what lies here."""
    for job in jobs:
        for part in job.results:
            check_finite(part, job.layer.name)


def _group(jobs: list[Job], taus: list[float], names: list[str], guard: Guard | None) -> None:
    """Group lasso over neurons [weights, bias]."""
    whole = []  # of which no row is divided
    for job, tau, name in zip(jobs, taus, names, strict=True):
        if groups := column_groups(job.weight):
            shrink_rows_(job.results[0], *job.results[1:], tau=tau, groups=groups)
        else:
            whole.append((*_alike(job.results), job, tau, name))
    if not whole:
        return
    weights, biases, jobs, taus, names = map(list, zip(*whole, strict=True))
    if guard:
        functional.neurons_(weights, biases, torch.tensor(taus, dtype=torch.float64), guard.thresholds)
    else:
        functional.group_shrink_(weights, taus, biases=biases, names=names)
    for W, b, job in zip(weights, biases, jobs, strict=True):
        for part, result in zip(job.results, (W, b), strict=False):
            if result is not part:
                part.copy_(result)


def _alike(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """A weight and its bias, or None, in the wider of their dtypes."""
    weight, bias = parts[0], parts[1] if len(parts) > 1 else None
    if bias is None:
        return weight, None
    wide = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(wide), bias.to(wide)


def _l1(jobs: list[Job], taus: list[float], names: list[str], guard: Guard | None) -> None:
    weights = [job.weight for job in jobs]
    if guard:
        functional.elements_(weights, guard.thresholds(torch.tensor(taus, dtype=torch.float64)))
    else:
        functional.soft_threshold_(weights, taus, names=names)
