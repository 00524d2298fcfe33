"""Self-test of the GPU kernels against fp64 references, in small cases: ``compaware info --selftest``.

Kernels are called without fallback, each family in its own process: a hang or illegal memory access ends only that one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._utils.dtypes import compute_dtype, nearest_tf32
from .ops import backends, cuda_launcher, quarantine, shrinkage
from .proximal.spectral_functions import FirmThreshold, SoftThreshold, Spectral

__all__ = ["CASES", "Case", "Row", "check", "main", "missing", "parse", "record", "run", "table"]
TIMEOUT = 1200  # seconds per family; the first run includes minutes of Triton compilation
TAU, TOL = 1.0, 1e-3
SOFT, FIRM = SoftThreshold(TAU), FirmThreshold(TAU, gamma=3.0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Row(NamedTuple):
    """Result of one case; ``error``: largest error / its bound, at most 1 if it passed."""

    family: str
    name: str
    error: float | None = None
    milliseconds: float | None = None
    failed: str = ""
    skipped: str = ""


class Case(NamedTuple):
    """Test case: ``judge(work())`` is the largest error / its bound; raises AssertionError for any other failure."""

    work: Callable
    judge: Callable


def run(device: int) -> list[Row]:
    """Run all kernel families on one GPU, each in its own process."""
    return [row for family in CASES for row in _in_process(family, device)]


def record(device: torch.device, rows: list[Row]) -> Path:
    """Record the verdicts for this and later processes: a family with a failed case is not used.  Returns the file."""
    tested = [row.family for row in rows if not row.skipped]
    failed = {row.family: f"{row.name}: {row.failed}" for row in reversed(rows) if row.failed}
    file = quarantine.record(device, {family: failed.get(family, "") for family in tested})
    backends.replace_shrink()
    return file


def _in_process(family: str, device: int) -> list[Row]:
    command = [sys.executable, "-m", __name__, family, str(device)]
    env = os.environ | {"COMPAWARE_VERDICTS": "ignore"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as late:
        return parse(family, (late.stdout or b"").decode(), f"no answer within {TIMEOUT} s")
    lines = done.stderr.strip().splitlines()
    end = f"its process ended with {done.returncode}" + (f": {lines[-1][:200]}" if lines else "")
    return parse(family, done.stdout, end if done.returncode else "")


def parse(family: str, output: str, end: str) -> list[Row]:
    """Rows that a process printed; if it failed (``end``: how), also one for the case that was running."""
    rows, running = [], "start"
    for line in output.splitlines():
        if line.startswith("begin "):
            running = line.removeprefix("begin ")
        elif line.startswith("row "):
            rows.append(Row(*json.loads(line.removeprefix("row "))))
    return [*rows, Row(family, running, failed=end)] if end else rows


def check(family: str, device: torch.device) -> Iterator[Row]:
    """Run the cases of a family in this process."""
    if reason := missing(family, device):
        yield Row(family, "all", skipped=reason)
        return
    for name, make in CASES[family].items():
        print(f"begin {name}", flush=True)
        error = elapsed = None
        try:
            case = make(device)
            error = float(case.judge(case.work()))  # the first call compiles
            elapsed = _milliseconds(case.work, device)
            failed = "" if error <= 1 else f"error {error:.3g} times its bound"
        except Exception as wrong:  # any failure of the kernel is a result of the test
            failed = " ".join(f"{type(wrong).__name__}: {wrong}".split())[:300]
        yield Row(family, name, error, elapsed, failed)


def _milliseconds(work: Callable, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """Table rows as text: family, case, verdict, error / bound, milliseconds."""

    def number(x: float | None, form: str) -> str:
        return "" if x is None else format(x, form)

    return [(row.family, row.name, f"FAILED: {row.failed}" if row.failed else row.skipped or "passed",
             number(row.error, ".2g"), number(row.milliseconds, ".3f")) for row in rows]  # fmt: skip


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- shrink -----------------------------------------------------------------------------------------------------------


def _shrink(name: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Shrink op and its in-place form, on rows that one warp or one block processes, of which some become zero."""
    weights = [(torch.logspace(-2, 1, m)[:, None] * _normal(m, n)).to(device, dtype) for m, n in ((65, 33), (9, 1500))]
    op, in_place = (getattr(torch.ops.compaware, name + end) for end in ("", "_"))
    taus = [torch.tensor(tau, device=device) for tau in ((0.1, 0.5) if name == "sparse_group_shrink" else (0.5,))]

    def work() -> list[tuple[Tensor, Tensor]]:
        copies = [W.clone() for W in weights]
        in_place(copies, *(tau.double().cpu().expand(len(weights)) for tau in taus))
        return [(op(W, *taus), copy) for W, copy in zip(weights, copies, strict=True)]

    def judge(results) -> float:
        body = getattr(shrinkage, name)._init_fn
        return max(_relative_error(got, body(W.double(), *(tau.double() for tau in taus)), body(W, *taus))
                   for W, both in zip(weights, results, strict=True) for got in both)  # fmt: skip

    return Case(work, judge)


