"""Seeded cases that try to break the error bounds and the tolerance of the proximal engine.

    python tests/hunt.py 20000 --seed 0 [--family "tau +- 1 ulp"]

``case(seed)`` makes a case, ``check`` runs it against the fp64 truth. The bound has to hold whatever the matrix, the scale
and the state; no finite input may be refused.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import oracle
import scipy.linalg
import torch
import typer
from rich.progress import track

import compaware_kernels as ck
from compaware_kernels import engine

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = {
    "svt_": oracle.svt,
    "spectral_ball_": lambda X, t: oracle.project_dual("svt", X, t),
    "weighted_svt_": lambda X, w: oracle.svt(X, w),
    "truncate_": lambda X, r: X * 0 if r == 0 else _truncate(X, r),
}


@dataclass
class Case:
    name: str
    op: str
    calls: list[list[torch.Tensor]]  # the weights of every call
    parameter: list  # tau, weights or rank of every layer
    kwargs: dict
    state: ck.WarmState | None = None
    forced: bool = False  # the subspace route, also where it does not pay
    cold: int = engine.COLD


@dataclass
class Measured:
    """One matrix of one call."""

    route: str
    ratio: float = math.inf  # bound / error
    use: float = 0.0  # spectral error beyond rounding / (tol tau)
    problems: list[str] = field(default_factory=list)


def _truncate(X, r):
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    return (U[:, :r] * s[:r]) @ Vh[:r]


# --- matrices: each is [m, n] in fp64, with its values in the order of 1 and of up to `ratio` -----------------------


def _log(k, ratio, rng):
    return np.logspace(np.log10(ratio), -9, k)


def _near(width: float) -> Callable:
    def spectrum(k, ratio, rng):
        r = rng.integers(0, min(k, 9))
        return np.r_[np.geomspace(ratio, 1.2, r), rng.uniform(1 - width, 1 + width, k - r)]

    return spectrum


def _ulps(k, ratio, rng):
    near = np.float32(1) + rng.choice([-0.5, 0, 1, 2], k) * np.finfo(np.float32).eps
    return np.where(np.arange(k) < rng.integers(0, 3), ratio, near)


SPECTRA = {
    "log-spaced": _log,
    "half zeros": lambda k, ratio, rng: np.where(np.arange(k) < k // 2, np.linspace(ratio, 0.1, k), 0),
    "few above": lambda k, ratio, rng: np.where(np.arange(k) < 6, np.geomspace(ratio, 1.01, k), 0.99 * rng.random(k)),
    "ties": lambda k, ratio, rng: np.resize([ratio, 2, 1, 0.25], k),
    "tau +- 1 ulp": _ulps,
    "cluster at tau": _near(0.1),
    "tight cluster at tau": _near(1e-5),
    "slow decay below tau": lambda k, ratio, rng: np.r_[ratio, np.linspace(0.9999, 0.7, k)][:k],
    "slow decay across tau": lambda k, ratio, rng: ratio * np.arange(1, k + 1) ** -rng.uniform(0.2, 1.5),
    "one large": lambda k, ratio, rng: np.r_[ratio, np.full(k, rng.choice([0.5, 1.0, 1.5]))][:k],
    "rank 1": lambda k, ratio, rng: np.where(np.arange(k) == 0, ratio, 0),
}


def _with_spectrum(spectrum: Callable) -> Callable:
    def matrix(m, n, ratio, rng):
        k = min(m, n)
        U, V = (np.linalg.qr(rng.standard_normal((d, k)))[0] for d in (m, n))
        if rng.random() < 0.1:
            U, V = np.eye(m, k)[rng.permutation(m)], np.eye(n, k)[rng.permutation(n)]
        return U * -np.sort(-spectrum(k, ratio, rng)) @ V.T

    return matrix


def _hadamard(m, n, ratio, rng):
    return scipy.linalg.hadamard(1 << (max(m, n) - 1).bit_length())[:m, :n].astype(float)


def _alternating(m, n, ratio, rng):  # what a power iteration from a positive vector does not see
    return np.outer(rng.random(m), (-1.0) ** np.arange(n)) + rng.choice([0, 1e-4, 1e-2]) * rng.standard_normal((m, n))


STRUCTURED = {
    "zero": lambda m, n, ratio, rng: np.zeros((m, n)),
    "ones": lambda m, n, ratio, rng: np.ones((m, n)),
    "constant": lambda m, n, ratio, rng: np.full((m, n), rng.choice([1 / 3, 0.1, 1.0000001])),
    "ones and noise": lambda m, n, ratio, rng: 1 + rng.choice([1e-6, 1e-3, 0.1]) * rng.standard_normal((m, n)),
    "positive": lambda m, n, ratio, rng: rng.random((m, n)),
    "alternating": _alternating,
    "Hilbert": lambda m, n, ratio, rng: 1 / (np.arange(m)[:, None] + np.arange(n) + 1.0),
    "diagonal": lambda m, n, ratio, rng: np.eye(m, n) * np.sort(10 ** rng.uniform(-6, 0, n)),
    "permutation": lambda m, n, ratio, rng: np.eye(m, n)[rng.permutation(m)],
    "equal columns": lambda m, n, ratio, rng: rng.standard_normal((m, 1)) + 1e-5 * rng.standard_normal((m, n)),
    "Gaussian": lambda m, n, ratio, rng: rng.standard_normal((m, n)),
    "one entry": lambda m, n, ratio, rng: np.eye(m, n) * (np.arange(n) == n // 2),
    "spiked columns": lambda m, n, ratio, rng: rng.standard_normal((m, n)) * 10 ** rng.uniform(-6, 0, n),
    "Hadamard": _hadamard,
    "Toeplitz": lambda m, n, ratio, rng: scipy.linalg.toeplitz(0.9 ** np.arange(m), 0.9 ** np.arange(n)),
}
FAMILIES = {name: _with_spectrum(spectrum) for name, spectrum in SPECTRA.items()} | STRUCTURED


# --- cases -----------------------------------------------------------------------------------------------------------


def _dim(rng) -> int:
    if (kind := rng.random()) < 0.001:
        return 1200
    if kind < 0.07:
        return int(rng.integers(200, 700))
    return int(rng.choice([1, 2, 7, 13, 31, 64, 65, 97, 127, 128])) if kind < 0.2 else int(rng.integers(8, 160))


def _garbage(V: torch.Tensor, rng) -> torch.Tensor:
    """A basis [n, k] that a state may hold: any finite matrix."""
    n, k = V.shape
    noise = torch.tensor(rng.standard_normal((n, int(rng.integers(1, max(2, n // 2))))))
    wrong = {
        "random": noise,
        "orthonormal": torch.linalg.qr(noise).Q,
        "zero": torch.zeros_like(noise),
        "huge": noise * 1e30,
        "overflowing": noise * 1e300,
        "tiny": noise * 1e-30,
        "equal": noise[:, :1].expand_as(noise).clone(),
        "shrunk": V * rng.choice([0.5, 0.7, 0.9, 0.99]),
        "stretched": V * rng.choice([1.01, 1.1, 1.4, 2]),
        "twice": torch.cat([V, V], 1),
        "half type": V.to(torch.bfloat16),
        "fp16": V.half(),
        "other width": V[:, : max(1, k // 2)],
        "none": V[:, :0],
        "every": torch.eye(n),
        "skewed": V + 0.1 * torch.roll(V, 1, 1),
        "other type": V.float() if V.dtype == torch.float64 else V.double(),
    }
    return wrong[str(rng.choice(list(wrong)))]


def _sequence(A: list[np.ndarray], rng) -> list[list[np.ndarray]]:
    """The weights of up to four calls: they drift, gain a direction, or are replaced."""
    calls, how = [A], rng.choice(["drift", "grow", "replace", "same", "reshape"])
    for t in range(int(rng.integers(1, 4))):
        A = [W.copy() for W in A]
        for i, W in enumerate(A):
            size, (m, n) = np.abs(W).max(), W.shape[-2:]
            if how == "drift":
                A[i] = W + 10 ** rng.uniform(-5, -1) * size * rng.standard_normal(W.shape)
            elif how == "grow":
                new = np.outer(rng.standard_normal(m), rng.standard_normal(n)) / math.sqrt(m * n)
                A[i] = W + new * 2 ** (t + 1) * rng.choice([1, np.linalg.norm(W[..., :, :]) / 2])
            elif how == "replace":
                A[i] = rng.permuted(W, axis=-1) * rng.choice([-1, 1, 3])
            elif how == "reshape":
                A[i] = np.ascontiguousarray(np.swapaxes(W, -1, -2))[..., : max(1, m // (t + 1))]
        calls.append(A)
    return calls


def case(seed: int, family: str | None = None) -> Case:
    """The case of this seed: the same on every machine."""
    rng = np.random.default_rng(seed)
    op = str(rng.choice(list(OPS), p=[0.7, 0.1, 0.1, 0.1]))
    layers = 1 if rng.random() < 0.7 else int(rng.integers(2, 5))
    names, A, taus = [], [], []
    shape = (_dim(rng), _dim(rng))
    for _ in range(layers):
        if rng.random() < 0.5:
            shape = (_dim(rng), _dim(rng))
        name = family or str(rng.choice(list(FAMILIES)))
        batch = () if rng.random() < 0.85 or max(shape) > 199 else (int(rng.choice([1, 2, 3, 17])),)
        ratio = 10 ** rng.choice([0, 0.3, 1, 2, rng.uniform(0, 3), rng.uniform(0, 6)])
        made = np.stack([FAMILIES[name](*shape, ratio, rng) for _ in range(math.prod(batch))]).reshape(batch + shape)
        top = np.linalg.norm(made.reshape(-1, *shape)[0], 2)
        tau = 1.0 if name in SPECTRA else top / ratio if top else 1.0
        tau = rng.choice([tau, top, 0.0], p=[0.94, 0.03, 0.03])
        names, A, taus = [*names, name], [*A, made], [*taus, float(tau)]
    dtype, layout = DTYPES[rng.choice(4, p=[0.6, 0.15, 0.15, 0.1])], rng.random()
    scale = 10 ** rng.choice([0, rng.uniform(-3, 3), rng.uniform(-30, 30)], p=[0.7, 0.2, 0.1])
    if rng.random() < 0.01:
        scale = 10 ** (rng.uniform(-250, 250) if dtype == torch.float64 else rng.uniform(-42, -30))
    if dtype == torch.float16:
        scale = float(np.clip(scale, 1e-4, 1e2))
    warm = rng.random() < 0.4
    calls = _sequence(A, rng) if warm else [A]
    kwargs = {"tol": float(10.0 ** -rng.choice([1, 2, 3, 3, 3, 4, 5, 6])), "fold": None}
    if op == "svt_" and rng.random() < 0.1:
        size = rng.choice([1e-3, 1, 1e3])
        kwargs["center"] = [_tensor(size * rng.standard_normal(W.shape) * np.abs(W).max(), scale, dtype) for W in A]
        calls = [A]
    parameter = [tau * scale for tau in taus]
    if op == "truncate_":
        parameter = [int(rng.integers(0, rng.choice([4, min(W.shape[-2:]) + 2]))) for W in A]
    if op == "weighted_svt_":
        calls = [A]
        steps = [rng.random(min(W.shape[-2:])) * rng.choice([0, 0, 1e-3, 0.1, 10]) for W in A]
        parameter = [
            torch.tensor((tau + t * np.cumsum(s)) * scale) for tau, t, s in zip(taus, taus, steps, strict=True)
        ]
    calls = [[_lay_out(_tensor(W, scale, dtype), layout) for W in A] for A in calls]
    forced, cold = bool(rng.random() < 0.6), int(rng.choice([0, 1, 16]))
    made = Case(" + ".join(names), op, calls, parameter, kwargs, None, forced, cold)
    if warm:
        made.state = ck.WarmState(int(rng.integers(99)))
        if rng.random() < 0.3:
            with _routes(made):
                getattr(ck, op)([W.clone() for W in calls[0]], parameter, state=made.state, **kwargs)
            made.state.bases = {key: _garbage(V, rng) for key, V in made.state.bases.items()}
            made.name += ", wrong state"
    return made


def _tensor(W: np.ndarray, scale: float, dtype: torch.dtype) -> torch.Tensor:
    big = torch.finfo(dtype).max / 16
    return torch.tensor(np.clip(W * scale, -big, big)).to(dtype)


def _lay_out(W: torch.Tensor, kind: float) -> torch.Tensor:
    if kind < 0.1:
        return W.mT.contiguous().mT
    return torch.cat([W, W], -1)[..., : W.shape[-1]] if kind < 0.2 else W


def _routes(case: Case):
    if not case.forced:
        return mock.patch.object(engine, "COLD", engine.COLD)
    return mock.patch.multiple(engine, worth_it=lambda m, n, columns: True, COLD=case.cold, small=_NoSmall())


class _NoSmall:
    """The engine's module of small matrices, which takes none."""

    def __getattr__(self, name):
        return (lambda weights: set()) if name == "small_shapes" else getattr(sys_small, name)


