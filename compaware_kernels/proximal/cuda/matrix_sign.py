"""Dense GPU route: W - prox(W) of W ``[m, n]``, m >= n, of any rank, by the matrix sign function; products only.

With ``X = W^T W / tau^2`` and ``M = max(X, I)`` (of the eigenvalues)

    ``W - prox(W) = W M^(-1/2)``,  ``M = (X + I + (X - I) S) / 2``,  ``S = sign(X - I)``.

S comes from ``(X - I) / beta`` and ``M^(-1/2)`` from ``M / (beta + 1)`` by the polynomials of :mod:`.polar_express`:
``S <- a S + b S^3 + c S^5``; ``Z <- Z q``, ``R <- R q^2`` with ``q = a I + b R + c R^2``, where Z tends to the inverse
root of the first R. beta is ``||W||_F^2 / tau^2 + 1``; steps needed only for a larger beta are skipped, in pairs.

All in fp64. The rounding error of X is about ``2^-53 beta``, and W M^(-1/2) changes by at most tau times that: the
products meet a tolerance of 1e-3 for ``||W||_F`` up to 1e6 tau. M >= I, so its inverse root is stable. An eigenvalue x
of X for which S has the eigenvalue s instead of +-1 gives ``m = max(x, 1) - |x - 1| (1 - |s|) / 2``; an eigenvalue y of
Y with ``y^2 m = 1 - e`` has an error of at most ``e m^(-1/2)``. So the Frobenius error of the result is at most

    ``tau (||(X - I)(I - S^2)|| / 4 + ||I - Y M Y||)``,

as ``sqrt(x) |d m^(-1/2)| <= |dm| / 2`` for m >= max(x, 1) - and ``1 - |s| <= 1 - s^2``. Both norms are measured with
the Gaussian probes omega. Near x = 1, S need not have converged: there ``x - 1`` is small.

Firm thresholding subtracts ``gamma / (gamma - 1)`` times this, less ``1 / (gamma - 1)`` times the same for the
threshold ``gamma tau``: a second pass, whose error has the same weight as that of the first. Clipping X at gamma^2
would save an inverse root, but multiply the error of that sign by ``sigma / tau``; here no error grows with sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .device_structs import PAIRS, PROBES, ROOT_PAIRS
from .matmul_program import Program

__all__ = ["SQUARES", "allocate", "assign", "list_products", "slot_bytes"]

SQUARES = 9  # work matrices [n, n] per slot; one more for two passes


def slot_bytes(layer: SimpleNamespace) -> int:
    """Bytes of workspace of one layer: its slot, shared with other layers that run at other times."""
    return 8 * _squares(layer) * layer.n**2 + layer.m * layer.n * layer.W.element_size()


def _squares(layer: SimpleNamespace) -> int:
    return SQUARES + layer.passes - 1


def allocate(layer: SimpleNamespace, new) -> None:
    """Allocate the tensors of a layer that outlive its slot; ``new(*shape, dtype)`` makes a tensor."""
    for name in ("middle", "other"):
        setattr(layer, name, new(PROBES, layer.n, dtype=torch.float64))
    for name in ("sign_check", "root_check"):
        setattr(layer, name, new(layer.passes * PROBES, layer.n, dtype=torch.float64))
    layer.diagonal = new(layer.n, dtype=torch.float64)


def assign(layers: Sequence[SimpleNamespace], limit: int) -> list[list[SimpleNamespace]]:
    """Partition the layers into slots, each run in sequence; slots fit in ``limit`` bytes, but at least one exists."""
    slots: list[list[SimpleNamespace]] = []
    used = 0
    for layer in sorted(layers, key=slot_bytes, reverse=True):
        used += slot_bytes(layer)
        if not slots or used <= limit:
            slots.append([layer])
        else:
            min(slots, key=lambda slot: sum(other.n**3 for other in slot)).append(layer)
    return slots


def list_products(program: Program, slots: Sequence[Sequence[SimpleNamespace]], new, one: dict[str, Tensor]) -> None:
    """Append the products of all layers: slots run concurrently, the layers of a slot in sequence on one counter."""
    space = [new(max(map(slot_bytes, slot)) // 8 + 1, dtype=torch.float64) for slot in slots]
    for turn in range(max(map(len, slots), default=0)):
        turns = [_LayerProducts(program, slot[0].number, slot[turn], flat, one)
                 for slot, flat in zip(slots, space, strict=True) if turn < len(slot)]  # fmt: skip
        passes = max(each.layer.passes for each in turns)
        for number in range(passes):
            for each in turns:
                each.begin(number)
            for step in _steps(one, number, passes):
                for each in turns:
                    step(each)
                program.stage()


class _LayerProducts:
    """The products of one layer and its workspace, a slot viewed as matrices ``[n, n]``."""

    def __init__(self, program: Program, counter: int, layer: SimpleNamespace, flat: Tensor, one: dict[str, Tensor]):
        n, self.program, self.counter, self.layer, self.one = layer.n, program, counter, layer, one
        squares = [flat[i * n * n : (i + 1) * n * n].view(n, n) for i in range(_squares(layer))]
        self.X, self.S, self.S2, self.A, self.T, self.R2, self.Z, self.Z2, self.q, *self.kept = squares
        rest = flat[len(squares) * n * n :].view(layer.W.dtype)[: layer.W.numel()]
        self.copy = rest.as_strided(layer.W.shape, layer.W.stride())
        self.XS, self.M, self.R = self.S2, self.A, self.T  # reused after the sign iteration

    def begin(self, number: int) -> None:
        """Select the coefficients, gates and checks of a pass: one per threshold."""
        layer = self.layer
        self.coefficient = layer.all_coefficients[number]
        self.sign_pairs, self.root_pairs = layer.all_sign_pairs[number], layer.all_root_pairs[number]
        self.sign_check, self.root_check = (x.split(PROBES)[number] for x in (layer.sign_check, layer.root_check))

    def multiply(self, A: Tensor, B: Tensor, C: Tensor, gate: Tensor | None = None, **options) -> None:
        """Append C = A B in fp64, gated by the dense route unless another gate is given."""
        gate = self.layer.gate["dense"] if gate is None else gate
        self.program.multiply(self.counter, A, B, C, gate=gate, wide=True, **options)

    def set(self, C: Tensor, plus: Tensor | None, coef: Tensor) -> None:
        """Append C = beta plus + gamma I, as a product with K = 0."""
        flat = C.new_empty(0, dtype=torch.float64)
        self.multiply(flat.view(C.shape[0], 0), flat.view(0, C.shape[1]), C, plus=plus, coef=coef)


def _steps(one: dict[str, Tensor], number: int, passes: int):
    """The stages of one pass: sign iteration, inverse root iteration, result and error check."""
    yield _begin
    yield lambda x: x.set(x.S, x.X, x.coefficient["scale_sign"])
    for t in range(2 * PAIRS):
        yield from _sign_step(t, one)
    yield _after_sign if number == 0 else _after_second_sign
    yield _begin_root
    for t in range(2 * ROOT_PAIRS):
        yield from _root_step(t, one)
    if passes == 1:
        yield from (_write, _check_root, _last)
    elif number == 0:
        yield from (_keep, _check_root, _last)
    else:
        yield from (_identity, _keep_both, _write_both)


def _begin(x: _LayerProducts) -> None:
    x.multiply(x.layer.W.mT, x.layer.W, x.X, coef=x.coefficient["gram"])
    x.set(x.copy, x.layer.W, x.one["same"])


def _sign_step(t: int, one: dict[str, Tensor]):
    def options(x):
        return {"gate": x.sign_pairs[t // 2]}

    def ends(x):
        return (x.S, x.S2) if t % 2 == 0 else (x.S2, x.S)

    yield lambda x: x.multiply(ends(x)[0], ends(x)[0], x.A, **options(x))
    yield lambda x: x.multiply(x.A, x.A, x.T, plus=x.A, coef=one["sign"][t, 0], **options(x))
    yield lambda x: x.multiply(ends(x)[0], x.T, ends(x)[1], plus=ends(x)[0], coef=one["sign"][t, 1], **options(x))


def _after_second_sign(x: _LayerProducts) -> None:
    x.multiply(x.X, x.S, x.M, plus=x.X, coef=x.one["middle"])
    x.multiply(x.X, x.S, x.XS)
    x.multiply(x.layer.omega.mT, x.S, x.layer.middle)
    x.multiply(x.layer.omega.mT, x.X, x.layer.other)


def _after_sign(x: _LayerProducts) -> None:
    layer = x.layer
    _after_second_sign(x)
    x.set(layer.diagonal[:, None], x.S.diagonal()[:, None], x.one["same"])
    if layer.k:
        restart = {"gate": layer.gate["restart"], "plus": layer.restart.mT, "coef": x.one["restart"]}
        x.multiply(layer.restart.mT, x.S, layer.V.mT, **restart)


def _begin_root(x: _LayerProducts) -> None:
    x.set(x.R, x.M, x.coefficient["scale_root"])
    x.set(x.Z, None, x.one["identity"])
    check = {"plus": x.layer.other, "coef": x.one["sign_check"]}
    x.multiply(x.layer.middle, x.XS, x.sign_check, **check)


def _root_step(t: int, one: dict[str, Tensor]):
    def ends(x):
        return (x.R, x.Z, x.R2, x.Z2) if t % 2 == 0 else (x.R2, x.Z2, x.R, x.Z)

    def options(x):
        return {"gate": x.root_pairs[t // 2]}

    def both(x):
        R, Z, _, Z2 = ends(x)
        x.multiply(R, x.q, x.S2, **options(x))
        x.multiply(Z, x.q, Z2, **options(x))

    yield lambda x: x.multiply(ends(x)[0], ends(x)[0], x.q, plus=ends(x)[0], coef=one["root"][t], **options(x))
    yield both
    yield lambda x: x.multiply(x.S2, x.q, ends(x)[2], **options(x))


def _write(x: _LayerProducts) -> None:
    x.multiply(x.copy, x.Z, x.layer.W, plus=x.copy, coef=x.coefficient["correction"])
    x.multiply(x.layer.omega.mT, x.Z, x.layer.middle)


def _check_root(x: _LayerProducts) -> None:
    x.multiply(x.layer.middle, x.M, x.layer.other)


def _last(x: _LayerProducts) -> None:
    check = {"plus": x.layer.omega.mT, "coef": x.coefficient["root_check"]}
    x.multiply(x.layer.other, x.Z, x.root_check, **check)


def _keep(x: _LayerProducts) -> None:
    x.set(*x.kept, x.Z, x.coefficient["keep"])
    x.multiply(x.layer.omega.mT, x.Z, x.layer.middle)


def _identity(x: _LayerProducts) -> None:
    x.set(x.q, None, x.one["identity"])
    x.multiply(x.layer.omega.mT, x.Z, x.layer.middle)


def _keep_both(x: _LayerProducts) -> None:
    x.multiply(x.Z, x.q, *x.kept, plus=x.kept[0], coef=x.coefficient["keep"])
    _check_root(x)


def _write_both(x: _LayerProducts) -> None:
    x.multiply(x.copy, *x.kept, x.layer.W, plus=x.copy, coef=x.one["minus_plus"])
    _last(x)
