"""Shapes, dtypes, spectra and tolerances of the tests, and matrices with a given spectrum."""

import math

import numpy as np
import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 9), (9, 1), (40, 12), (12, 40), (31, 37), (64, 64)]
EMPTY = [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 5)]
TAU = 0.5


def _ulps(k):
    """Singular values at tau and one fp32 ulp to each side of it."""
    t = np.float32(TAU)
    near = [np.nextafter(t, np.float32(9)), t, np.nextafter(t, np.float32(0))]
    return np.sort(np.resize(np.array(near, dtype=np.float64), k))[::-1]


SPECTRA = {
    "log-spaced to 1e-9": lambda k: np.logspace(0.5, -9, k),
    "half zeros": lambda k: np.where(np.arange(k) < (k + 1) // 2, np.linspace(2, 0.1, k), 0.0),
    "exact ties": lambda k: np.sort(np.resize([2.0, 1.0, TAU, 0.25], k))[::-1],
    "one large": lambda k: np.concatenate([[1e3], np.full(k - 1, 1.0)]),
    "rank 1": lambda k: np.concatenate([[3.0], np.zeros(k - 1)]),
    "all zero": lambda k: np.zeros(k),
    "tau +- 1 ulp": _ulps,
    "all below tau": lambda k: np.linspace(0.9 * TAU, 0, k),
}


def matrix(shape, spectrum, seed=0):
    """fp64 matrix (or a batch of different ones) with the given singular values."""
    *batch, m, n = shape
    rng = np.random.default_rng(seed)
    k = min(m, n)
    U = np.linalg.qr(rng.standard_normal((*batch, m, k)))[0]
    V = np.linalg.qr(rng.standard_normal((*batch, n, k)))[0]
    return (U * SPECTRA[spectrum](k)) @ np.swapaxes(V, -1, -2)


def with_spectrum(m, n, s, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, len(s), generator=generator, dtype=torch.float64)).Q for k in (m, n))
    return (U * torch.as_tensor(s, dtype=torch.float64)) @ V.mT


def low_rank(m, n, r, largest=100.0, outside=0.4, seed=0):
    """fp64 matrix [m, n]: r singular values from 1.5 to ``largest``, plus full-rank noise of spectral norm
    ``outside``."""
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(m, n, generator=generator, dtype=torch.float64)
    noise *= outside / torch.linalg.matrix_norm(noise, 2)
    return with_spectrum(m, n, torch.logspace(math.log10(1.5), math.log10(largest), r), seed) + noise
