"""What the error bounds are made of: Gaussian probes in fp64.

Norms of matrices that are never formed are bounded from above by a few products with Gaussian vectors. For a fixed
matrix R and p independent standard normal probes Omega, ``||R Omega||_F^2`` is a sum of chi-squared variables with p
degrees of freedom, weighted by the sigma_i(R)^2; by Chernoff's inequality

    ``P(||R Omega||_F^2 <= c p ||R||_F^2) <= exp(p / 2 (1 - c + ln c))``,   0 < c < 1,

so ``||R||_2 <= ||R||_F <= ||R Omega||_F / sqrt(c p)`` fails with a probability of at most FAILURE, which fixes c. With
a power of R instead of R the root sharpens the bound of ||R||_2. What a bound claims about rounding is probed, too:
the products behind a result are checked against products in fp64.

Sources: Laurent & Massart, Ann. Stat. 28(5), 2000, section 4 (the inequality); Halko, Martinsson & Tropp, SIAM Review
53(2), 2011, 4.3 (the use).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .products import times

PROBES = 12
FAILURE = 1e-10  # of one statement; a bound rests on fewer than ten


@lru_cache
def _factor(probes: int) -> float:
    """1 / sqrt(c p)."""
    low, high = 1e-300, 1.0
    for _ in range(2000):
        c = math.sqrt(low * high)
        low, high = (c, high) if probes / 2 * (1 - c + math.log(c)) <= math.log(FAILURE) else (low, c)
    return 1 / math.sqrt(low * probes)


def norm_from_probes(sketch: Tensor, power: int = 1) -> float:
    """An upper bound of ||R||_2 (of ||R||_F, where power is 1) from ``sketch`` ``[., p]``.

    ``sketch = R Omega``, ``R^T R Omega``, ``R R^T R Omega``, ... with ``power`` factors.
    """
    return (_factor(sketch.shape[1]) * float(torch.linalg.vector_norm(sketch.double()))) ** (1 / power)


def distance_to_triplets(X: Tensor, U: Tensor, s: Tensor, V: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """How far X is from a matrix that has exactly the singular triplets (U, s, V): (upper bound, estimate), Frobenius.

    With orthonormal U ``[m, r]`` and V ``[n, r]`` that matrix is ``U diag(s) V^T + (I - U U^T) X (I - V V^T)``, at the
    distance ``(||X^T U - V s||^2 + ||(I - U U^T)(X V - U s)||^2)^(1/2)``. U and V are replaced by the nearest
    orthonormal matrices, at a distance (from U s) of about ``||(U^T U - I) s|| / 2``: counted once fully.
    """
    U, V, s = U.double(), V.double(), s.double()
    draw = {"generator": generator, "dtype": torch.float64, "device": X.device}
    right, inner = torch.randn(X.shape[1], PROBES, **draw), torch.randn(len(s), PROBES, **draw)
    products = times(X, torch.cat([right, V @ inner], 1))
    left = (products[:, :PROBES].mT @ U - (right.mT @ V) * s).mT
    F = products[:, PROBES:] - U @ (s[:, None] * inner)
    scaled = s[:, None] * inner
    skew = [Y.mT @ (Y @ scaled) - scaled for Y in (U, V)]
    estimate = math.sqrt(sum(float(R.square().sum()) for R in (left, F, *skew)) / PROBES)
    bound = math.hypot(norm_from_probes(left), norm_from_probes(F)) + sum(norm_from_probes(R) for R in skew)
    return bound, estimate


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def storage(dtype: torch.dtype, norm: float, numel: int) -> float:
    """What rounding a matrix of this Frobenius norm to ``dtype`` may change, subnormals included."""
    info = torch.finfo(dtype)
    return info.eps / 2 * norm + math.sqrt(numel) * info.smallest_normal * info.eps