def _neurons(dtype: torch.dtype, device: torch.device) -> Case:
    """neuron_shrink_: rows whose last entry is a bias in another tensor."""
    whole = [(torch.logspace(-2, 1, m)[:, None] * _normal(m, n)).to(device, dtype) for m, n in ((65, 33), (9, 1500))]
    tau = torch.tensor(0.5)

    def work() -> list[Tensor]:
        weights, biases = [W[:, :-1].contiguous() for W in whole], [W[:, -1].contiguous() for W in whole]
        torch.ops.compaware.neuron_shrink_(weights, biases, tau.double().expand(len(whole)))
        return [torch.cat([W, b[:, None]], -1) for W, b in zip(weights, biases, strict=True)]

    def judge(results) -> float:
        body, here = shrinkage.group_shrink._init_fn, tau.to(device)
        return max(_relative_error(got, body(W.double(), here.double()), body(W, here))
                   for W, got in zip(whole, results, strict=True))  # fmt: skip

    return Case(work, judge)


def _relative_error(got: Tensor, truth: Tensor, plain: Tensor) -> float:
    """Largest error / (twice that of plain PyTorch + 8 ulps of the largest entry, in the compute dtype)."""
    error, lost = ((y.double() - truth).abs().max() for y in (got, plain))
    return float(error / (2 * lost + 8 * torch.finfo(compute_dtype(got.dtype)).eps * truth.abs().max()))


# --- step -------------------------------------------------------------------------------------------------------------


def _products(precision: str, wide: bool, dtype: torch.dtype, device: torch.device) -> Case:
    """Matrix program of two stages and two layers of different shapes, with views and an epilogue, against fp64."""
    from .proximal.cuda.matmul_program import Program

    program, inner = Program(2, precision), torch.float64 if wide else torch.float32
    coef = torch.tensor([-0.5, 1.5, 0.25], dtype=torch.float64, device=device)
    counters = torch.zeros(program.counters, dtype=torch.int32, device=device)
    listed = []
    for stage in range(2):
        for layer, (m, n, k) in enumerate([(70, 33, 100), (40, 96, 65)]):
            if stage:
                A, B = listed[layer][2].mT, _normal(m, k, seed=layer).to(device, inner)
                D = _normal(n, k, seed=7).to(device, inner)
                C = torch.empty_like(D)
                program.multiply(layer, A, B, C, plus=D, coef=coef, wide=wide)
            else:
                A, B = _normal(m, k, seed=layer).to(device, dtype), _normal(n, k, seed=3).to(device, inner).mT
                C, D = torch.empty(m, n, dtype=inner, device=device), None
                program.multiply(layer, A, B, C, wide=wide)
            listed.append((A, B, C, D))
        program.stage()
    program.build(device)

    def work() -> None:
        counters.zero_()
        program.run(counters)

    def judge(_) -> float:
        unit = 2.0**-53 if wide else 2.0**-24
        return max(
            _product_error(*each, unit, 2.0**-19 if precision == "tf32x3" and not wide else 0) for each in listed
        )

    return Case(work, judge)


def _product_error(A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, unit: float, parts: float) -> float:
    """Largest error / the rounding bound of a sum of k products; ``parts``: relative error of splitting the factors."""
    A, B, C = A.double(), B.double(), C.double()
    truth, size = A @ B, A.abs() @ B.abs()
    if D is not None:
        truth = 1.5 * D.double() - 0.5 * truth + 0.25 * torch.eye(*C.shape, dtype=C.dtype, device=C.device)
        size = 1.5 * D.double().abs() + 0.5 * size + 0.25
    return float(((C - truth).abs() / (((A.shape[1] + 8) * 2 * unit + parts) * size)).max())


