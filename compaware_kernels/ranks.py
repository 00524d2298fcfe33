"""Rank rules: singular values [..., k] -> the rank that a layer keeps, 0 to k.

A rule is called with singular values ``s`` ``[..., k]`` in descending order and returns one int: the largest rank over
the leading axes (the groups of a convolution share one rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._utils.dtypes import compute_dtype

__all__ = ["Rule", "Spectrum", "break_even", "energy", "fixed", "nuclear", "numerical_rank", "parse", "share",
           "threshold"]  # fmt: skip


@dataclass(frozen=True)
class Spectrum:
    """Bounds of the singular values of G matrices ``[m, n]``, k = min(m, n), all fp64.

    ``squares_i - error <= sigma_i^2 <= squares_i + error + missed``, and for every r
    ``-sum_error <= sum_{i <= r} (sigma_i^2 - squares_i) <= sum_error + missed``.
    """

    squares: Tensor  # [G, k], descending, not negative
    total: Tensor  # [G], the sum of all sigma_i^2: ||M||_F^2
    missed: Tensor  # [G], energy of which it is unknown where it belongs
    error: Tensor  # [G], of each square
    sum_error: Tensor  # [G], of each partial sum

    @property
    def low(self) -> Tensor:
        """Lower bounds of the singular values ``[G, k]``."""
        return (self.squares - self.error[:, None]).clamp_min(0).sqrt()

    @property
    def high(self) -> Tensor:
        """Upper bounds of the singular values ``[G, k]``."""
        return (self.squares + (self.error + self.missed)[:, None]).clamp_max(self.total[:, None]).sqrt()

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of the partial sums of squares ``[G, k]``."""
        sums = self.squares.cumsum(-1)
        most = torch.minimum(sums + (self.sum_error + self.missed)[:, None], self.total[:, None])
        return (sums - self.sum_error[:, None]).clamp_min(0), most


@dataclass(frozen=True)
class Rule:
    """A rank rule: singular values ``[..., k]`` -> int, and its text for the command line, ``name:value``."""

    text: str
    count: Callable[[Tensor], Tensor]  # fp64 [..., k], descending -> ranks [...]
    limits: Callable[[Spectrum], tuple[Tensor, Tensor]] | None = None  # least and largest ranks [G] within bounds

    def __call__(self, s: Tensor) -> int:
        """The largest rank over the leading axes of ``s`` ``[..., k]``, at most k; 0 if ``s`` is empty."""
        s = s.detach().double()
        return min(int(self.count(s).max()), s.shape[-1]) if s.numel() else 0

    def decide(self, spectrum: Spectrum) -> int | None:
        """The rank of all matrices with such singular values; None if it is not the same for all, or unknown."""
        if self.limits is None:
            return None
        k = spectrum.squares.shape[-1]
        least, most = (min(int(ranks.max()), k) for ranks in self.limits(spectrum))
        return most if least == most else None

    def __str__(self) -> str:
        return self.text


def threshold(value: float, *, relative: bool = False) -> Rule:
    """Rank rule: the number of singular values above ``value``; if ``relative``, above ``value`` times the largest.

    Raises:
        ValueError: ``value`` is negative or not finite.
    """
    _require(value >= 0 and math.isfinite(value), "threshold", "a finite number >= 0", value)
    name = "relative" if relative else "threshold"

    def above(s: Tensor, first: Tensor) -> Tensor:
        return (s > value * (first[..., :1] if relative else 1)).sum(-1)

    return Rule(f"{name}:{value}", lambda s: above(s, s), lambda x: (above(x.low, x.high), above(x.high, x.low)))


def nuclear(share: float) -> Rule:
    """Rank rule: the fewest singular values whose *sum* is at least ``share`` (0 to 1) of the nuclear norm.

    ``min r: s_1 + ... + s_r >= share ||W||_*``. See :func:`energy` for the sum of squares.

    Raises:
        ValueError: ``share`` is not from 0 to 1.

    Source: the criterion of Alvarez & Salzmann, NIPS 2017, as their experiments apply it.
    """
    _require(0 <= share <= 1, "nuclear", "a share from 0 to 1", share)

    def limits(x: Spectrum) -> tuple[Tensor, Tensor]:
        low, high = x.low.cumsum(-1), x.high.cumsum(-1)
        return _reach(high, share * low[..., -1:]), _reach(low, share * high[..., -1:])

    return Rule(f"nuclear:{share}", lambda s: _fewest(s, share), limits)


