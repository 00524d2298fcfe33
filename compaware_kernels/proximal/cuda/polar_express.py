"""Polar Express coefficients: minimax quintics for the matrix sign and inverse square root iterations.

``p(x) = a x + b x^3 + c x^5`` minimizes the maximum of ``|1 - p(x)|`` over ``[l, u]``; its range, ``[1 - e, 1 + e]``,
is the next interval. Each polynomial is optimal, and so is their composition. Two safeguards against rounding: a value
at the upper end is mapped to the upper end again, where a rounding error beyond it would grow, so the intervals are
extended by one percent (BEYOND). And large values are mapped as low as the smallest ones, where a rounding error might
make them negative, so l is at least 0.003 (CUSHION); smaller values still grow by nearly as much.

Source: Amsel, Persson, Musco & Gower, The Polar Express, arXiv 2505.16932, 2025, section 3 (theorem 1, algorithm 1).
"""

from __future__ import annotations

from functools import cache

import numpy as np

__all__ = ["BEYOND", "CUSHION", "LOWEST", "quintic", "schedule"]

LOWEST = 1e-16  # lower end of the first interval: smaller values are rounding errors
BEYOND, CUSHION = 1.01, 0.003


@cache
def schedule() -> tuple[tuple[float, float, float, float], ...]:
    """Coefficients (l, a, b, c) of each step, from ``[LOWEST, 1]`` to convergence; an even number of steps."""
    steps, l, u = [], LOWEST, BEYOND
    while u - l > 1e-5:
        a, b, c, e = quintic(max(l, CUSHION), u)
        steps.append((l, a, b, c))
        l, u = min(l * (a + b * l**2 + c * l**4), 1 - e), 1 + BEYOND * e
    return tuple(steps)


def quintic(l: float, u: float) -> tuple[float, float, float, float]:
    """Minimax quintic (a, b, c) on ``[l, u]`` and its error e, by Remez exchange: e, -e, e, -e at l, q, r, u."""
    q, r, e = (3 * l + u) / 4, (l + 3 * u) / 4, np.inf
    for _ in range(100):
        x, before = np.array([l, q, r, u]), e
        a, b, c, e = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        if not abs(e - before) > 1e-15:
            break
        q, r = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return a, b, c, abs(e)
