"""Spectral functions: one class per penalty, the proximal operator as a map of singular values ``[..., k]``.

Each maps descending singular values ``s`` to ``f(s)``, and all values at or below ``floor`` to zero, so that only the
singular triplets above ``floor`` are needed. The solver, its routes and the GPU step query the attributes below and
never the class: a new penalty is a new class in this module and needs no change elsewhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .error_bounds import NOT_ZERO, rescale

__all__ = ["FirmThreshold", "Rescaled", "SoftThreshold", "Spectral", "Truncate", "WeightedThreshold", "batched"]


class Spectral(ABC):
    """Spectral function ``f: [..., k] -> [..., k]``: value, Lipschitz constant, and which solver routes may serve it.

    The defaults are valid for any function and permit the SVD, Jacobi and subspace routes. Subclasses are frozen
    dataclasses; if all fields are floats, each may be a tensor ``[B, 1]`` instead, with one number per matrix.

    Attributes:
        count: number of leading singular values needed; None: all above ``floor``.
        slope: global Lipschitz constant (Frobenius norm); None if it depends on the matrix.
        gram: whether the Gram route may serve: ``f(s) / s`` changes by at most ``slope`` times as much as
            ``max(1 - floor / s, 0)`` between any two s.
        ramp: ``(tau, slope)`` if f is ``max(min(slope (s - tau), s), 0)``, the form the GPU step computes; else None.
    """

    count: int | None = None
    slope: float | None = None
    gram = False
    ramp: tuple[float, float] | None = None

    @property
    @abstractmethod
    def floor(self) -> float:
        """Threshold: ``f(s) = 0`` for every ``s <= floor``."""

    @abstractmethod
    def __call__(self, s: Tensor) -> Tensor:
        """f(s): ``[..., k]``, descending -> ``[..., k]``."""

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        """Local Lipschitz constant (Frobenius norm) of the matrix function, for perturbations of up to ``error``.

        s: the computed singular values ``[k]`` before the function is applied, descending, fp64, perhaps on a GPU;
        ``below`` bounds all others from above, 0 where all are computed. Each may be off by ``error``.
        """
        return self.slope

    def gain(self, s: Tensor, below: float) -> Tensor:
        """First-order effect of a unit residual of each triplet on the result, in units of slope: ``[k] -> [k]``."""
        return torch.ones_like(s)

    def scaled(self, exponent: int) -> Spectral:
        """The function ``2^e f(2^-e s)``, which maps the singular values of ``2^e W``."""
        return Rescaled(self, exponent)

    def tolerance(self, tol: float) -> float:
        """Perturbation of the matrix that moves its function by at most ``tol``."""
        return tol if self.slope is None else tol / self.slope


@dataclass(frozen=True)
class Rescaled(Spectral):
    """``2^e f(2^-e s)``: a function f for matrices that were multiplied by ``2^e``; its values are those of f."""

    function: Spectral
    exponent: int

    @property
    def count(self) -> int | None:
        return self.function.count

    @property
    def slope(self) -> float | None:
        return None if self._inexact else self.function.slope

    @property
    def gram(self) -> bool:
        return self.function.gram and not self._inexact

    @property
    def floor(self) -> float:
        return rescale(self.function.floor, self.exponent)

    def __call__(self, s: Tensor) -> Tensor:
        return rescale(self.function(rescale(s, -self.exponent)), self.exponent)

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        given = (rescale(x, -self.exponent) for x in (s, below, error))
        return math.inf if self._inexact else self.function.lipschitz(*given)

    def gain(self, s: Tensor, below: float) -> Tensor:
        return self.function.gain(rescale(s, -self.exponent), rescale(below, -self.exponent))

    @property
    def _inexact(self) -> bool:
        """Whether the arguments of f may be subnormal, with few digits."""
        return self.exponent > 900


def batched(functions: Sequence[Spectral], counts: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """One function ``[B, k] -> [B, k]`` of the spectra of B matrices: counts[i] consecutive rows take functions[i]."""
    if len(functions) == 1:
        return functions[0]
    kind, names = type(functions[0]), [field.name for field in fields(functions[0])]
    rows = [[getattr(f, name) for name in names] for f in functions if type(f) is kind]
    if len(rows) < len(functions) or not all(isinstance(x, float) for row in rows for x in row):
        return lambda s: torch.cat([f(part) for f, part in zip(functions, s.split(counts), strict=True)])
    each = torch.tensor(rows, dtype=torch.float64).repeat_interleave(torch.tensor(counts), 0)
    return lambda s: kind(*each.to(s.device).split(1, 1))(s)


@dataclass(frozen=True)
class SoftThreshold(Spectral):
    """``max(s - tau, 0)``: the proximal operator of ``tau ||W||_*``. Non-expansive.

    Source: Cai, Candes & Shen, SIAM J. Optim. 20(4), 2010, theorem 2.1.
    """

    tau: float
    slope = 1.0
    gram = True

    @property
    def floor(self) -> float:
        return self.tau

    @property
    def ramp(self) -> tuple[float, float]:
        return self.tau, self.slope

    def __call__(self, s: Tensor) -> Tensor:
        return (s - self.tau).clamp_min(0)

    def scaled(self, exponent: int) -> Spectral:
        return SoftThreshold(rescale(self.tau, exponent))

    def gain(self, s: Tensor, below: float) -> Tensor:
        """Divided difference ``f(s_i) / (s_i - below)`` to a value mapped to 0; >= 1/2, for second-order terms."""
        return ((s - self.tau) / (s - below).clamp_min(NOT_ZERO)).clamp(0.5, 1.0)


@dataclass(frozen=True)
class FirmThreshold(Spectral):
    """``max(min(slope (s - tau), s), 0)``, ``slope = gamma / (gamma - 1)``: the proximal operator of MCP, gamma > 1.

    0 up to tau, s itself above gamma tau, linear in between. The minimax concave penalty of a singular value s is
    ``tau s - s^2 / (2 gamma)`` up to gamma tau, and constant from there on.

    Source: Gao & Bruce, Statistica Sinica 7, 1997 (firm shrinkage); Zhang, Ann. Stat. 38(2), 2010 (MCP).
    """

    tau: float
    gamma: float
    gram = True

    @property
    def floor(self) -> float:
        return self.tau

    @property
    def slope(self) -> float:
        return self.gamma / (self.gamma - 1)

    @property
    def ramp(self) -> tuple[float, float]:
        return self.tau, self.slope

    @property
    def pieces(self) -> tuple[tuple[float, float], ...]:
        """Two pairs (weight, threshold): f as a sum of soft thresholds, whose gradients are known.

        ``f = (gamma soft(tau) - soft(gamma tau)) / (gamma - 1)``
        """
        return (self.slope, self.tau), (1 - self.slope, self.gamma * self.tau)

    def __call__(self, s: Tensor) -> Tensor:
        return torch.minimum(self.slope * (s - self.tau), s).clamp_min(0)

    def scaled(self, exponent: int) -> Spectral:
        return FirmThreshold(rescale(self.tau, exponent), self.gamma)

    def gain(self, s: Tensor, below: float) -> Tensor:
        """Divided difference as for the soft threshold where f is linear; smaller above gamma tau."""
        return (torch.minimum(s - self.tau, s / self.slope) / (s - below).clamp_min(NOT_ZERO)).clamp(0.5, 1.0)


@dataclass(frozen=True, eq=False)
class WeightedThreshold(Spectral):
    """``max(s_i - w_i, 0)`` with ``w_1 <= w_2 <= ...``: the proximal operator of ``sum_i w_i sigma_i(W)``.

    Not convex, and discontinuous where singular values with different weights coincide.

    Source: Gu, Zhang, Zuo & Feng, CVPR 2014 (weighted nuclear norm); Gaiffas & Lecue, arXiv 1107.1638, 2011.
    """

    weights: Tensor  # [k] fp64, ascending

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and torch.equal(self.weights, other.weights)

    __hash__ = None

    @property
    def floor(self) -> float:
        return float(self.weights[0])

    def __call__(self, s: Tensor) -> Tensor:
        return (s - self.weights[: s.shape[-1]].to(s.device)).clamp_min(0)

    def scaled(self, exponent: int) -> Spectral:
        return WeightedThreshold(rescale(self.weights, exponent))

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        """1 + the largest divided difference of ``s - f(s)`` between neighbors, each perturbed by ``error``."""
        s = torch.cat([s.cpu(), torch.tensor([below], dtype=torch.float64)])
        lost = torch.minimum(torch.cat([self.weights, self.weights[-1:]])[: len(s)], s)
        rise, gap = lost.diff().clamp_min(0), -s.diff() - 2 * error
        steep = rise > 0
        if bool((gap[steep] <= 0).any()):
            return math.inf
        return 1 + max(((rise + 2 * error) / gap)[steep].tolist(), default=0.0)


@dataclass(frozen=True)
class Truncate(Spectral):
    """Keeps the ``count`` largest: the projection on matrices of rank at most ``count`` (Eckart & Young, 1936).

    Not convex; unique and continuous only if ``s_count > s_{count+1}``.
    """

    count: int
    floor = 0.0

    def __call__(self, s: Tensor) -> Tensor:
        return torch.where(torch.arange(s.shape[-1], device=s.device) < self.count, s, 0)

    def scaled(self, exponent: int) -> Spectral:
        return self

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        """The largest divided difference, sigma_r / (sigma_r - sigma_{r+1}), each perturbed by ``error``."""
        if self.count == 0 or (len(s) <= self.count and below == 0):
            return 1.0
        last = float(s[self.count - 1])
        if last == 0:  # the rank is already lower, up to ``error``: f is the identity
            return 2.0
        below = float(s[self.count]) if len(s) > self.count else below
        gap = last - below - 2 * error
        return (last + error) / gap if gap > 0 else math.inf