sys_small = engine.small


# --- the check -------------------------------------------------------------------------------------------------------


def run(case: Case) -> list:
    """Per call the weights after it and what it said."""
    state, out = copy.deepcopy(case.state), []
    with _routes(case):
        for weights in case.calls:
            W = [copy.deepcopy(x) for x in weights]
            infos = getattr(ck, case.op)(W, case.parameter, state=state, **case.kwargs)
            out.append((W, infos))
    return out


def measure(case: Case, again: bool = True) -> Iterator[Measured]:
    out = run(case)
    if again:
        same = all(
            torch.equal(a, b) for (W, _), (V, _) in zip(out, run(case), strict=True) for a, b in zip(W, V, strict=True)
        )
        if not same:
            yield Measured("any", problems=["not deterministic"])
    centers = case.kwargs.get("center") or [None] * len(case.parameter)
    for t, (weights, (results, infos)) in enumerate(zip(case.calls, out, strict=True)):
        for i, (W, P, info) in enumerate(zip(weights, results, infos, strict=True)):
            m, n = W.shape[-2:]
            parts = [x.reshape(-1, m, n) for x in (W, P)]
            C = [None] * len(parts[0]) if centers[i] is None else centers[i].reshape(-1, m, n)
            s, bounds = info.s.reshape(-1, min(m, n)), info.error_bound.flatten().tolist()
            where = f"call {t}, layer {i} {tuple(W.shape)} {W.dtype}, {info.method} ({info.reason})"
            if not torch.equal((info.s > 0).sum(-1), info.rank):
                yield Measured(info.method, problems=[f"{where}: rank is not the number of positive s"])
            for M, R, center, s_, bound in zip(*parts, C, s, bounds, strict=True):
                got = _compare(case, M, R, center, s_.numpy(), bound, case.parameter[i])
                got.route = info.method
                got.problems = [f"{where}: {problem}" for problem in got.problems]
                yield got