def _low_rank(m: int, n: int, rank: int, seed: int) -> Tensor:
    """Matrix ``[m, n]`` with ``rank`` singular values from 1.5 to 20, plus noise of spectral norm 0.4 (tau is 1)."""
    U, V = (torch.linalg.qr(_normal(k, rank, seed=seed)).Q for k in (m, n))
    noise = _normal(m, n, seed=seed + 1)
    return (U * torch.logspace(math.log10(1.5), math.log10(20), rank)) @ V.mT + 0.4 * noise / torch.linalg.matrix_norm(
        noise, 2
    )


LARGE = ((136, 64, 6), (66, 144, 4))
SMALL = ((20, 12, 3), (40, 48, 9))


def _step(shapes, calls: int, method: str, function: Spectral, dtype: torch.dtype, device: torch.device) -> Case:
    """Spectral prox step: the last of several calls with one warm state must use ``method`` and report the rank."""
    from .proximal.warm_state import WarmState

    before = [_low_rank(*shape, seed=10 * i).to(device, dtype) for i, shape in enumerate(shapes)]
    weights, state = [W.clone() for W in before], WarmState()

    def call():
        for W, X in zip(weights, before, strict=True):
            W.copy_(X)
        infos = _apply(function, weights, state)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # wait for the ranks, by which the next call chooses its method
        return infos

    def work():
        return [call() for _ in range(calls if state.calls == 0 or calls == 1 else 1)][-1]

    def judge(infos) -> float:
        taken = {info.method for info in infos}
        assert not method or taken == {method}, f"wanted {method}, took {', '.join(sorted(taken))}"
        return max(_step_error(function, *each) for each in zip(weights, before, infos, strict=True))

    return Case(work, judge)


def _apply(function: Spectral, weights: list[Tensor], state) -> list:
    """The GPU step, even if an earlier self-test has quarantined it."""
    from .proximal.cuda.backend import shrink_
    from .proximal.record import Record, unfold_all

    records = [Record(W, index=i, fold=None) for i, W in enumerate(weights)]
    unfold_all(records)
    infos = shrink_(records, [function] * len(records), TOL, state)
    state.advance()
    return infos


def _step_error(function: Spectral, W: Tensor, X: Tensor, info) -> float:
    U, s, Vh = torch.linalg.svd(X.double().cpu(), full_matrices=False)
    error = W.double().cpu() - (U * function(s)) @ Vh
    rank, bound = int((s > TAU).sum()), float(info.error_bound)
    assert int(info.rank) == rank, f"wanted rank {rank}, got {int(info.rank)}"
    assert math.isfinite(bound), f"wanted a finite bound, got {bound}"
    allowed = TOL * TAU + 2 * torch.finfo(W.dtype).eps * float(s.norm())
    return max(float(error.norm()) / bound, float(torch.linalg.matrix_norm(error, 2)) / allowed)


def _unchanged_by_nan(dtype: torch.dtype, device: torch.device) -> Case:
    """All-or-nothing step: with NaN in one weight, no weight of the network may change."""
    from .proximal.warm_state import WarmState

    before = [_low_rank(*shape, seed=0).to(device, dtype) for shape in (LARGE[0], SMALL[0])]
    before[1][3, 4] = torch.nan
    weights = [W.clone() for W in before]

    def judge(infos) -> float:
        assert all(torch.equal(W.isnan(), X.isnan()) for W, X in zip(weights, before, strict=True)), "NaN has spread"
        assert all(torch.equal(W.nan_to_num(), X.nan_to_num()) for W, X in zip(weights, before, strict=True)), "changed"
        assert infos[0].method.startswith("refused"), f"wanted refused, got {infos[0].method}"
        return 0.0

    return Case(lambda: _apply(SOFT, weights, WarmState()), judge)


# --- low rank ---------------------------------------------------------------------------------------------------------


