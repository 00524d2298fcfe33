"""Search for violations of the SVT solver's error bounds and tolerance, over seeded random cases.

    python -m tests.proximal.hunt 20000 --seed 0 [--family "tau +- 1 ulp"] [--op firm_svt_] [--extreme]

``case(seed)`` makes a case, ``check`` compares it with the fp64 truth. Whatever the matrix, the scale and the state:
the bounds hold, the tolerance is met, ``s`` and ``rank`` are those of the result, a repeated call gives the same bits,
and no finite input is refused, unless its result is beyond the range of its dtype: then nothing has changed. Scales go
from the smallest subnormal number of each dtype to its largest one, also within one matrix. Most matrices are too small
for the subspace route to be chosen: in half of the cases it is forced.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import numpy as np
import torch
import typer
from rich.progress import track

import compaware_kernels as ck
from compaware_kernels.proximal import jacobi, solver, subspace_iteration
from tests.helpers import oracle


@dataclass
class Case:
    name: str
    op: str
    calls: list[list[torch.Tensor]]  # weights of every call
    parameter: list  # tau, weights or rank of every layer
    kwargs: dict
    state: ck.WarmState | None = None
    forced: bool = False  # force the subspace route
    first: int = subspace_iteration.FIRST  # columns of the first subspace
    wrong: Callable[[dict], dict] | None = None  # wrong bases for a state, from those after the first call


@dataclass
class Measured:
    """Result of one matrix in one call."""

    route: str
    ratio: float = math.inf  # bound / error
    use: float = 0.0  # spectral error beyond rounding / (tol tau)
    problems: list[str] = field(default_factory=list)


def _cluster(values: Callable) -> Callable:
    """Spectrum with a few values above a cluster, which is ``values(count, rng)``."""

    def spectrum(k, top, rng):
        r = rng.integers(0, min(k, 9))
        return np.r_[np.geomspace(top, 1.2, r), values(k - r, rng)]

    return spectrum


SPECTRA = {  # singular values in units of tau, from (k, the largest, rng)
    "log-spaced": lambda k, top, rng: np.geomspace(top, 1e-9, k),
    "half zeros": lambda k, top, rng: np.where(np.arange(k) < k // 2, np.linspace(top, 0.1, k), 0),
    "few above": lambda k, top, rng: np.where(np.arange(k) < 6, np.geomspace(top, 1.01, k), 0.99 * rng.random(k)),
    "ties": lambda k, top, rng: np.resize([top, 2, 1, 0.25], k),
    "tau +- 1 ulp": _cluster(lambda k, rng: 1 + rng.choice([-0.5, 0, 1, 2], k) * np.finfo(np.float32).eps),
    "cluster at tau": _cluster(lambda k, rng: rng.uniform(0.9, 1.1, k)),
    "tight cluster at tau": _cluster(lambda k, rng: 1 + rng.uniform(-1e-5, 1e-5, k)),
    "slow decay below tau": lambda k, top, rng: np.r_[top, np.linspace(0.9999, 0.7, k)][:k],
    "slow decay across tau": lambda k, top, rng: top * np.arange(1, k + 1) ** -rng.uniform(0.2, 1.5),
    "one large": lambda k, top, rng: np.r_[top, np.full(k, rng.choice([0.5, 1.0, 1.5]))][:k],
    "rank 1": lambda k, top, rng: np.where(np.arange(k) == 0, top, 0),
}


def _low(rng) -> float:
    """Exponent of ten of the smallest scale within a matrix: roundoff, subnormal numbers of fp32, those of fp64."""
    return float(rng.choice([-8, -40, -300]))


MATRICES = {  # matrices, from (m, n, rng)
    "zero": lambda m, n, rng: np.zeros((m, n)),
    "constant": lambda m, n, rng: np.full((m, n), rng.choice([1, 1 / 3, 0.1, 1.0000001])),
    "ones and noise": lambda m, n, rng: 1 + rng.choice([1e-6, 1e-3, 0.1]) * rng.standard_normal((m, n)),
    "positive": lambda m, n, rng: rng.random((m, n)),
    "alternating": lambda m, n, rng: (  # invisible to a power iteration from a positive vector
        np.outer(rng.random(m), (-1.0) ** np.arange(n)) + rng.choice([0, 1e-4, 1e-2]) * rng.standard_normal((m, n))
    ),
    "Hilbert": lambda m, n, rng: 1 / (np.arange(m)[:, None] + np.arange(n) + 1.0),
    "diagonal": lambda m, n, rng: np.eye(m, n) * np.sort(10 ** rng.uniform(-6, 0, n)),
    "permutation": lambda m, n, rng: np.eye(m, n)[rng.permutation(m)],
    "equal columns": lambda m, n, rng: rng.standard_normal((m, 1)) + 1e-5 * rng.standard_normal((m, n)),
    "Gaussian": lambda m, n, rng: rng.standard_normal((m, n)),
    "one entry": lambda m, n, rng: np.eye(m, n) * (np.arange(n) == n // 2),
    "spiked columns": lambda m, n, rng: rng.standard_normal((m, n)) * 10 ** rng.uniform(-6, 0, n),
    "Hadamard": lambda m, n, rng: (-1.0) ** np.bitwise_count(np.arange(m)[:, None] & np.arange(n)),
    "Toeplitz": lambda m, n, rng: 0.9 ** abs(np.arange(m)[:, None] - np.arange(n)),
    "rank one": lambda m, n, rng: np.outer(rng.standard_normal(m), rng.standard_normal(n)),
    "scaled rows": lambda m, n, rng: rng.standard_normal((m, n)) * 10 ** rng.uniform(_low(rng), 0, (m, 1)),
    "scaled entries": lambda m, n, rng: rng.standard_normal((m, n)) * 10 ** rng.uniform(_low(rng), 0, (m, n)),
    "one huge entry": lambda m, n, rng: (
        10 ** rng.uniform(_low(rng), 0) * rng.standard_normal((m, n)) + np.eye(m, n) * (np.arange(n) == n // 2)
    ),
}


def _matrix(family: str, top: float, m: int, n: int, rng) -> np.ndarray:
    if family in MATRICES:
        return MATRICES[family](m, n, rng)
    k, coordinates = min(m, n), rng.random() < 0.1
    bases = [
        rng.permutation(np.eye(d)) if coordinates else np.linalg.qr(rng.standard_normal((d, k)))[0] for d in (m, n)
    ]
    U, V = (B[:, :k] for B in bases)
    return U * -np.sort(-SPECTRA[family](k, top, rng)) @ V.T


def _layer(family: str, batch: tuple, m: int, n: int, rng) -> tuple[np.ndarray, float]:
    """Matrices [*batch, m, n], and a threshold for them."""
    top = 10 ** rng.choice([0, 0.3, 1, 2, rng.uniform(0, 3), rng.uniform(0, 6)])
    W = np.stack([_matrix(family, top, m, n, rng) for _ in range(math.prod(batch))])
    largest = float(np.linalg.norm(W[0], 2))
    tau = 1.0 if family in SPECTRA else largest / top
    return W.reshape(*batch, m, n), rng.choice([tau, largest, 0.0], p=[0.94, 0.03, 0.03])


def _dim(rng) -> int:
    if (kind := rng.random()) < 0.001:
        return 1200
    if kind < 0.07:
        return int(rng.integers(200, 700))
    return int(rng.choice([1, 2, 7, 13, 31, 64, 65, 97, 127, 128])) if kind < 0.2 else int(rng.integers(8, 160))


def _wrong_bases(bases: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {key: _wrong(V, rng) for key, V in bases.items()}


def _wrong(V: torch.Tensor, rng) -> torch.Tensor:
    """Another finite matrix to replace the basis V [n, k] of a state."""
    n, k = V.shape
    noise = torch.tensor(rng.standard_normal((n, int(rng.integers(1, max(2, n // 2))))))
    wrong = [
        noise, noise * 1e30, noise * 1e300, noise * 1e-30, noise * 0, torch.linalg.qr(noise).Q, noise[:, [0, 0, 0]],
        V * rng.choice([0.5, 0.7, 0.9, 0.99, 0.999]), V * rng.choice([1.001, 1.01, 1.1, 1.4, 2]), torch.cat([V, V], 1),
        V + 0.1 * torch.roll(V, 1, 1), V[:, :0], V[:, : k // 2], torch.eye(n), V.bfloat16(), V.half(),
        V.double() if V.dtype == torch.float32 else V.float(),
    ]  # fmt: skip
    return wrong[rng.integers(len(wrong))]


def _next(W: np.ndarray, how: str, rng) -> np.ndarray:
    """Weights of the next call."""
    m, n = W.shape[-2:]
    size = rng.choice([1, 3, np.linalg.norm(W)]) / math.sqrt(m * n)
    return {
        "same": W,
        "drift": W + 10 ** rng.uniform(-5, -1) * abs(W).max() * rng.standard_normal(W.shape),
        "new direction": W + size * np.outer(rng.standard_normal(m), rng.standard_normal(n)),
        "replaced": rng.permuted(W, axis=-1) * rng.choice([-1, 1, 3]),
        "new shape": np.swapaxes(W, -1, -2)[..., : max(1, m // 2)],
    }[how]


def case(seed: int, family: str | None = None, wanted: str | None = None, extreme: bool = False) -> Case:
    """The case of this seed: the same on every machine; ``extreme``: at the ends of the range of the dtype."""
    rng = np.random.default_rng(seed)
    op = str(rng.choice(["svt_", "spectral_ball_", "weighted_svt_", "truncate_", "svt"], p=[0.64, 0.1, 0.1, 0.1, 0.06]))
    op = op if wanted is None else wanted.replace("firm_", "")
    names, A, taus, shape = [], [], [], (_dim(rng), _dim(rng))
    for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 5))):
        if rng.random() < 0.5:
            shape = (_dim(rng), _dim(rng))
        names.append(family or str(rng.choice([*SPECTRA, *MATRICES])))
        batch = () if rng.random() < 0.85 or max(shape) > 199 else (int(rng.choice([1, 2, 3, 17])),)
        W, tau = _layer(names[-1], batch, *shape, rng)
        A, taus = [*A, W], [*taus, float(tau)]
    dtype = [torch.float32, torch.float64, torch.bfloat16, torch.float16][rng.choice(4, p=[0.6, 0.15, 0.15, 0.1])]
    info, warm, layout = torch.finfo(dtype), rng.random() < 0.4, rng.random()
    ends = math.log10(info.smallest_normal) + math.log10(info.eps), math.log10(info.max)
    ranges = [(0, 0), (-3, 2), (-4, 2) if dtype == torch.float16 else (-30, 30), ends]
    which = rng.choice(4, p=[0.6, 0.15, 0.1, 0.15])
    scale = 10 ** rng.uniform(*ranges[which])
    if (which == 3 and rng.random() < 0.4) or extreme:  # at the end of the range
        which = 3
        scale = 10 ** rng.choice([ends[0] + rng.uniform(0, 3), ends[1] - rng.uniform(0, 3)])
    largest = info.max if which == 3 else info.max / 16
    kwargs = {"tol": 10.0 ** -rng.choice([1, 2, 3, 3, 3, 4, 5, 6]), "fold": None}

    def tensor(W: np.ndarray) -> torch.Tensor:
        with np.errstate(over="ignore"):
            T = torch.tensor(np.clip(W * scale, -largest, largest)).to(dtype)
        T = T.mT.contiguous().mT if layout < 0.1 else T
        return torch.cat([T, T], -1)[..., : T.shape[-1]] if 0.1 < layout < 0.2 else T

    parameter, calls = [tau * min(scale, 1e308 / max(1, tau)) for tau in taus], [A]
    if rng.random() < 0.03:  # at the limits of the range
        parameter = [float(rng.choice([5e-324, 1e-310, 1e-45, 1e-40, 1e30, 1e39, 1e308])) for _ in taus]
    if op == "svt":  # thresholds are rounded to the dtype it computes in
        compute = torch.promote_types(dtype, torch.float32)
        parameter = [float(torch.tensor(min(tau, torch.finfo(compute).max), dtype=compute)) for tau in parameter]
    if op == "truncate_":
        parameter = [int(rng.integers(0, rng.choice([4, min(W.shape[-2:]) + 2]))) for W in A]
    if op == "weighted_svt_":
        rises = [np.cumsum(rng.random(min(W.shape[-2:]))) * rng.choice([0, 0, 1e-3, 0.1, 10]) for W in A]
        rises = [np.minimum(tau * (1 + rise), 1e308 / max(1, scale)) for tau, rise in zip(taus, rises, strict=True)]
        parameter = [torch.tensor(rise * scale) for rise in rises]
    if op == "svt_" and rng.random() < 0.1:
        sizes = [rng.choice([1e-3, 1, 1e3]) * abs(W).max() for W in A]
        kwargs["center"] = [tensor(size * rng.standard_normal(W.shape)) for W, size in zip(A, sizes, strict=True)]
    warm, same_shape = warm and op != "svt", op == "weighted_svt_" or "center" in kwargs
    how = rng.choice(["same", "drift", "new direction", "replaced", "new shape"][: 5 - same_shape])
    for _ in range(int(rng.integers(1, 4)) if warm else 0):
        calls.append([_next(W, how, rng) for W in calls[-1]])
    calls = [[tensor(W) for W in A] for A in calls]
    made = Case(" + ".join(names), op, calls, parameter, kwargs, forced=bool(rng.random() < 0.6))
    made.first, made.state = int(rng.choice([1, 8, 32])), ck.WarmState(int(rng.integers(99))) if warm else None
    made.wrong = partial(_wrong_bases, seed=int(rng.integers(1, 2**32))) if warm and rng.random() < 0.3 else None
    if wanted == f"firm_{op}" or (wanted is None and op in ("svt", "svt_") and rng.random() < 0.2):
        made.op = f"firm_{op}"
        kwargs["gamma"] = float(rng.choice([1.5, 2, 3, 1 + 10 ** rng.uniform(-1, 1), 1 + 10 ** rng.uniform(-4, 4)]))
    return made


def run(case: Case) -> list[tuple[list[torch.Tensor], list[ck.SvtInfo] | ValueError]]:
    """For every call the weights after it and its reports, or the refusal, after which there are no more calls."""
    state, out, patches = copy.deepcopy(case.state), [], {"FIRST": case.first}
    if case.forced:
        patches |= {"worth_it": lambda m, n, columns: True, "jacobi": mock.Mock(wraps=jacobi)}
        patches["jacobi"].small_shapes, patches["jacobi"].Group = lambda weights: set(), jacobi.Group
    with mock.patch.multiple(solver, **patches), mock.patch.object(subspace_iteration, "FIRST", case.first):
        for weights in copy.deepcopy(case.calls):
            before = copy.deepcopy(state)
            try:
                out.append(_call(case, weights, state))
            except ValueError as error:
                same = state is None or (state.calls == before.calls and state.bases.keys() == before.bases.keys())
                assert same and all(
                    torch.equal(V, before.bases[key]) for key, V in (state.bases if state else {}).items()
                )
                return [*out, (weights, error)]
            if case.wrong and len(out) == 1:
                state.bases = case.wrong(state.bases)
    return out


def _same_state(a: ck.WarmState | None, b: ck.WarmState | None) -> bool:
    if a is None or b is None:
        return a is b
    same = a.calls == b.calls and a.bases.keys() == b.bases.keys()
    return same and all(torch.equal(V, b.bases[key]) for key, V in a.bases.items())


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _call(case: Case, weights: list[torch.Tensor], state: ck.WarmState | None):
    op = getattr(ck, case.op)
    if case.op.endswith("_"):
        return weights, op(weights, case.parameter, state=state, **case.kwargs)
    gamma = [case.kwargs["gamma"]] if "gamma" in case.kwargs else []
    results = [op(W, tau, *gamma, return_info=True) for W, tau in zip(weights, case.parameter, strict=True)]
    return tuple(map(list, zip(*results, strict=True)))


def measure(case: Case) -> Iterator[Measured]:
    out = run(case)
    first, again = ([P for results, _ in calls for P in results] for calls in (out, run(case)))
    if not all(map(_same_bits, first, again)):
        yield Measured("any", problems=["not deterministic"])
    for t, (weights, (results, infos)) in enumerate(zip(case.calls, out, strict=False)):
        centers = case.kwargs.get("center") or list(map(torch.zeros_like, weights))
        if isinstance(infos, ValueError):
            changed = not all(map(torch.equal, weights, results))
            beyond = any(_beyond(case, *each) for each in zip(weights, centers, case.parameter, strict=True))
            yield Measured(
                "refused", problems=["refused, but changed"] * changed + [f"refused: {infos}"] * (not beyond)
            )
            return
        for W, P, C, info, parameter in zip(weights, results, centers, infos, case.parameter, strict=True):
            m, n = W.shape[-2:]
            where = f"call {t}, {tuple(W.shape)} {W.dtype}{', center' * ('center' in case.kwargs)}, {info.method}"
            if not torch.equal((info.s > 0).sum(-1), info.rank):
                yield Measured(info.method, problems=[f"{where}: rank is not the number of positive s"])
            s, bounds = info.s.double().reshape(-1, min(m, n)).numpy(), info.error_bound.flatten().tolist()
            for parts in zip(*(x.reshape(-1, m, n) for x in (W, P, C)), s, bounds, strict=True):
                got = _compare(case, *parts, parameter)
                got.route, got.problems = info.method, [f"{where} ({info.reason}): {what}" for what in got.problems]
                yield got


def _beyond(case: Case, W, C, parameter) -> bool:
    """Whether the exact result of one weight, or its norm, is beyond the range of its dtype."""
    m, n = W.shape[-2:]
    largest = torch.finfo(W.dtype).max
    for X, D in zip(*(x.double().reshape(-1, m, n).numpy() for x in (W, C)), strict=True):
        e, exact, t = _exact(case, X, D, parameter)
        slack = 0.0 if case.op in ("truncate_", "weighted_svt_") else case.kwargs["tol"] * float(t)
        norm = np.linalg.norm(np.ldexp(X, e) - np.ldexp(D, e))
        with np.errstate(over="ignore"):
            if abs(exact).max() + slack > np.ldexp(0.97 * largest, e) or norm > np.ldexp(1.6e308, e):
                return True
    return False


def _exact(case: Case, W, C, parameter):
    """Exponent e near which nothing over- or underflows, the exact result and the parameter, both times ``2^e``."""
    e = -int(np.frexp(max(abs(W).max(), abs(C).max()))[1])
    W, C = np.ldexp(W, e), np.ldexp(C, e)
    with np.errstate(over="ignore"):
        t = parameter if case.op == "truncate_" else np.ldexp(np.asarray(parameter), e)
    shrunk = _truth(case.op, W - C, t, case.kwargs.get("gamma", math.inf))
    return e, W - shrunk if case.op == "spectral_ball_" else C + shrunk, t


def _truth(op: str, X: np.ndarray, parameter, gamma: float) -> np.ndarray:
    if op.startswith("firm_svt"):
        return oracle.firm_svt(X, parameter, gamma)
    if op != "truncate_":
        return oracle.svt(X, parameter)
    U, s, Vh = np.linalg.svd(X, full_matrices=False)
    return U[:, :parameter] * s[:parameter] @ Vh[:parameter]


def _compare(case: Case, W, R, C, s, bound: float, parameter) -> Measured:
    """Compare one result R [m, n] with the truth, all scaled by a power of two so that nothing overflows here."""
    info, got = torch.finfo(W.dtype), Measured("")
    if not bool(R.isfinite().all()):
        return Measured("", problems=["not finite"] * (bound < math.inf))
    W, R, C = (x.double().numpy() for x in (W, R, C))
    e, exact, t = _exact(case, W, C, parameter)
    W, R, C, s, bound = (np.ldexp(x, e) for x in (W, R, C, s, bound))
    gamma = case.kwargs.get("gamma", math.inf)
    shrunk = W - exact if case.op == "spectral_ball_" else exact - C
    norm, error = np.linalg.norm(W - C), np.linalg.norm(R - exact)
    noise = 50 * np.finfo(float).eps * (norm + np.linalg.norm(C)) / (1 - 1 / gamma)  # of the truth
    got.ratio = bound / error if error > noise else math.inf
    wrong = np.linalg.norm(s - np.linalg.svd(shrunk, compute_uv=False))
    about = f"||X|| = {norm:.2e}, parameter {np.ravel(t)[0]:.3e}, tol {case.kwargs['tol']}, scale 2^{-e}"
    if not error <= bound + noise:  # also for NaN
        got.problems.append(f"bound {bound:.3e} < error {error:.3e}, {about}")
    elif not wrong <= bound + noise:
        got.problems.append(f"s is off by {wrong:.3e}, bound {bound:.3e}, {about}")
    if case.op in ("svt_", "firm_svt_", "spectral_ball_") and t > 0:
        stored = info.eps * np.linalg.norm(exact) + math.sqrt(W.size) * np.ldexp(info.smallest_normal * info.eps, e)
        off = np.linalg.norm(R - exact, 2) - stored - noise
        got.use = off / (case.kwargs["tol"] * t) if off > 0 else 0.0
        if got.use > 1:
            got.problems.append(f"tolerance: {got.use:.3g} times tol tau, {about}")
    return got


def check(case: Case, found: list[Measured] | None = None) -> tuple[bool, float, str]:
    """(Whether everything holds, least bound / error, what does not hold); appends measurements to ``found``."""
    found = [] if found is None else found
    try:
        found += measure(case)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "compaware" in f.filename]
        where = "/".join(f"{f.name}:{f.lineno}" for f in frames[-2:])
        return False, 0.0, f"{type(error).__name__} in {where}: {str(error)[:150]}"
    problems = [problem for got in found for problem in got.problems]
    return not problems, min((got.ratio for got in found), default=math.inf), "; ".join(problems)


def search(seeds: range, make: Callable[[int], Case], check: Callable = check, show: int = 30) -> None:
    """Check the cases of these seeds and print what does not hold; exit with 1 if anything does not."""
    torch.set_num_threads(1)
    count, ratio, use, bad = Counter(), defaultdict(lambda: math.inf), defaultdict(float), []
    for at in track(seeds, "Hunting"):
        made, found = make(at), []
        holds, _, message = check(made, found)
        for got in found:
            route = "several in one batch" if " + " in got.route else got.route
            count[route], ratio[route] = count[route] + 1, min(ratio[route], got.ratio)
            use[route] = max(use[route], got.use)
        if not holds:
            bad.append(at)
            if len(bad) <= show:
                about = f"{made.op} of {made.name}{', forced' * made.forced}{', wrong state' * bool(made.wrong)}"
                print(f"{at}: {about}: {message}")
    print(f"{len(seeds)} cases, {sum(count.values())} results, {len(bad)} cases with violations: {bad}")
    for route in sorted(count):
        print(f"{route:>20}: {count[route]:7}, bound / error >= {ratio[route]:8.3g}, tolerance use <= {use[route]:.3g}")
    raise typer.Exit(bool(bad))


def main(
    cases: int, seed: int = 0, family: str | None = None, op: str | None = None, extreme: bool = False, show: int = 30
) -> None:
    """Check the cases of so many seeds; exit with 1 if anything does not hold."""
    search(range(seed, seed + cases), lambda at: case(at, family, op, extreme), show=show)


if __name__ == "__main__":
    typer.run(main)