def _compare(case: Case, W, R, C, s, bound: float, parameter) -> Measured:
    got, u = Measured(""), np.finfo(float).eps / 2
    if not bool(R.isfinite().all()):
        got.problems.append("not finite")
        return got
    W64, R64, C64 = (0.0 if x is None else x.double().numpy() for x in (W, R, C))
    e = -int(np.frexp(max(np.abs(W64).max(), np.abs(C64).max()))[1])
    W64, R64, C64, s, bound = (np.ldexp(x, e) for x in (W64, R64, C64, s, bound))
    unit = parameter if case.op == "truncate_" else np.ldexp(np.asarray(parameter), e)
    X = W64 - C64
    exact = C64 + OPS[case.op](X, unit)
    shifted = X - OPS[case.op](X, unit) if case.op == "spectral_ball_" else exact - C64
    truth = np.linalg.svd(shifted, compute_uv=False)
    norm, error = np.linalg.norm(X), np.linalg.norm(R64 - exact)
    noise = 100 * u * norm  # of the truth
    got.ratio = bound / error if error > noise else math.inf
    if not error <= bound + noise:  # or NaN
        got.problems.append(
            f"bound {bound:.3e} < error {error:.3e}, ||X|| = {norm:.2e}, parameter {unit if np.ndim(unit) == 0 else unit[0]:.3e}"
        )
    if not np.linalg.norm(s - truth) <= bound + noise:
        got.problems.append(f"s is off by {np.linalg.norm(s - truth):.3e}, bound {bound:.3e}")
    if case.op in ("svt_", "spectral_ball_") and unit > 0:
        info = torch.finfo(W.dtype)
        stored = info.eps * np.linalg.norm(exact) + math.sqrt(X.size) * np.ldexp(info.smallest_normal * info.eps, e)
        got.use = max(0.0, np.linalg.norm(R64 - exact, 2) - stored - noise) / (case.kwargs["tol"] * unit)
        if got.use > 1:
            got.problems.append(
                f"tolerance: {got.use:.3g} times tol tau, sigma_1 / tau = {np.linalg.norm(X, 2) / unit:.2e}"
            )
    return got


