"""Cases that aim at what the SVT solver saves: warm states, certificates from norms alone, batches of equal shapes.

    python -m tests.proximal.adversaries 20000 --seed 0 [--family "grown"]

A case is a sequence of calls with one warm state. All its weights have singular vectors from one basis, and their
singular values change between the calls: a direction orthogonal to all that the state holds grows to just below or
above tau, or many far below tau together have a norm of about tau, while the norm of the matrix stays the same, or is
so large that the square of tau is lost in the rounding of its own. Directions below tau fill the spare columns of the
state. Its bases are spoiled. Weights of equal shape are in one call, as a list or as a batch, beside zero, full-rank
and equal ones; then every layer also takes its calls alone. :func:`.hunt.check` compares with the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import typer

import compaware_kernels as ck
from compaware_kernels.proximal.subspace_iteration import SPARE
from tests.proximal import hunt
from tests.proximal.hunt import Case


@dataclass
class Start:
    """Singular values of the first call, in units of tau, in the order of the basis."""

    s: np.ndarray
    kept: int  # the first ones are above tau
    held: int  # so many may be in the state, with its spare columns
    rng: np.random.Generator

    def near(self, size: int | None = None) -> np.ndarray:
        """Values at tau: 1, or 1 +- 1e-7 to 1e-2."""
        return 1 + self.rng.choice([-1, -1, 0, 1, 1], size) * 10 ** self.rng.uniform(-7, -2, size)

    def size(self) -> float:
        """Norm of what grows: at tau, above it, or above by the rounding of ``||W||_F^2`` in fp32 or fp64."""
        eps = self.rng.choice([np.finfo(np.float32).eps, np.finfo(float).eps])
        slack = 10 ** self.rng.uniform(-2, 1.5) * eps * np.sum(self.s**2)
        return float(self.rng.choice([self.near(), self.rng.uniform(1.01, 3), np.sqrt(1 + slack)]))

    def outside(self) -> slice:
        """One, a few or all places that the state does not hold."""
        most = self.rng.choice([1, 3, len(self.s) - self.held])
        return slice(self.held, self.held + int(self.rng.integers(1, 1 + most)))


Spectra = list[np.ndarray]  # singular values of every call


def _then(s: np.ndarray, at, values) -> np.ndarray:
    """A copy of s with these values at these places."""
    s = s.copy()
    s[at] = values
    return s


def _grown(start: Start) -> Spectra:
    return [start.s, _then(start.s, start.outside(), start.size())]


def _at_tau(start: Start) -> Spectra:
    at = start.outside()
    return [start.s, _then(start.s, at, start.near(len(start.s[at])))]


def _growing(start: Start) -> Spectra:
    sizes = [0.5, 0.9, 1 - 1e-3, *np.sort(start.near(2)), start.size()]
    return [start.s, *(_then(start.s, start.held, size) for size in sizes[int(start.rng.integers(0, 5)) :])]


def _frobenius(start: Start) -> Spectra:
    """Many values far below tau, whose Frobenius norm is about tau."""
    at = start.outside()
    return [start.s, _then(start.s, at, start.size() / np.sqrt(len(start.s[at])))]


def _constant_norm(start: Start) -> Spectra:
    """As ``grown`` or ``Frobenius``, but the largest value falls so that the norm of the matrix stays the same."""
    after = (_frobenius if start.rng.random() < 0.5 else _grown)(start)[1]
    return [start.s, _then(after, 0, np.sqrt(max(np.sum(start.s**2) - np.sum(after[1:] ** 2), 0.0)))]


def _exchanged(start: Start) -> Spectra:
    """Values change places with those of other directions."""
    out = [start.s]
    for _ in range(int(start.rng.integers(1, 4))):
        i, j = int(start.rng.integers(0, start.kept)), int(start.rng.integers(start.kept, len(start.s)))
        out.append(_then(out[-1], [i, j], out[-1][[j, i]]))
    return [*out, start.rng.permutation(start.s)] if start.rng.random() < 0.3 else out


def _faded(start: Start) -> Spectra:
    one, all_kept = int(start.rng.integers(0, start.kept)), slice(0, start.kept)
    return [start.s, _then(start.s, one, start.near()), _then(start.s, all_kept, start.near(start.kept))]


def _ties(start: Start) -> Spectra:
    at = slice(max(0, start.kept - 2), start.kept + int(start.rng.integers(1, 5)))
    ulps = start.rng.choice([-1, 0, 0, 0, 1, 2], len(start.s[at])) * np.finfo(np.float32).eps / 2
    return [_then(start.s, at, 1.0), _then(start.s, at, 1 + ulps)]


def _drift(start: Start) -> Spectra:
    """Every call moves all values a little, and one that the state does not hold grows by a fifth."""
    out = [_then(start.s, start.held, start.rng.uniform(0.5, 1))]
    for _ in range(int(start.rng.integers(2, 6))):
        moved = out[-1] * (1 + 0.02 * start.rng.standard_normal(len(start.s)))
        out.append(_then(moved, start.held, 1.2 * moved[start.held]))
    return out


FAMILIES: dict[str, Callable[[Start], Spectra]] = {
    "grown": _grown,
    "at tau": _at_tau,
    "growing": _growing,
    "Frobenius": _frobenius,
    "constant norm": _constant_norm,
    "exchanged": _exchanged,
    "faded": _faded,
    "ties": _ties,
    "drift": _drift,
    "zero": lambda start: [0 * start.s],
    "full rank": lambda start: [np.linspace(3, 1.2, len(start.s))],
    "same": lambda start: [start.s],
}
HARD = [name for name in FAMILIES if name not in ("zero", "full rank", "same")]


def _bases(m: int, n: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal U ``[m, k]`` and V ``[n, k]``, k = min(m, n): random, or unit vectors, exact in every dtype."""
    k = min(m, n)
    if rng.random() < 0.35:
        return np.eye(m)[:, rng.permutation(m)[:k]], np.eye(n)[:, rng.permutation(n)[:k]]
    return np.linalg.qr(rng.standard_normal((m, k)))[0], np.linalg.qr(rng.standard_normal((n, k)))[0]


