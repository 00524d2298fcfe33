"""Penalties on singular values as objects: the solver asks them, so that a new one is one class."""

import ast
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from compaware_kernels.proximal import solver, spectral_functions
from compaware_kernels.proximal.record import Record
from compaware_kernels.proximal.spectral_functions import (
    FirmThreshold,
    Rescaled,
    SoftThreshold,
    Spectral,
    Truncate,
    WeightedThreshold,
    batched,
)
from tests.helpers.cases import low_rank, with_spectrum

PACKAGE = Path(spectral_functions.__file__).parents[1]
MAKERS = ("functional.py", "inplace.py", "penalties.py", "spectral_functions.py", "selftest.py")
CLASSES = {kind.__name__ for kind in Spectral.__subclasses__() if kind.__module__ == Spectral.__module__}
FUNCTIONS = [SoftThreshold(1.0), FirmThreshold(1.0, 1.3), FirmThreshold(1.0, 40.0), Truncate(3),
             WeightedThreshold(torch.linspace(1, 2, 40).double()), FirmThreshold(0.25, 1.3).scaled(2),
             Rescaled(SoftThreshold(4.0), -2)]  # fmt: skip


@dataclass(frozen=True)
class ElasticNet(Spectral):
    """``max(s - tau, 0) / (1 + ridge)``: the proximal operator of ``tau ||W||_* + ridge / 2 ||W||_F^2``."""

    tau: float
    ridge: float

    @property
    def floor(self):
        return self.tau

    @property
    def slope(self):
        return 1 / (1 + self.ridge)

    def __call__(self, s):
        return (s - self.tau).clamp_min(0) / (1 + self.ridge)


@pytest.mark.parametrize("make, method", [
    (lambda: 1e-4 * torch.randn(30, 20).double(), "zero"),
    (lambda: torch.randn(12, 9).double(), "jacobi"),
    (lambda: low_rank(500, 300, 20), "subspace"),
    (lambda: with_spectrum(300, 200, torch.linspace(0.1, 5, 200)), "svd"),
])  # fmt: skip
def test_a_new_penalty_is_one_class(make, method):
    W, function = make().float(), ElasticNet(1.0, 0.5)
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    truth = (U * function(s)) @ Vh
    (info,) = solver.shrink_([Record(W, fold=None)], [function], tol=1e-3)
    assert info.method.startswith(method) and float((W - truth).norm()) <= float(info.error_bound)
    assert float(torch.linalg.matrix_norm(W - truth, 2)) <= 1e-3 + 1e-6 * float(truth.norm())


def test_nothing_else_asks_for_the_class():
    """Only what makes these objects knows their classes."""
    for path in PACKAGE.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        if names & CLASSES:
            assert path.name in MAKERS, path
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            asked = isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "type", "issubclass")
            assert not (asked and CLASSES & {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}), path


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: type(f).__name__)
def test_what_a_function_says_of_itself(function):
    """By differences, between any two singular values: floor, slope, and whether a Gram matrix will do."""
    s = torch.linspace(5, 0, 4001, dtype=torch.float64)
    if function.slope is not None:
        f = function(s)
        assert not f[s <= function.floor].any() and (f[s > function.floor] > 0).all() and (f <= s).all()
        assert float((-f.diff() / -s.diff()).abs().max()) <= function.slope * (1 + 1e-9)
        g, soft = f / s.clamp_min(1e-9), (1 - function.floor / s.clamp_min(1e-9)).clamp_min(0)
        assert not function.gram or (g.diff().abs() <= function.slope * soft.diff().abs() + 1e-12).all()
        tau, slope = function.floor, function.slope
        if function.ramp:
            assert function.ramp == (tau, slope)
            torch.testing.assert_close(f, torch.minimum(slope * (s - tau), s).clamp_min(0), rtol=0, atol=1e-15)
        for below in (0.0, 0.5, 1.0):
            gain, kept = function.gain(s, below), s > max(below, tau) + 1e-6
            steepest = f / (s - below) / slope
            assert (
                (gain[kept] >= steepest[kept].clamp(max=1) - 1e-12).all() and (gain <= 1).all() and (gain >= 0.5).all()
            )
        assert function.tolerance(1e-3) == 1e-3 / slope
    else:
        assert not function.gram and function.ramp is None
        assert function.tolerance(1e-3) == 1e-3


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("exponent", [-40, 7, 990])
def test_a_scaled_function_is_that_of_a_scaled_matrix(function, exponent):
    s = torch.linspace(3, 0.1, 40, dtype=torch.float64)
    for scaled in (function.scaled(exponent), Rescaled(function, exponent)):
        assert scaled.floor == function.floor * 2.0**exponent and scaled.count == function.count
        assert torch.equal(scaled(s * 2.0**exponent), function(s) * 2.0**exponent)
        if isinstance(scaled, Rescaled) and exponent > 900:  # its arguments may have lost their digits
            assert scaled.lipschitz(s, 0.0, 0.0) == math.inf and not scaled.gram and scaled.slope is None
            continue
        assert scaled.slope == function.slope and scaled.gram == function.gram and scaled.tolerance(0.1) > 0
        given = s * 2.0**exponent, 0.05 * 2.0**exponent, 1e-3 * 2.0**exponent
        assert scaled.lipschitz(*given) == pytest.approx(function.lipschitz(s, 0.05, 1e-3))
        torch.testing.assert_close(scaled.gain(*given[:2]), function.gain(s, 0.05), rtol=0, atol=1e-12)
    assert Truncate(2).scaled(-5) == Truncate(2) != SoftThreshold(2.0)


def test_pieces_of_the_firm_threshold():
    s = torch.linspace(0, 5, 100, dtype=torch.float64)
    for gamma in (1.1, 2.0, 50.0):
        function = FirmThreshold(0.7, gamma)
        total = sum(weight * SoftThreshold(tau)(s) for weight, tau in function.pieces)
        torch.testing.assert_close(total, function(s), rtol=0, atol=1e-13)


def test_a_batch_of_functions_is_each_for_its_own():
    counts, s = [2, 0, 3, 1], torch.rand(6, 5, dtype=torch.float64).sort(descending=True).values
    for kind in (
        [SoftThreshold(t) for t in (0.1, 0.2, 0.3, 0.4)],
        [FirmThreshold(t, 1 + 9 * t) for t in (0.1, 0.2, 0.3, 0.4)],
        [Truncate(r) for r in (0, 1, 2, 3)],
        [WeightedThreshold(torch.full((5,), t).double()) for t in (0.1, 0.2, 0.3, 0.4)],
        [SoftThreshold(0.1), Truncate(2), FirmThreshold(0.2, 2.0), SoftThreshold(0.5)],
    ):
        wanted = torch.cat([f(part) for f, part in zip(kind, s.split(counts), strict=True)])
        assert torch.equal(batched(kind, counts)(s), wanted)