def check(case: Case, found: list[Measured] | None = None) -> tuple[bool, float, str]:
    """Whether all of it holds, the least bound / error, and what does not hold; what was measured goes to ``found``."""
    try:
        all_measured = list(measure(case))
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "compaware" in f.filename]
        where = "/".join(f"{f.name}:{f.lineno}" for f in frames[-2:])
        return False, 0.0, f"{type(error).__name__} in {where}: {str(error)[:150]}"
    problems = [problem for got in all_measured for problem in got.problems]
    if found is not None:
        found += all_measured
    return not problems, min((got.ratio for got in all_measured), default=math.inf), "; ".join(problems)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(cases: int, seed: int = 0, family: str | None = None, show: int = 30) -> None:
    """Run the cases of so many seeds from the first; exit with 1 if anything does not hold."""
    torch.set_num_threads(1)
    count, ratio, use, bad = Counter(), defaultdict(lambda: math.inf), defaultdict(float), []
    for at in track(range(seed, seed + cases), "Hunting"):
        made = case(at, family)
        holds, _, message = check(made, found := [])
        for got in found:
            count[got.route] += 1
            ratio[got.route], use[got.route] = min(ratio[got.route], got.ratio), max(use[got.route], got.use)
        if not holds:
            bad.append(at)
            if len(bad) <= show:
                print(f"{at}: {made.op} of {made.name}{' (forced)' * made.forced}: {message}")
    print(f"{cases} cases, {sum(count.values())} results, {len(bad)} cases with violations: {bad}")
    for route in sorted(count):
        print(f"{route:>36}: {count[route]:7}, bound / error >= {ratio[route]:8.3g}, tolerance use <= {use[route]:.3g}")
    raise typer.Exit(bool(bad))


if __name__ == "__main__":
    app()
