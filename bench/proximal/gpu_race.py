"""Timing of the SVT of all layers of a network on one GPU: baselines, CUDA events, and the predicted time.

Everything here also runs on the CPU, where it is tested.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor

import compaware_kernels as ck
from bench.common import workloads
from bench.models import step_model
from bench.proximal.cases import TAU
from bench.proximal.peers import gram_eigh, gram_eigh_fp64, newton_schulz_clip, shrink, svd

SLOW, VERY_SLOW = 1e3, 3.5e3  # ms: baselines slower than this run three times, or once
CALLS = 4  # calls until the state knows the ranks and has a basis of the step before
NEAREST = {(8, 0): "A100 80 GB SXM", (9, 0): "H100 SXM", (10, 0): "B200", (12, 0): "RTX 5090"}  # compute capability
MODELS = {"A100": NEAREST[8, 0], "H100": NEAREST[9, 0], "H200": "H200 SXM", "B200": "B200", "RTX 5090": "RTX 5090"}

Peer = Callable[[Sequence[Tensor]], object]
COLUMNS = ("ms", "predicted ms", "x svd", "error", "bound", "ok", "method")


def cupy_svd(batch: Tensor) -> Tensor:
    import cupy

    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        U, s, Vh = map(torch.from_dlpack, cupy.linalg.svd(cupy.from_dlpack(batch), full_matrices=False))
        return shrink(U, s, Vh.mT)


def one_by_one(peer: Callable[[Tensor, int], Tensor]) -> Peer:
    def run(weights):
        for W in weights:
            W.copy_(peer(W, 0))

    return run


def by_shape(peer: Callable[[Tensor], Tensor]) -> Peer:
    """Baseline that handles all matrices of one shape as one batch."""

    def run(weights):
        alike = defaultdict(list)
        for W in weights:
            alike[W.shape].append(W)
        for Ws in alike.values():
            torch._foreach_copy_(Ws, peer(torch.stack(Ws)).unbind())

    return run


def peers(device: str) -> dict[str, Peer]:
    """Baselines by name; the first is the loop of SVDs, to which the ratios are taken."""
    found = {"svd": one_by_one(svd)}
    if device == "cuda" and find_spec("cupy"):
        found["cupy svd, batched"] = by_shape(cupy_svd)
    grams = {"gram, eigh": one_by_one(gram_eigh), "gram, eigh in fp64": one_by_one(gram_eigh_fp64)}
    return found | grams | {"newton-schulz": one_by_one(newton_schulz_clip)}


def milliseconds(function: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Ours:
    """:func:`compaware_kernels.svt_` with a warm state; ``reset`` restores the state from before the last call."""

    def __init__(self, weights: Sequence[Tensor], next_weights: Callable[[], Sequence[Tensor]]):
        self.weights, self.state = [W.clone() for W in weights], ck.WarmState()
        for _ in range(CALLS):
            torch._foreach_copy_(self.weights, next_weights())
            ck.svt_(self.weights, TAU, state=self.state, fold=None)
        self.saved = {key: V.clone() for key, V in self.state.bases.items()}

    def reset(self, weights: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.weights, weights)
        for key, V in self.state.bases.items():
            saved = self.saved[key]
            if V.shape == saved.shape:
                V.copy_(saved)
            else:
                self.state.bases[key] = saved.clone()

    def __call__(self) -> list[ck.SvtInfo]:
        return ck.svt_(self.weights, TAU, state=self.state, fold=None)


def race(ours: Ours, weights: Sequence[Tensor], truths: Sequence[Tensor], device: str, rounds: int = 9) -> dict:
    """By name: median ms, error, error bound, correctness, method. Every round runs each once."""
    scratch = [W.clone() for W in weights]
    work = {"compaware": ours} | {name: lambda peer=peer: peer(scratch) for name, peer in peers(device).items()}
    times, checked = defaultdict(list), {}

    def once(name):
        torch._foreach_copy_(scratch, weights)
        ours.reset(weights)
        result = []
        took = milliseconds(lambda: result.append(work[name]()), device)
        return took, result[0]

    for name in work:
        took, infos = once(name)
        results, infos = (ours.weights, infos) if name == "compaware" else (scratch, None)
        methods = dict.fromkeys(info.method for info in infos) if infos else ()
        checked[name] = *workloads.check(results, truths, infos), ", ".join(methods)
        if took > VERY_SLOW:
            times[name].append(took)
    for _ in range(rounds):
        for name in work:
            done = times[name]
            if len(done) < (1 if done and done[0] > VERY_SLOW else 3 if done and done[0] > SLOW else rounds):
                done.append(once(name)[0])
    return {name: (median(times[name]), *checked[name]) for name in work}


def table(found: dict, predicted: float | None) -> dict[str, dict]:
    """Rows by name with the columns COLUMNS; a wrong result has no ratio."""
    svd_ms, result = found["svd"][0], {}
    for name, (ms, error, bound, ok, method) in found.items():
        row = ms, predicted if name == "compaware" else None, svd_ms / ms if ok else None, error, bound, ok, method
        result[name] = dict(zip(COLUMNS, row, strict=True))
    return result


def chip_of(name: str, capability: tuple[int, int]) -> tuple[str, str]:
    """(The chip of step_model.py that is nearest to this GPU, a remark if it is another one.)"""
    for part, chip in MODELS.items():
        if part in name:
            return chip, ""
    near = min(NEAREST, key=lambda known: abs(10 * (known[0] - capability[0]) + known[1] - capability[1]))
    return NEAREST[near], f"no data of {name}, sm_{capability[0]}{capability[1]}: predicted as if it were this"


def prediction(chip: str, weights: Sequence[Tensor], share: float | int | None) -> float:
    """Predicted milliseconds; ``share`` as in step_model.plan_of."""
    plan = step_model.plan_of([tuple(W.shape) for W in weights], share)
    beta = max(float(W.norm() / TAU) ** 2 for W in weights)
    return 1e3 * step_model.predict(step_model.GPUS[chip], plan, beta).seconds


def versions() -> str:
    cupy = "no CuPy"
    if find_spec("cupy"):
        import cupy as module

        cupy = f"CuPy {module.__version__}"
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {cupy}, compaware_kernels {ck.__version__}"
