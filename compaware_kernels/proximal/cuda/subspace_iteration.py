"""Subspace route of the GPU: SVT of W ``[m, n]``, m >= n, by warm-started subspace iteration, in four programs.

V ``[n, k]`` approximates the right singular vectors of the last call, k slightly above the rank. One and a half steps
of subspace iteration,

    ``U = orth(W V)``,  ``Z = W^T U``,  ``U = orth(W Z)``,  ``Z = W^T U``,  ``Z^T Z = Q diag(mu^2) Q^T``,

give ``W = U Z^T + R`` with ``U^T R = 0``: the triplets (U Q, mu, Z Q / mu) are exact for ``U Z^T``. The kept ones
(index s) are exact for ``W - F V_s^T``, ``F = W V_s - U_s diag(mu_s)``, whose other singular values are at most
``(mu_j^2 + ||R||^2)^(1/2)``, with j the first discarded triplet. So, as the prox is non-expansive,

    ``||U_s max(mu_s - tau, 0) V_s^T - prox(W)||_F <= ||F||_F + || max(rest - tau, 0) ||_F``

plus rounding: ``W^T U_s - V_s mu_s``, and the loss of orthogonality of U_s and V_s. All four are measured with 32
Gaussian probes in fp64; ``||R||`` with powers ``R, R^T R, ...`` applied to the same probes (see
:mod:`compaware_kernels.proximal.error_bounds`). U is orthonormalized by a Cholesky factor in fp64 and two Newton-Schulz
steps, ``U (3 I - U^T U) / 2``, which converge quadratically and are matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .device_structs import POWERS, PROBES
from .matmul_program import Program

__all__ = ["allocate", "programs"]


def allocate(layer: SimpleNamespace, new) -> None:
    """Allocate the workspace of one layer; ``new(*shape, dtype)`` makes a tensor."""
    m, n, k, wide = layer.m, layer.n, layer.k, torch.float64
    for name, shape in {
        "V": (n, k), "B": (m, k), "U": (m, k), "Z": (n, k), "S": (k, k), "E": (k, k),
        "Qs": (k, k), "Qv": (k, k), "Qf": (k, k), "Us": (m, k), "right": (n, k), "short": (k, PROBES),
        "ahead": (m, PROBES), "powers": (sum(n if j % 2 == 0 else m for j in range(2, POWERS + 1)), PROBES),
    }.items():  # fmt: skip
        setattr(layer, name, new(*shape))
    for name, shape in {
        "G": (k, k), "scratch": (k, k), "H": (k, k), "L": (k, k), "C": (k, k), "mu": (k,), "Y": (m, PROBES),
        "UY": (k, PROBES), "lost": (k, PROBES), "first": (m, PROBES), "inside": (k, PROBES), "scaled": (k, PROBES),
        "T1": (k, PROBES), "T2": (k, PROBES), "T3": (k, PROBES), "HT": (k, PROBES), "CT": (k, PROBES),
        "Ui": (m, PROBES), "Vi": (n, PROBES), "F": (m, PROBES), "left": (k, PROBES), "skew_U": (k, PROBES),
        "skew_V": (k, PROBES),
    }.items():  # fmt: skip
        setattr(layer, name, new(*shape, dtype=wide))
    layer.restart = layer.Z


def programs(layers: Sequence[SimpleNamespace], count: int, one: dict[str, Tensor]) -> tuple[Program, ...]:
    """Four programs, run before ck_orth (two), ck_ritz and ck_judge; ``one``: coefficients shared by all layers."""
    found = []
    for steps in (
        [_multiply_by_W("V"), _inner],
        [*_ORTHONORMAL, _multiply_by_W_transposed, _multiply_by_W("Z"), _inner],
        [*_ORTHONORMAL, _multiply_by_W_transposed, _gram_matrices, _in_basis, _probe_residuals],
        [*_CHECKS, *_POWERS],
    ):
        program = Program(layers=count)
        for step in steps:
            for layer in layers:
                step(program, layer, one)
            program.stage()
        found.append(program)
    return tuple(found)


def _multiply(program: Program, layer: SimpleNamespace, *operands, **options) -> None:
    program.multiply(layer.number, *operands, gate=layer.gate["try"], **options)


def _multiply_by_W(of: str):
    def step(program, x, one):
        _multiply(program, x, x.W, getattr(x, of), x.B)

    return step


def _inner(program, x, one):
    _multiply(program, x, x.B.mT, x.B, x.G, wide=True)


def _orthonormal(program, x, one):
    _multiply(program, x, x.B, x.S, x.U)


def _gram(of: str):
    def step(program, x, one):
        U = getattr(x, of)
        _multiply(program, x, U.mT, U, x.E)

    return step


def _newton_schulz(of: str, to: str):
    def step(program, x, one):
        U = getattr(x, of)
        _multiply(program, x, U, x.E, getattr(x, to), plus=U, coef=one["newton_schulz"])

    return step


_ORTHONORMAL = [_orthonormal, _gram("U"), _newton_schulz("U", "B"), _gram("B"), _newton_schulz("B", "U")]


def _multiply_by_W_transposed(program, x, one):
    _multiply(program, x, x.W.mT, x.U, x.Z)


def _gram_matrices(program, x, one):
    _multiply(program, x, x.U.mT, x.U, x.C, wide=True)
    _multiply(program, x, x.Z.mT, x.Z, x.H, wide=True)
    _multiply(program, x, x.W, x.omega, x.Y, wide=True)


def _in_basis(program, x, one):
    _multiply(program, x, x.U.mT, x.Y, x.UY, wide=True)


def _probe_residuals(program, x, one):
    _multiply(program, x, x.Z.mT, x.omega, x.lost, plus=x.UY, coef=one["minus_plus"], wide=True)
    _multiply(program, x, x.U, x.UY, x.first, plus=x.Y, coef=x.coefficient["project"], wide=True)


def _triplets(program, x, one):
    _multiply(program, x, x.Z, x.Qv, x.V)
    _multiply(program, x, x.Z, x.Qf, x.right)
    _multiply(program, x, x.U, x.Qs, x.Us)
    _multiply(program, x, x.Qv, x.scaled, x.T1, wide=True)
    _multiply(program, x, x.Qs, x.scaled, x.T2, wide=True)
    _multiply(program, x, x.Qv, x.inside, x.T3, wide=True)


def _triplet_probes(program, x, one):
    _multiply(program, x, x.U, x.T2, x.Ui, wide=True)
    _multiply(program, x, x.Z, x.T3, x.Vi, wide=True)
    _multiply(program, x, x.H, x.T1, x.HT, wide=True)
    _multiply(program, x, x.C, x.T2, x.CT, wide=True)
    _multiply(program, x, x.Qs.mT, x.lost, x.left, wide=True)


def _residuals(program, x, one):
    less = {"coef": one["plus_minus"], "wide": True}
    _multiply(program, x, x.Qv.mT, x.HT, x.skew_V, plus=x.scaled, **less)
    _multiply(program, x, x.Qs.mT, x.CT, x.skew_U, plus=x.scaled, **less)
    _multiply(program, x, x.W, x.Vi, x.F, plus=x.Ui, **less)


_CHECKS = [_triplets, _triplet_probes, _residuals]


def _power(j: int, x: SimpleNamespace) -> Tensor:
    """j-th power of R applied to the probes, ``[m or n, PROBES]``; the first is in fp64."""
    if j == 1:
        return x.first
    at = sum(x.n if i % 2 == 0 else x.m for i in range(2, j))
    return x.powers[at : at + (x.n if j % 2 == 0 else x.m)]


def _even_power(j: int):
    def step(program, x, one):
        _multiply(program, x, x.W.mT, _power(j - 1, x), _power(j, x), coef=x.coefficient["power"], wide=j == 2)

    return step


def _odd_power(j: int):
    def step(program, x, one):
        _multiply(program, x, x.W, _power(j - 1, x), x.ahead, coef=x.coefficient["power"])

    return step


def _in_U(program, x, one):
    _multiply(program, x, x.U.mT, x.ahead, x.short)


def _power_without_U(j: int):
    def step(program, x, one):
        _multiply(program, x, x.U, x.short, _power(j, x), plus=x.ahead, coef=one["minus_plus"])

    return step


_POWERS = [
    step
    for j in range(2, POWERS + 1)
    for step in ([_even_power(j)] if j % 2 == 0 else [_odd_power(j), _in_U, _power_without_U(j)])
]
