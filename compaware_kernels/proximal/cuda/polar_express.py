"""Coefficients of the iterations that turn a symmetric matrix into its sign, or its inverse root: as Polar Express.

``p(x) = a x + b x^3 + c x^5`` brings numbers of ``[l, u]`` nearest to 1: with the least largest ``|1 - p(x)|``. What is
left, ``[1 - e, 1 + e]``, is the next interval. The polynomials are optimal each, and so is their composition; but a
number at the upper end stays at the upper end, and rounding that takes it beyond would grow. So the intervals end a
hundredth farther. And large numbers are brought as low as the lowest, which rounding might turn negative: so no
polynomial is made for numbers below 0.003, and those grow by nearly as much.

Source: Amsel, Persson, Musco & Gower, The Polar Express, arXiv 2505.16932, 2025, section 3 (theorem 1, algorithm 1).
"""

from __future__ import annotations

from functools import cache

import numpy as np

LOWEST = 1e-16  # of the first interval: smaller numbers are rounding
BEYOND, CUSHION = 1.01, 0.003


@cache
def schedule() -> tuple[tuple[float, float, float, float], ...]:
    """(l, a, b, c) of each step, from ``[LOWEST, 1]`` until what is left is rounding; an even number of steps."""
    steps, l, u = [], LOWEST, BEYOND
    while u - l > 1e-5:
        a, b, c, e = quintic(max(l, CUSHION), u)
        steps.append((l, a, b, c))
        l, u = min(l * (a + b * l**2 + c * l**4), 1 - e), 1 + BEYOND * e
    return tuple(steps)


def quintic(l: float, u: float) -> tuple[float, float, float, float]:
    """a, b, c, e of ``[l, u]``, by Remez' exchange: the error is e, -e, e, -e at l, q, r, u."""
    q, r, e = (3 * l + u) / 4, (l + 3 * u) / 4, np.inf
    for _ in range(100):
        x, before = np.array([l, q, r, u]), e
        a, b, c, e = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        if not abs(e - before) > 1e-15:
            break
        q, r = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return a, b, c, abs(e)
