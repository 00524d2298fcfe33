"""Parametrized weights (``torch.nn.utils.parametrize``): written through ``right_inverse``, the round trip verified."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

LOSS = 4  # roundings of its dtype that a weight may lose on its way through
NEAR = 1e-2  # of what shrinking changes: within its tolerance it may miss a symmetry that is imposed


def state(chain: ParametrizationList) -> dict[str, Tensor]:
    """A copy of all that the weight is computed from, for ``load_state_dict``."""
    return {name: tensor.clone() for name, tensor in chain.state_dict().items()}


@torch.no_grad()
def assign(chain: ParametrizationList, weight: Tensor, near: float = NEAR) -> None:
    """Give the originals, in place, values from which ``weight`` comes out.

    Raises:
        ValueError: the parametrization has no such values, or cannot find them; :func:`state` undoes what it has done.
    """
    targets = list(chain.parameters(recurse=False))
    try:
        old, values = chain(), weight
        for parametrization in reversed(chain):
            values = parametrization.right_inverse(*values if isinstance(values, (tuple, list)) else (values,))
        values = values if isinstance(values, (tuple, list)) else (values,)
        if isinstance(chain[0], _WeightNorm):  # a row of length 0 has no direction: it keeps its old one
            values = values[0], torch.where(values[0] == 0, targets[1], values[1])
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
        lost, size, change = map(torch.linalg.vector_norm, (chain() - weight, weight, weight - old))
        if not lost <= LOSS * torch.finfo(weight.dtype).eps * size + near * change:
            raise ValueError("another weight comes out of it")
    except Exception as error:  # the user's code may raise anything
        kinds = ", ".join(type(p).__name__ for p in chain)
        raise ValueError(f"its parametrization ({kinds}) cannot hold a shrunk weight: {error}") from error


@torch.no_grad()
def why_not(chain: ParametrizationList) -> str | None:
    """Why a shrunk weight cannot be written through the parametrization, or None; found by trying, on a copy."""
    trial = copy.deepcopy(chain)
    try:
        assign(trial, trial() / 2, near=0.0)
    except ValueError as error:
        return str(error)
    return None