def energy(share: float) -> Rule:
    """Rank rule: the fewest singular values whose sum of *squares* is at least ``share`` (0 to 1) of ``||W||_F^2``.

    Raises:
        ValueError: ``share`` is not from 0 to 1.
    """
    _require(0 <= share <= 1, "energy", "a share from 0 to 1", share)

    def limits(x: Spectrum) -> tuple[Tensor, Tensor]:
        low, high = x.sums
        return _reach(high, share * x.total[:, None]), _reach(low, share * x.total[:, None])

    return Rule(f"energy:{share}", lambda s: _fewest(s.square(), share), limits)


def fixed(rank: int) -> Rule:
    """Rank rule: ``rank`` for every layer, at most its full rank min(m, n).

    Raises:
        ValueError: ``rank`` is not a whole number >= 1.
    """
    _require(float(rank).is_integer() and rank >= 1, "fixed", "a whole number >= 1", rank)
    return _independent(f"fixed:{int(rank)}", lambda k: int(rank))


def share(fraction: float) -> Rule:
    """Rank rule: a fraction (0 to 1) of the full rank min(m, n), rounded up.

    Raises:
        ValueError: ``fraction`` is not from 0 to 1.
    """
    _require(0 <= fraction <= 1, "share", "a fraction from 0 to 1", fraction)
    return _independent(f"share:{fraction}", lambda k: math.ceil(fraction * k))


def parse(text: str) -> Rule:
    """The rank rule with the text ``name:value``.

    Args:
        text: ``energy:0.99``, ``nuclear:0.9``, ``threshold:1e-3``, ``relative:0.05``, ``fixed:16`` or ``share:0.25``.

    Raises:
        ValueError: any other name, or a value that the rule does not take.
    """
    rules = {"threshold": threshold, "relative": lambda v: threshold(v, relative=True), "nuclear": nuclear,
             "energy": energy, "fixed": fixed, "share": share}  # fmt: skip
    name, _, value = text.partition(":")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if name not in rules or math.isnan(number):
        raise ValueError(f"rank rule: wanted name:value with name one of {', '.join(rules)}; got {text!r}")
    return rules[name](number)


def break_even(m: int, n: int) -> int:
    """The largest rank r at which two factors have fewer elements than the m x n matrix: ``r (m + n) < m n``."""
    return (m * n - 1) // (m + n) if m and n else 0


def numerical_rank(s: Tensor, dtype: torch.dtype) -> Tensor:
    """Numerical rank: number of singular values ``[..., k]`` above the rounding error of ``dtype``, int64 ``[...]``.

    ``s_i > (eps(dtype) + 32 eps(compute dtype)) s_1``. The first term covers storing a matrix of spectral norm s_1,
    which rounds each entry by at most eps(dtype) / 2 of itself (measured over low-rank results of SVT from 32 x 9 to
    1024 x 1024: at most 0.15 eps s_1 in bf16 and fp16), the second the error of the SVT in its compute dtype (measured:
    at most 6 eps s_1).

    Args:
        s: descending.
        dtype: that of the matrix.
    """
    eps = torch.finfo(dtype).eps + 32 * torch.finfo(compute_dtype(dtype)).eps
    return (s > eps * s[..., :1]).sum(-1)


def _fewest(weights: Tensor, share: float) -> Tensor:
    """The fewest of the first ``weights`` ``[..., k]`` that sum to ``share`` of all, int64 ``[...]``."""
    total = weights.cumsum(-1)
    return _reach(total, share * total[..., -1:])


def _reach(sums: Tensor, needed: Tensor) -> Tensor:
    """The fewest terms whose partial sums ``[..., k]`` reach what is ``needed`` ``[..., 1]``, int64 ``[...]``."""
    return torch.where(needed[..., 0] > 0, (sums < needed).sum(-1) + 1, 0)


def _independent(text: str, rank: Callable[[int], int]) -> Rule:
    """Rule of a rank that follows from k alone."""
    fixed = lambda squares: torch.tensor(rank(squares.shape[-1]))  # noqa: E731
    return Rule(text, fixed, lambda x: (fixed(x.squares),) * 2)


def _require(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise ValueError(f"ranks.{name}: wanted {wanted}; got {got}")
