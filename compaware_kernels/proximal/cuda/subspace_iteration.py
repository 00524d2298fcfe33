"""Singular values above tau from a subspace, as four programs of matrix products: the warm route of the GPU.

V ``[n, k]`` are the right singular vectors of the last call, roughly, and k is a little more than their number. A step
of subspace iteration and a half of one,

    ``U = orth(W V)``,  ``Z = W^T U``,  ``U = orth(W Z)``,  ``Z = W^T U``,  ``Z^T Z = Q diag(mu^2) Q^T``,

gives ``W = U Z^T + R`` with ``U^T R = 0``: the triplets (U Q, mu, Z Q / mu) are exact ones of ``U Z^T``. The wanted are
exact ones of ``W - F V_s^T``, ``F = W V_s - U_s diag(mu_s)``, of which the rest has no singular value above
``(mu_j^2 + ||R||^2)^(1/2)``, with j the first that is left out. So, as the prox is non-expansive,

    ``||U_s max(mu_s - tau, 0) V_s^T - prox(W)||_F <= ||F||_F + || max(rest - tau, 0) ||_F``

and what rounding adds: ``W^T U_s - V_s mu_s``, and what U_s and V_s lack of being orthonormal. All four are measured by
32 Gaussian vectors in fp64; ``||R||`` by powers ``R, R^T R, ...`` of the same vectors (see
:mod:`compaware_kernels.proximal.error_bounds`). U is made orthonormal by a Cholesky factor in fp64 and two steps of
Newton-Schulz, ``U (3 I - U^T U) / 2``: matrix products, which double its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .device_structs import POWERS, PROBES
from .matmul_program import Program


def allocate(layer: SimpleNamespace, new) -> None:
    """The workspace of one layer; ``new(*shape, dtype)`` makes a tensor."""
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
    """Before ck_orth, twice, before ck_ritz and before ck_judge; ``one``: coefficients that are the same for all."""
    found = []
    for steps in (
        [_ahead("V"), _inner],
        [*_ORTHONORMAL, _back, _ahead("Z"), _inner],
        [*_ORTHONORMAL, _back, _squares, _in_basis, _lost],
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


def _ahead(of: str):
    def step(program, x, one):
        _multiply(program, x, x.W, getattr(x, of), x.B)

    return step


def _inner(program, x, one):
    _multiply(program, x, x.B.mT, x.B, x.G, wide=True)


def _orthonormal(program, x, one):
    _multiply(program, x, x.B, x.S, x.U)


def _lengths(of: str):
    def step(program, x, one):
        U = getattr(x, of)
        _multiply(program, x, U.mT, U, x.E)

    return step


def _polish(of: str, to: str):
    def step(program, x, one):
        U = getattr(x, of)
        _multiply(program, x, U, x.E, getattr(x, to), plus=U, coef=one["newton_schulz"])

    return step


_ORTHONORMAL = [_orthonormal, _lengths("U"), _polish("U", "B"), _lengths("B"), _polish("B", "U")]


def _back(program, x, one):
    _multiply(program, x, x.W.mT, x.U, x.Z)


def _squares(program, x, one):
    _multiply(program, x, x.U.mT, x.U, x.C, wide=True)
    _multiply(program, x, x.Z.mT, x.Z, x.H, wide=True)
    _multiply(program, x, x.W, x.omega, x.Y, wide=True)


def _in_basis(program, x, one):
    _multiply(program, x, x.U.mT, x.Y, x.UY, wide=True)


def _lost(program, x, one):
    _multiply(program, x, x.Z.mT, x.omega, x.lost, plus=x.UY, coef=one["minus_plus"], wide=True)
    _multiply(program, x, x.U, x.UY, x.first, plus=x.Y, coef=x.coefficient["project"], wide=True)


def _triplets(program, x, one):
    _multiply(program, x, x.Z, x.Qv, x.V)
    _multiply(program, x, x.Z, x.Qf, x.right)
    _multiply(program, x, x.U, x.Qs, x.Us)
    _multiply(program, x, x.Qv, x.scaled, x.T1, wide=True)
    _multiply(program, x, x.Qs, x.scaled, x.T2, wide=True)
    _multiply(program, x, x.Qv, x.inside, x.T3, wide=True)


def _of_triplets(program, x, one):
    _multiply(program, x, x.U, x.T2, x.Ui, wide=True)
    _multiply(program, x, x.Z, x.T3, x.Vi, wide=True)
    _multiply(program, x, x.H, x.T1, x.HT, wide=True)
    _multiply(program, x, x.C, x.T2, x.CT, wide=True)
    _multiply(program, x, x.Qs.mT, x.lost, x.left, wide=True)


def _lacks(program, x, one):
    less = {"coef": one["plus_minus"], "wide": True}
    _multiply(program, x, x.Qv.mT, x.HT, x.skew_V, plus=x.scaled, **less)
    _multiply(program, x, x.Qs.mT, x.CT, x.skew_U, plus=x.scaled, **less)
    _multiply(program, x, x.W, x.Vi, x.F, plus=x.Ui, **less)


_CHECKS = [_triplets, _of_triplets, _lacks]


def _power(j: int, x: SimpleNamespace) -> Tensor:
    """The j-th power of the rest, on the probes; it begins with the first, which is in fp64."""
    if j == 1:
        return x.first
    at = sum(x.n if i % 2 == 0 else x.m for i in range(2, j))
    return x.powers[at : at + (x.n if j % 2 == 0 else x.m)]


def _power_back(j: int):
    def step(program, x, one):
        _multiply(program, x, x.W.mT, _power(j - 1, x), _power(j, x), coef=x.coefficient["power"], wide=j == 2)

    return step


def _power_ahead(j: int):
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
    for step in ([_power_back(j)] if j % 2 == 0 else [_power_ahead(j), _in_U, _power_without_U(j)])
]
