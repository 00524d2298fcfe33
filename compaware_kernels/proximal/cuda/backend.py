"""GPU backend of the solver: which weights it accepts, the plan cached per WarmState, and its reports.

No device-to-host synchronization: ranks and error bounds stay on the device, and subspace widths follow the ranks of an
earlier call once their asynchronous copy has completed. If a weight holds NaN or Inf, the call changes nothing, its
report says so, and a later call raises.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...ops import backends, cuda_launcher, quarantine
from ..record import Record
from ..spectral_functions import Spectral
from ..svt_info import SvtInfo
from ..warm_state import WarmState
from . import device_structs
from .finite_guard import Guard
from .sizes import SPARE, is_small, width

__all__ = [
    "DTYPES",
    "LATER",
    "REFUSED",
    "REPORT",
    "SLACK",
    "SOON",
    "STEP",
    "DeviceInfo",
    "Engine",
    "engines",
    "guard",
    "on_gpu",
    "shrink_",
    "takes",
]

REPORT = {name: i for i, name in enumerate(device_structs.REPORT)}
REFUSED = len(device_structs.METHODS) - 1
SOON, LATER = (1, 2, 4, 8), 16  # calls after which widths are revised, rarely: a new plan costs as much as many steps
SLACK = 32  # a basis may be this many columns wider than needed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(weights: Sequence[Tensor]) -> bool:
    """Whether all weights are on a device for which kernels can be launched."""
    return len(weights) > 0 and all(isinstance(W, Tensor) and W.device.type in cuda_launcher.LAUNCHERS for W in weights)


def takes(weights: Sequence[Tensor], functions: Sequence[Spectral], plain: bool) -> bool:
    """Whether the GPU step serves all weights; ``plain``: no center, no ball, nothing sharded. Logs why not."""
    if not on_gpu(weights):
        return False
    device = weights[0].device
    backend, reason = backends.choose("svt_", device, weights, functions, plain, kind="cuda")
    if reason:
        level = logging.WARNING if STEP.why_not(device) else logging.INFO
        backends.log_once("svt_", "layer by layer in plain PyTorch, not in one launch", reason, level)
    return backend is STEP


def _missing(device: torch.device) -> str:
    """Why the GPU step is unavailable on this device; empty if it is available."""
    return backends.triton_missing() or cuda_launcher.missing(device, compiled=False)


def _declines(weights: Sequence[Tensor], functions: Sequence[Spectral], plain: bool) -> str:
    """Why the GPU step does not serve these weights; empty if it does. Compiling the kernels is tried last."""
    if not plain:
        return "a center, a spectral ball and sharded weights are served by the solver only"
    if any(function.ramp is None for function in functions):
        return "functions: wanted soft or firm thresholds"
    if len({W.device for W in weights}) > 1 or len({W.dtype for W in weights}) > 1 or weights[0].dtype not in DTYPES:
        return "weights: wanted one device and one dtype, fp32, bf16 or fp16"
    if any(not W.numel() for W in weights):
        return "a weight is empty"
    return cuda_launcher.missing(weights[0].device)


STEP = backends.Backend("GPU step: all layers in 13 launches", _missing, _declines, quarantine.STEP)
for _op in backends.SPECTRAL_OPS:
    backends.TABLE[_op]["cuda"].insert(0, STEP)


class DeviceInfo(SvtInfo):
    """SvtInfo whose tensors are read lazily from the report of a call on the GPU."""

    def __init__(self, reports: Sequence[Tensor], spectra: Sequence[Tensor], batch: torch.Size, name: str | None):
        super().__init__(None, None, None, name=name)
        self.__dict__.update(_reports=reports, _spectra=spectra, _batch=batch)

    def _number(self, what: str) -> Tensor:
        return torch.stack([report[REPORT[what]] for report in self._reports]).reshape(self._batch)

    def _methods(self) -> str:
        return " + ".join(dict.fromkeys(device_structs.METHODS[int(code)] for code in self._number("method").flatten()))

    def __getattribute__(self, name: str):
        if name == "rank":
            return self._number("rank").long()
        if name == "error_bound":
            return self._number("error")
        if name == "s":
            return torch.stack(self._spectra).reshape(*self._batch, -1)
        return self._methods() if name == "method" else super().__getattribute__(name)


class Engine:
    """Cached plan for a list of weights on one device, and the results of its last call.

    Lives as long as the :class:`WarmState` it was made for.
    """

    def __init__(
        self, weights: Sequence[Tensor], keys: Sequence[str], state: WarmState, widths: dict[str, int], firm: bool
    ):
        from .plan import Plan  # imported late: needs Triton

        self.signature = _signature(weights)
        batches = [W.view(-1, *W.shape[-2:]) for W in weights]
        self.counts = [len(W) for W in batches]
        matrices = [M for W in batches for M in W]
        self.keys = [f"{key}.{j}" for key, count in zip(keys, self.counts, strict=True) for j in range(count)]
        bases = [state.bases.get(key) for key in self.keys]
        columns = [widths.get(key, _initial_width(V, M)) for key, V, M in zip(self.keys, bases, matrices, strict=True)]
        self.plan = Plan(matrices, columns, firm)
        for x, V in zip(self.plan.matrices, bases, strict=True):
            if x.k and V is not None and V.shape[0] == x.n:
                x.V[:, : V.shape[1]].copy_(V[:, : x.k])
                x.report[REPORT["known"]] = V.any()
        self.age, self.pending = 0, None

    @property
    def bases(self) -> dict[str, Tensor]:
        """Bases for the warm state: key of a matrix -> ``[n, k]`` fp32, k = 0 without a subspace."""
        return {key: x.V if x.k else x.W.new_empty(x.n, 0, dtype=torch.float32)
                for key, x in zip(self.keys, self.plan.matrices, strict=True)}  # fmt: skip

    def serves(self, weights: Sequence[Tensor], state: WarmState, firm: bool) -> bool:
        """Whether the plan is still valid: same weight addresses, same bases in the state, firm passes if needed."""
        same = all(state.bases.get(key) is x.V for key, x in zip(self.keys, self.plan.matrices, strict=True) if x.k)
        return same and self.plan.firm >= firm and self.signature == _signature(weights)

    def wanted(self) -> dict[str, int]:
        """New subspace widths by key, from the report of an earlier call; empty if it is pending or they still fit.

        Raises:
            ValueError: a weight held NaN or Inf at that call.
        """
        if self.pending is None or not self.pending[1]():
            return {}
        found, self.pending = self.pending[0].tolist(), None
        starts = accumulate((len(REPORT) + x.n for x in self.plan.matrices[:-1]), initial=0)
        reports = [found[start : start + len(REPORT)] for start in starts]
        if any(report[REPORT["method"]] == REFUSED for report in reports):
            broken = [key for key, x in zip(self.keys, self.plan.matrices, strict=True) if not x.W.isfinite().all()]
            name = broken[0].rpartition(".")[0] if broken else "a weight"
            raise ValueError(f"{name}: contained NaN or Inf at the last call; nothing was changed, then or now")
        self.age += 1
        if self.age not in SOON and self.age % LATER:
            return {}
        widths = {}
        for key, x, report in zip(self.keys, self.plan.matrices, reports, strict=True):
            if not is_small(x.W) and report[REPORT["rank"]] >= 0:
                widths[key] = _next_width(x.k, width(int(report[REPORT["rank"]]), x.n))
        present = {key: x.k for key, x in zip(self.keys, self.plan.matrices, strict=True)}
        return widths if present | widths != present else {}

    def run(self, ramps: Sequence[tuple[float, float]], state: WarmState, tol: float, guard: Guard) -> None:
        """Enqueue one step on the current stream; ``ramps``: (tau, slope) of each weight."""
        from . import step

        plan, on_gpu = self.plan, self.plan.device.type == "cuda"
        each = [ramp for ramp, count in zip(ramps, self.counts, strict=True) for _ in range(count)]
        taus, slopes = zip(*each, strict=True)
        inputs = torch.tensor([*taus, state.seed, state.calls], dtype=torch.float64, pin_memory=on_gpu)
        plan.inputs.copy_(inputs, non_blocking=True)
        if plan.firm:
            slopes = torch.tensor(slopes, dtype=torch.float64, pin_memory=on_gpu)
            plan.slopes.copy_(slopes, non_blocking=True)
        if guard.all_finite is not None:
            plan.inputs[:-2].mul_(guard.all_finite)
        step.run(plan, tol)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            plan.captured, plan.captured_slopes = inputs, slopes  # kept alive: a graph replay reads them again
            return
        found, event = torch.empty_like(plan.out, device="cpu", pin_memory=on_gpu), None
        found.copy_(plan.out, non_blocking=True)
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.pending = found, event.query if event else lambda: True

    def reports(self, weights: Sequence[Tensor], names: Sequence[str | None]) -> list[SvtInfo]:
        """One lazy report per weight, from a device copy of the results."""
        parts = self.plan.out.clone().split([size for x in self.plan.matrices for size in (len(REPORT), x.n)])
        infos, at = [], 0
        for W, count, name in zip(weights, self.counts, names, strict=True):
            rows = parts[2 * at : 2 * (at + count)]
            infos.append(DeviceInfo(rows[::2], rows[1::2], W.shape[:-2], name))
            at += count
        return infos


@dataclass
class _DeviceCache:
    """Cache of one warm state on one device; rebuilt if missing."""

    engine: Engine | None = None
    guard: Guard = field(default_factory=Guard)


_caches: WeakKeyDictionary[WarmState, dict[torch.device, _DeviceCache]] = WeakKeyDictionary()


def _device_cache(state: WarmState, device: torch.device) -> _DeviceCache:
    return _caches.setdefault(state, {}).setdefault(device, _DeviceCache())


def engines(state: WarmState) -> dict[torch.device, Engine]:
    """Cached engines of a warm state, by device."""
    return {device: cache.engine for device, cache in _caches.get(state, {}).items() if cache.engine}


def guard(state: WarmState, weights: Sequence[Tensor], names: Sequence[str]) -> Guard:
    """Guard of the weights: the device checks that all are finite, before operators change them.

    Raises:
        ValueError: a weight was not finite at an earlier step.
    """
    cache = _device_cache(state, weights[0].device)
    try:
        cache.guard.look(weights, names)
    except ValueError:
        if cache.engine:
            cache.engine.pending = None  # would report the same error again
        raise
    return cache.guard


def shrink_(
    records: Sequence[Record], functions: Sequence[Spectral], tol: float, state: WarmState | None
) -> list[SvtInfo]:
    """Spectral function of every unfolded record by one GPU step, in place; :func:`takes` must hold."""
    weights = [record.target for record in records]
    state = WarmState() if state is None else state
    device = weights[0].device
    cache = _device_cache(state, device)
    engine = cache.engine
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # no event queries then
    widths = engine.wanted() if engine and not capturing else {}
    ramps = [function.ramp for function in functions]
    firm = any(slope > 1 for _, slope in ramps)
    if engine is None or widths or not engine.serves(weights, state, firm):
        engine = cache.engine = Engine(weights, [record.key for record in records], state, widths, firm)
    engine.run(ramps, state, tol, cache.guard)
    state.remember(engine.bases)
    return engine.reports(weights, [record.name for record in records])


def _signature(weights: Sequence[Tensor]) -> list[tuple]:
    """Address, shape and dtype of each weight: a plan is valid only for these."""
    return [(W.data_ptr(), W.shape, W.dtype) for W in weights]


def _initial_width(V: Tensor | None, M: Tensor) -> int:
    """Subspace width for a matrix with basis V from the warm state, e.g. of a checkpoint; 0 without a usable one."""
    if V is None or is_small(M) or V.shape[0] != min(M.shape) or not V.shape[1]:
        return 0
    return width(V.shape[1] - SPARE, V.shape[0])


def _next_width(k: int, wanted: int) -> int:
    """The new width; k is kept if it is too large by at most SLACK columns, to avoid a new plan."""
    return k if wanted and wanted <= k <= wanted + SLACK else wanted
