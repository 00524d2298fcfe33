"""Parametrized weights (``torch.nn.utils.parametrize``): written through ``right_inverse``, the round trip verified."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["assign", "copied_state", "why_not_writable"]

ROUNDINGS = 4  # error of the round trip allowed for rounding, in eps(dtype) ||weight||_F
# Error allowed besides, relative to the change of the weight: the proximal operator keeps a symmetry that the
# parametrization imposes (W = W^T, say) only up to its own tolerance.
SYMMETRY_TOL = 1e-2


def copied_state(parametrizations: ParametrizationList) -> dict[str, Tensor]:
    """Copy of the originals and buffers that the weight is computed from, for ``load_state_dict``."""
    return {name: tensor.clone() for name, tensor in parametrizations.state_dict().items()}


@torch.no_grad()
def assign(parametrizations: ParametrizationList, weight: Tensor, symmetry_tol: float = SYMMETRY_TOL) -> None:
    """Write the weight, in place, through the parametrization's ``right_inverse``, and verify the round trip.

    Verified is ``||p(q(W)) - W||_F <= 4 eps ||W||_F + symmetry_tol ||W - W_old||_F`` with p the parametrization and q
    its right inverse.

    Args:
        weight: of the shape and dtype of the parametrized weight.
        symmetry_tol: relative to the change of the weight.

    Raises:
        ValueError: no or a failing ``right_inverse``, or the round trip gives another weight. The originals may have
            been written: restore :func:`copied_state`.
    """
    originals = list(parametrizations.parameters(recurse=False))
    try:
        old, values = parametrizations(), weight
        for parametrization in reversed(parametrizations):
            values = parametrization.right_inverse(*values if isinstance(values, (tuple, list)) else (values,))
        values = values if isinstance(values, (tuple, list)) else (values,)
        if isinstance(parametrizations[0], _WeightNorm):  # a row of norm 0 has no direction: it keeps its old one
            values = values[0], torch.where(values[0] == 0, originals[1], values[1])
        for original, value in zip(originals, values, strict=True):
            original.copy_(value)
        lost, size, change = map(torch.linalg.vector_norm, (parametrizations() - weight, weight, weight - old))
        if not lost <= ROUNDINGS * torch.finfo(weight.dtype).eps * size + symmetry_tol * change:
            raise ValueError("another weight comes out of it")
    except Exception as error:  # the user's code may raise anything
        kinds = ", ".join(type(p).__name__ for p in parametrizations)
        raise ValueError(f"its parametrization ({kinds}) cannot hold a shrunk weight: {error}") from error


@torch.no_grad()
def why_not_writable(parametrizations: ParametrizationList) -> str | None:
    """Why a shrunk weight cannot be written through the parametrization, or None; found by trying it on a copy."""
    trial = copy.deepcopy(parametrizations)
    try:
        assign(trial, trial() / 2, symmetry_tol=0.0)
    except ValueError as error:
        return str(error)
    return None