@contextmanager
def _precision(wanted: str):
    """Context with torch's fp32 precision of convolutions and matrix products, which the kernel follows, set."""
    places = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = wanted
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def _conv2d(precision: str, dtype: torch.dtype, device: torch.device) -> Case:
    geometry = ((2, 1), (1, 1), (1, 1))
    x, V, U = _normal(2, 24, 9, 8), _normal(9, 24, 3, 3) / 216**0.5, _normal(40, 9, 1, 1) / 3
    args = [t.to(device, dtype) for t in (x, V, U, _normal(40), _normal(2, 40, 5, 8))]
    return _fused("lowrank_conv2d", args, precision, lambda x, V: F.conv2d(x, V, None, *geometry), F.conv2d, geometry)


def _linear(precision: str, dtype: torch.dtype, device: torch.device) -> Case:
    x, V, U = _normal(5, 7, 72), _normal(17, 72) / 72**0.5, _normal(40, 17) / 17**0.5
    args = [t.to(device, dtype) for t in (x, V, U, _normal(40), _normal(5, 7, 40))]
    return _fused("lowrank_linear", args, precision, F.linear, F.linear, ())


def _fused(name: str, args: list[Tensor], precision: str, first, second, geometry) -> Case:
    from .ops import triton_lowrank

    def two_steps(x, V, U, bias, residual, rounded=lambda t: t):
        y = second(rounded(first(rounded(x), rounded(V))), rounded(U), bias)
        return F.gelu(y + residual)

    def work() -> Tensor:
        with _precision(precision):
            return getattr(triton_lowrank, name)(*args, *geometry, activation="gelu")

    def judge(got: Tensor) -> float:
        with _precision("ieee"):
            plain = two_steps(*args, rounded=nearest_tf32 if precision == "tf32" else lambda t: t)
            return _relative_error(got, two_steps(*(t.double() for t in args)), plain)

    return Case(work, judge)


# --- all --------------------------------------------------------------------------------------------------------------


OPS = {quarantine.SHRINK: "soft_threshold", quarantine.STEP: "svt_", quarantine.LOW_RANK: "lowrank_linear"}


def missing(family: str, device: torch.device) -> str:
    """Why the family's kernels are unavailable on the device and cannot be tested; "" if they can."""
    backend = next(backend for backend in backends.TABLE[OPS[family]]["cuda"] if backend.family == family)
    return backend.missing(device) or (cuda_launcher.missing(device) if family == quarantine.STEP else "")


_ROUTES = {
    "small": partial(_step, SMALL, 1, "", SOFT),
    "cold": partial(_step, LARGE, 1, "products", SOFT),
    "warm": partial(_step, LARGE, 4, "subspace", SOFT),
    "firm small": partial(_step, SMALL, 1, "", FIRM),
    "firm cold": partial(_step, LARGE, 1, "products", FIRM),
    "firm warm": partial(_step, LARGE, 4, "subspace", FIRM),
    "NaN": _unchanged_by_nan,
}
_SHRINK_OPS = ("soft_threshold", "group_shrink", "sparse_group_shrink")  # each also in place
_SHRINK_DTYPES = DTYPES | {"fp64": torch.float64}
CASES: dict[str, dict[str, Callable[[torch.device], Case]]] = {
    quarantine.SHRINK: {f"{op}, {name}": partial(_shrink, op, dtype)
                      for op in _SHRINK_OPS for name, dtype in _SHRINK_DTYPES.items()}
                     | {f"neuron_shrink_, {name}": partial(_neurons, dtype) for name, dtype in _SHRINK_DTYPES.items()},
    quarantine.STEP: {f"matrix program, {how}, {name}": partial(_products, precision, how == "fp64", dtype)
                    for how, precision in (("ieee", "ieee"), ("tf32x3", "tf32x3"), ("fp64", "tf32x3"))
                    for name, dtype in DTYPES.items()}
                   | {f"step, {route}, {name}": partial(make, dtype)
                      for route, make in _ROUTES.items() for name, dtype in DTYPES.items()},
    quarantine.LOW_RANK: {f"{op}, {name}": partial(make, "tf32" if name == "tf32" else "ieee", dtype)
                        for op, make in (("lowrank_conv2d", _conv2d), ("lowrank_linear", _linear))
                        for name, dtype in (*DTYPES.items(), ("tf32", torch.float32))},
}  # fmt: skip


def main(family: str, index: str) -> None:
    """Child process: run one family on one GPU and print its rows for the parent."""
    torch.cuda.set_device(int(index))
    for row in check(family, torch.device("cuda", int(index))):
        print("row", json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
