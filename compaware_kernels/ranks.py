"""Spectra -> ranks: rules that say how many singular values a layer keeps.

A rule is called with singular values ``s`` ``[..., k]`` in descending order and returns one int: the largest rank over
the leading axes (the groups of a convolution share one rank). Every rule returns between 0 and k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._utils.dtypes import compute_dtype


@dataclass(frozen=True)
class Rule:
    """A rank rule and how it is written on the command line, ``name:value``."""

    text: str
    count: Callable[[Tensor], Tensor]

    def __call__(self, s: Tensor) -> int:
        s = s.detach().double()
        return min(int(self.count(s).max()), s.shape[-1]) if s.numel() else 0

    def __str__(self) -> str:
        return self.text


def threshold(value: float, *, relative: bool = False) -> Rule:
    """Singular values above ``value``; with ``relative``, above ``value`` times the largest one."""
    _require(value >= 0 and math.isfinite(value), "threshold", "a finite number >= 0", value)
    name = "relative" if relative else "threshold"
    return Rule(f"{name}:{value}", lambda s: (s > value * (s[..., :1] if relative else 1)).sum(-1))


def nuclear(share: float) -> Rule:
    """The fewest singular values whose *sum* is at least ``share`` (0 to 1) of the nuclear norm.

    The energy the NIPS 2017 paper's criterion reads as in its authors' experiments; see also :func:`energy`.
    """
    _require(0 <= share <= 1, "nuclear", "a share from 0 to 1", share)
    return Rule(f"nuclear:{share}", lambda s: _fewest(s, share))


def energy(share: float) -> Rule:
    """The fewest singular values whose sum of *squares* is at least ``share`` (0 to 1) of ``||W||_F^2``."""
    _require(0 <= share <= 1, "energy", "a share from 0 to 1", share)
    return Rule(f"energy:{share}", lambda s: _fewest(s.square(), share))


def fixed(rank: int) -> Rule:
    """The same rank for every layer (at most the layer's own full rank)."""
    _require(float(rank).is_integer() and rank >= 1, "fixed", "a whole number >= 1", rank)
    return Rule(f"fixed:{int(rank)}", lambda s: torch.tensor(int(rank)))


def share(fraction: float) -> Rule:
    """A fraction (0 to 1) of the full rank min(m, n), rounded up."""
    _require(0 <= fraction <= 1, "share", "a fraction from 0 to 1", fraction)
    return Rule(f"share:{fraction}", lambda s: torch.tensor(math.ceil(fraction * s.shape[-1])))


def parse(text: str) -> Rule:
    """The rule written as ``name:value``: ``energy:0.99``, ``nuclear:0.9``, ``threshold:1e-3``, ``relative:0.05``,
    ``fixed:16``, ``share:0.25``.  Raises ValueError for anything else."""
    rules = {"threshold": threshold, "relative": lambda v: threshold(v, relative=True), "nuclear": nuclear,
             "energy": energy, "fixed": fixed, "share": share}  # fmt: skip
    name, _, value = text.partition(":")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if name not in rules or math.isnan(number):
        raise ValueError(f"a rank rule is written name:value with name one of {', '.join(rules)}; got {text!r}")
    return rules[name](number)


def break_even(m: int, n: int) -> int:
    """The largest rank at which two factors are smaller than the m x n matrix: ``r (m + n) < m n``."""
    return (m * n - 1) // (m + n) if m and n else 0


def numerical_rank(s: Tensor, dtype: torch.dtype) -> Tensor:
    """How many of ``s`` ``[..., k]`` stand out of the rounding noise of a matrix stored in ``dtype``: int64 ``[...]``.

    The noise has two parts: storing a matrix of spectral norm s_1 rounds each entry by at most eps(dtype) / 2 of itself
    (measured over low-rank results of SVT from 32 x 9 to 1024 x 1024: at most 0.15 eps s_1 in bf16 and fp16), and the
    SVT itself errs in its compute dtype (at most 6 eps s_1). The bound is eps(dtype) s_1 + 32 eps(compute dtype) s_1.
    """
    eps = torch.finfo(dtype).eps + 32 * torch.finfo(compute_dtype(dtype)).eps
    return (s > eps * s[..., :1]).sum(-1)


def _fewest(weights: Tensor, share: float) -> Tensor:
    total = weights.cumsum(-1)
    needed = share * total[..., -1:]
    return torch.where(needed[..., 0] > 0, (total < needed).sum(-1) + 1, 0)


def _require(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise ValueError(f"ranks.{name} wants {wanted}; got {got}")
