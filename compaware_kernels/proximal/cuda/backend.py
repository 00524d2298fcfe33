"""The engine's GPU route: which weights it takes, the plan it keeps with a WarmState, and what it reports.

Nothing here waits for the GPU: ranks and bounds are tensors on the device, and widths of the subspaces follow the ranks
of an earlier call, once those have arrived. A call in which a weight holds NaN or Inf changes nothing; its report says
so, and the next call raises.
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

REPORT = {name: i for i, name in enumerate(device_structs.REPORT)}
REFUSED = len(device_structs.METHODS) - 1
SOON, LATER = (1, 2, 4, 8), 16  # calls after which widths are looked at: a new plan takes as long as many steps
SLACK = 32  # columns that a basis may be too wide

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(weights: Sequence[Tensor]) -> bool:
    """Whether all are where kernels are launched."""
    return len(weights) > 0 and all(isinstance(W, Tensor) and W.device.type in cuda_launcher.LAUNCHERS for W in weights)


def takes(weights: Sequence[Tensor], functions: Sequence[Spectral], plain: bool) -> bool:
    """Whether this step does all of them; ``plain``: no center, no ball, nothing sharded."""
    if not on_gpu(weights):
        return False
    device = weights[0].device
    backend, reason = backends.choose("svt_", device, weights, functions, plain, kind="cuda")
    if reason:
        level = logging.WARNING if STEP.why_not(device) else logging.INFO
        backends.log_once("svt_", "layer by layer in plain PyTorch, not in one launch", reason, level)
    return backend is STEP


def _missing(device: torch.device) -> str:
    return backends.triton_missing() or cuda_launcher.missing(device, compiled=False)


def _declines(weights: Sequence[Tensor], functions: Sequence[Spectral], plain: bool) -> str:
    """Why not these weights; last, why the kernels for them do not compile."""
    if not plain:
        return "a center, a ball or shards are for the solver"
    if any(function.ramp is None for function in functions):
        return "a function of the singular values is no ramp"
    if len({W.device for W in weights}) > 1 or len({W.dtype for W in weights}) > 1 or weights[0].dtype not in DTYPES:
        return "one device and one dtype of fp32, bf16 and fp16 are wanted"
    if any(not W.numel() for W in weights):
        return "a weight is empty"
    return cuda_launcher.missing(weights[0].device)


STEP = backends.Backend("GPU step: all layers in 13 launches", _missing, _declines, quarantine.STEP)
for _op in backends.SPECTRAL_OPS:
    backends.TABLE[_op]["cuda"].insert(0, STEP)


class DeviceInfo(SvtInfo):
    """As :class:`SvtInfo`, from what a call has left on the GPU: tensors are made when they are asked for."""

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
    """A plan, and what one call leaves for the next; kept as long as the :class:`WarmState` it was made for."""

    def __init__(
        self, weights: Sequence[Tensor], keys: Sequence[str], state: WarmState, widths: dict[str, int], firm: bool
    ):
        from .plan import Plan  # which needs Triton

        self.like = _like(weights)
        batches = [W.view(-1, *W.shape[-2:]) for W in weights]
        self.counts = [len(W) for W in batches]
        matrices = [M for W in batches for M in W]
        self.keys = [f"{key}.{j}" for key, count in zip(keys, self.counts, strict=True) for j in range(count)]
        bases = [state.bases.get(key) for key in self.keys]
        columns = [widths.get(key, _width_of(V, M)) for key, V, M in zip(self.keys, bases, matrices, strict=True)]
        self.plan = Plan(matrices, columns, firm)
        for x, V in zip(self.plan.matrices, bases, strict=True):
            if x.k and V is not None and V.shape[0] == x.n:
                x.V[:, : V.shape[1]].copy_(V[:, : x.k])
                x.report[REPORT["known"]] = V.any()
        self.age, self.arriving = 0, None

    @property
    def bases(self) -> dict[str, Tensor]:
        return {key: x.V if x.k else x.W.new_empty(x.n, 0, dtype=torch.float32)
                for key, x in zip(self.keys, self.plan.matrices, strict=True)}  # fmt: skip

    def serves(self, weights: Sequence[Tensor], state: WarmState, firm: bool) -> bool:
        """Whether the weights are where they were, the state is as this has left it, and the plan has what it takes."""
        kept = all(state.bases.get(key) is x.V for key, x in zip(self.keys, self.plan.matrices, strict=True) if x.k)
        return kept and self.plan.firm >= firm and self.like == _like(weights)

    def wanted(self) -> dict[str, int]:
        """Other widths of the subspaces, by what has arrived of an earlier call; none, if the present ones will do."""
        if self.arriving is None or not self.arriving[1]():
            return {}
        found, self.arriving = self.arriving[0].tolist(), None
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
                widths[key] = _follow(x.k, width(int(report[REPORT["rank"]]), x.n))
        present = {key: x.k for key, x in zip(self.keys, self.plan.matrices, strict=True)}
        return widths if present | widths != present else {}

    def run(self, ramps: Sequence[tuple[float, float]], state: WarmState, tol: float, guard: Guard) -> None:
        """Queue one call; ``ramps``: tau and slope of each weight."""
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
            plan.captured, plan.captured_slopes = inputs, slopes  # which a replay reads again
            return
        found, event = torch.empty_like(plan.out, device="cpu", pin_memory=on_gpu), None
        found.copy_(plan.out, non_blocking=True)
        if on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.arriving = found, event.query if event else lambda: True

    def reports(self, weights: Sequence[Tensor], names: Sequence[str | None]) -> list[SvtInfo]:
        parts = self.plan.out.clone().split([size for x in self.plan.matrices for size in (len(REPORT), x.n)])
        infos, at = [], 0
        for W, count, name in zip(weights, self.counts, names, strict=True):
            rows = parts[2 * at : 2 * (at + count)]
            infos.append(DeviceInfo(rows[::2], rows[1::2], W.shape[:-2], name))
            at += count
        return infos


@dataclass
class _Kept:
    """What stays on a device between the calls with one warm state: remade where it is missing."""

    engine: Engine | None = None
    guard: Guard = field(default_factory=Guard)


_states: WeakKeyDictionary[WarmState, dict[torch.device, _Kept]] = WeakKeyDictionary()


def _kept(state: WarmState, device: torch.device) -> _Kept:
    return _states.setdefault(state, {}).setdefault(device, _Kept())


def engines(state: WarmState) -> dict[torch.device, Engine]:
    """The plans that are kept for a warm state, by device."""
    return {device: kept.engine for device, kept in _states.get(state, {}).items() if kept.engine}


def guard(state: WarmState, weights: Sequence[Tensor], names: Sequence[str]) -> Guard:
    """Have the device look whether the weights are finite, before operators change them.

    Raises:
        ValueError: a weight was not finite at an earlier step.
    """
    kept = _kept(state, weights[0].device)
    try:
        kept.guard.look(weights, names)
    except ValueError:
        if kept.engine:
            kept.engine.arriving = None  # which says the same
        raise
    return kept.guard


def shrink_(
    records: Sequence[Record], functions: Sequence[Spectral], tol: float, state: WarmState | None
) -> list[SvtInfo]:
    """:func:`compaware_kernels.proximal.solver.shrink_` of unfolded records that :func:`takes` has taken."""
    weights = [record.target for record in records]
    state = WarmState() if state is None else state
    device = weights[0].device
    kept = _kept(state, device)
    engine = kept.engine
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # no event may be asked then
    widths = engine.wanted() if engine and not capturing else {}
    ramps = [function.ramp for function in functions]
    firm = any(slope > 1 for _, slope in ramps)
    if engine is None or widths or not engine.serves(weights, state, firm):
        engine = kept.engine = Engine(weights, [record.key for record in records], state, widths, firm)
    engine.run(ramps, state, tol, kept.guard)
    state.remember(engine.bases)
    return engine.reports(weights, [record.name for record in records])


def _like(weights: Sequence[Tensor]) -> list[tuple]:
    return [(W.data_ptr(), W.shape, W.dtype) for W in weights]


def _width_of(V: Tensor | None, M: Tensor) -> int:
    """That of a basis which comes from a checkpoint, or from the CPU."""
    if V is None or is_small(M) or V.shape[0] != min(M.shape) or not V.shape[1]:
        return 0
    return width(V.shape[1] - SPARE, V.shape[0])


def _follow(k: int, wanted: int) -> int:
    """A width that is only a little too large stays."""
    return k if wanted and wanted <= k <= wanted + SLACK else wanted