def _rotated(V: np.ndarray, r: int, angle: float) -> np.ndarray:
    """V with its first kept and its first other direction rotated in their plane, which changes no norm."""
    V = V.copy()
    V[:, [0, r]] = V[:, [0, r]] @ [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return V


def _matrices(family: str, m: int, n: int, calls: int, rng) -> list[np.ndarray]:
    """The weights ``[m, n]`` of every call, tau = 1; the last one again where a family has fewer."""
    k = min(m, n)
    U, V = _bases(m, n, rng)
    kept = int(rng.integers(1, max(2, k // 8)))
    held = min(k - 1, kept + int(rng.choice([0, SPARE, 2 * SPARE, 4 * SPARE])))
    top = 10 ** rng.choice([rng.uniform(0.2, 2), rng.uniform(2.5, 4), rng.uniform(4, 6)], p=[0.5, 0.4, 0.1])
    s = np.zeros(k)
    s[:kept] = np.geomspace(top, min(top, 1.3), kept)
    s[kept:held] = rng.uniform(0.5, 0.95, held - kept)
    if rng.random() < 0.3:
        s[held:] = rng.uniform(0, 0.7) * np.arange(1.0, k - held + 1) ** -rng.uniform(0.5, 2)
    spectra = FAMILIES[family](Start(s, kept, held, rng))
    spectra = [*spectra, *[spectra[-1]] * calls][:calls]
    angle = float(rng.choice([0, 0, 0, 10 ** rng.uniform(-6, 0), np.pi / 2]))
    return [(U * s) @ (_rotated(V, kept, angle) if t else V).T for t, s in enumerate(spectra)]


def spoiled(bases: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The bases V ``[n, k]`` of a state, some of which are not quite what they should be, but finite."""
    rng = np.random.default_rng(seed)

    def columns(V, values):
        return V * torch.tensor(values).to(V.dtype)

    def spoil(V: torch.Tensor) -> torch.Tensor:
        n, k = V.shape
        noise = torch.tensor(rng.standard_normal((n, k))).to(V.dtype)
        turn = torch.tensor(np.linalg.qr(rng.standard_normal((k, k)))[0]).to(V.dtype) if k else noise[:0]
        some = rng.permutation(k)[: k // 2]
        return [
            lambda: V,
            lambda: V + 10 ** rng.uniform(-8, -1) * noise,  # not quite orthonormal
            lambda: columns(V, 1 + 10 ** rng.uniform(-8, -0.8) * rng.standard_normal(k)),  # not quite of unit length
            lambda: columns(V, rng.choice([0.0, 1.0], k)),  # zero columns
            lambda: columns(V, np.where(np.arange(k) == 0, 0.9, 1)),
            lambda: columns(V, -np.ones(k)),
            lambda: V[:, rng.permutation(k)],
            lambda: V @ turn,  # of the same span
            lambda: V[:, rng.integers(0, max(1, k), k)],  # equal columns
            lambda: V + torch.roll(V, 1, 1) * 10 ** rng.uniform(-4, 0),
            lambda: torch.cat([V[:, some], torch.linalg.qr(noise).Q[:, : k - len(some)]], 1),
            lambda: torch.linalg.qr(noise).Q,  # of another matrix
            lambda: noise * 10.0 ** rng.uniform(-30, 30),
            lambda: V[:, : int(rng.integers(0, k + 1))],
        ][rng.integers(14)]()

    return {key: spoil(V) for key, V in bases.items()}


def case(seed: int, family: str | None = None) -> Case:
    """The case of this seed: the same on every machine."""
    rng = np.random.default_rng(seed)
    op = str(rng.choice(["svt_", "firm_svt_", "spectral_ball_", "weighted_svt_"], p=[0.7, 0.1, 0.1, 0.1]))
    sizes = [(8, 40), (64, 200), (200, 400)]
    m, n = (int(rng.integers(*sizes[rng.choice(3, p=[0.05, 0.85, 0.1])])) for _ in "mn")
    layers = 1 if rng.random() < 0.6 else int(rng.integers(2, 7))
    calls = int(rng.choice([2, 3, 6], p=[0.6, 0.25, 0.15]))
    names = [family or str(rng.choice(HARD))]
    names += [str(rng.choice([*FAMILIES, "zero", "full rank", "copy"])) for _ in range(layers - 1)]
    order, made = rng.permutation(layers), []  # the first may be anywhere, and is what a copy copies
    for name in names:
        made.append(made[0] if name == "copy" else _matrices(name, m, n, calls, rng))
    names, made = [names[i] for i in order], [made[i] for i in order]
    scale = 2.0 ** rng.integers(-8, 8) if rng.random() < 0.7 else 10 ** rng.uniform(-4, 2)
    taus = np.full(layers, scale) if rng.random() < 0.8 else scale * 10 ** rng.uniform(-0.5, 0.5, layers)
    dtype = [torch.float32, torch.float64, torch.bfloat16, torch.float16][rng.choice(4, p=[0.55, 0.25, 0.12, 0.08])]
    largest = torch.finfo(dtype).max / 16

    def weights(t: int) -> list[torch.Tensor]:
        return [
            torch.tensor((tau * each[t]).clip(-largest, largest)).to(dtype)
            for each, tau in zip(made, taus, strict=True)
        ]

    calls, parameter = [weights(t) for t in range(calls)], [float(tau) for tau in taus]
    if len(set(parameter)) == 1 and layers > 1 and rng.random() < 0.3:  # as one batch
        calls, parameter = [[torch.stack(each)] for each in calls], parameter[:1]
    kwargs = {"tol": 10.0 ** -rng.choice([2, 3, 3, 3, 4, 5]), "fold": None}
    if op == "firm_svt_":
        kwargs["gamma"] = float(rng.choice([1.5, 2, 3, 1 + 10 ** rng.uniform(-1, 1)]))
    if op == "weighted_svt_":
        rises = np.cumsum(rng.random(min(m, n))) * rng.choice([0, 0, 1e-3, 0.1])
        parameter = [torch.tensor(tau * (1 + rises)) for tau in parameter]
    wrong = partial(spoiled, seed=int(rng.integers(2**32))) if rng.random() < 0.4 else None
    state, first = ck.WarmState(int(rng.integers(99))), int(rng.choice([1, 8, 32]))
    forced = bool(rng.random() < 0.8)
    return Case(" + ".join(names), op, calls, parameter, kwargs, state, forced, first, wrong)


def alone(case: Case) -> Iterator[Case]:
    """The calls of every layer on its own, under the same key."""
    for i, parameter in enumerate(case.parameter):
        calls = [[weights[i]] for weights in case.calls]
        yield replace(case, calls=calls, parameter=[parameter], kwargs=case.kwargs | {"names": [str(i)]})


def check(case: Case, found: list[hunt.Measured] | None = None) -> tuple[bool, float, str]:
    """:func:`.hunt.check` of the case, and of every layer on its own."""
    results = [hunt.check(case, found)]
    if len(case.parameter) > 1:
        results += [hunt.check(each) for each in alone(case)]
    message = "; ".join(f"{'alone: ' * (i > 0)}{text}" for i, (_, _, text) in enumerate(results) if text)
    return all(holds for holds, _, _ in results), min(ratio for _, ratio, _ in results), message


def main(cases: int, seed: int = 0, family: str | None = None, show: int = 30) -> None:
    """Check the cases of so many seeds; exit with 1 if anything does not hold."""
    hunt.search(range(seed, seed + cases), lambda at: case(at, family), check, show)


if __name__ == "__main__":
    typer.run(main)
