"""Weights that are computed from others (``torch.nn.utils.parametrize``): what is written must come out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm


def is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight")


def originals(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that the weight is computed from."""
    return list(module.parametrizations["weight"].parameters(recurse=False))


@torch.no_grad()
def assign(module: nn.Module, weight: Tensor) -> None:
    """Give the originals, in place, values from which ``weight`` comes out.

    Raises:
        ValueError: the parametrization has no such values, or cannot find them; the originals are as they were.
    """
    parametrizations, targets = module.parametrizations["weight"], originals(module)
    before = [p.detach().clone() for p in targets]
    values = weight
    try:
        for parametrization in reversed(parametrizations):
            values = parametrization.right_inverse(*values if isinstance(values, (tuple, list)) else (values,))
        values = values if isinstance(values, (tuple, list)) else (values,)
        if isinstance(parametrizations[0], _WeightNorm):  # a row of length 0 has no direction: it keeps its old one
            values = values[0], torch.where(values[0] == 0, before[1], values[1])
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
        if not torch.allclose(module.weight, weight, rtol=0, atol=_rounding(weight)):
            raise ValueError("other weights come out of it")
    except Exception as error:  # the user's code: whatever it raises, nothing may stay half-changed
        for target, old in zip(targets, before, strict=True):
            target.copy_(old)
        kinds = ", ".join(type(p).__name__ for p in parametrizations)
        raise ValueError(f"its parametrization ({kinds}) cannot hold a shrunk weight: {error}") from error


def why_not(module: nn.Module) -> str | None:
    """Why a shrunk weight cannot be written through the parametrization, or None; found by trying, and undone."""
    before = [p.detach().clone() for p in originals(module)]
    try:
        assign(module, module.weight.detach() / 2)
    except ValueError as error:
        return str(error)
    with torch.no_grad():
        for target, old in zip(originals(module), before, strict=True):
            target.copy_(old)
    return None


def _rounding(weight: Tensor) -> float:
    """Four times what storing the largest element may lose."""
    return 4 * torch.finfo(weight.dtype).eps * float(weight.abs().max()) if weight.numel() else 0.0
