"""Functions of the singular values: what the engine does to a spectrum, and how errors pass through it.

Each maps descending singular values ``s`` to new ones. Everything at or below ``floor`` is mapped to zero, so that the
engine needs the singular triplets above it only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Spectral(Protocol):
    """``count``: how many singular values are wanted, or None for all above ``floor``."""

    count: int | None

    @property
    def floor(self) -> float: ...

    def __call__(self, s: Tensor) -> Tensor:
        """``[..., k]`` descending -> ``[..., k]``."""

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        """How much the function of a matrix may move, per change of the matrix of up to ``error`` (Frobenius).

        s: the singular values known, ``[k]``; ``below`` bounds all others.
        """

    def gain(self, s: Tensor, below: float) -> Tensor:
        """How much it moves per unit of what the triplets of s lack, where that is little: an estimate."""


@dataclass(frozen=True)
class SoftThreshold:
    """``max(s - tau, 0)``: the proximal operator of ``tau ||W||_*``. Non-expansive."""

    tau: float
    count = None

    @property
    def floor(self) -> float:
        return self.tau

    def __call__(self, s: Tensor) -> Tensor:
        return (s - self.tau).clamp_min(0)

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        return 1.0

    def gain(self, s: Tensor, below: float) -> Tensor:
        """``f(s_i) / (s_i - s_j)``, the divided difference to what is mapped to 0; 1/2 at least, for second order."""
        return ((s - self.tau) / (s - below).clamp_min(1e-300)).clamp(0.5, 1.0)


@dataclass(frozen=True)
class WeightedThreshold:
    """``max(s_i - w_i, 0)`` with ``w_1 <= w_2 <= ...``: the proximal operator of ``sum_i w_i sigma_i(W)``.

    Not convex, and not continuous where singular values with different weights meet.

    Source: Gu, Zhang, Zuo & Feng, CVPR 2014 (weighted nuclear norm); Gaiffas & Lecue, arXiv 1107.1638, 2011.
    """

    weights: Tensor  # [k] fp64, ascending
    count = None

    @property
    def floor(self) -> float:
        return float(self.weights[0])

    def __call__(self, s: Tensor) -> Tensor:
        return (s - self.weights[: s.shape[-1]].to(s.device)).clamp_min(0)

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        """1 + the steepest rise of what is taken away between neighbours, after either has moved by ``error``."""
        s = torch.cat([s.cpu(), torch.tensor([below]).double()])
        lost = torch.minimum(torch.cat([self.weights, self.weights[-1:]])[: len(s)], s)
        rise, gap = lost.diff().clamp_min(0), -s.diff() - 2 * error
        steep = rise > 0
        if bool((gap[steep] <= 0).any()):
            return math.inf
        return 1 + max(((rise + 2 * error) / gap)[steep].tolist(), default=0.0)

    def gain(self, s: Tensor, below: float) -> Tensor:
        return torch.ones_like(s)


@dataclass(frozen=True)
class Truncate:
    """The ``count`` largest stay: the projection on matrices of at most this rank (Eckart & Young, 1936).

    Not convex; unique, and continuous, only where there is a gap after s_count.
    """

    count: int
    floor = 0.0

    def __call__(self, s: Tensor) -> Tensor:
        return torch.where(torch.arange(s.shape[-1], device=s.device) < self.count, s, 0)

    def lipschitz(self, s: Tensor, below: float, error: float) -> float:
        """sigma_r / (sigma_r - sigma_{r+1}), the largest divided difference, after either has moved by ``error``."""
        if self.count == 0 or (len(s) <= self.count and below == 0):
            return 1.0
        last = float(s[self.count - 1])
        if last == 0:  # of lower rank than asked for, but for the error: it stays as it is
            return 2.0
        below = float(s[self.count]) if len(s) > self.count else below
        gap = last - below - 2 * error
        return (last + error) / gap if gap > 0 else math.inf

    def gain(self, s: Tensor, below: float) -> Tensor:
        return torch.ones_like(s)
