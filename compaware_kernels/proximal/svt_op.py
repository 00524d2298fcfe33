"""Custom ops ``compaware::svt_`` and ``firm_svt_``: the proximal step of a list of matrices, for torch.compile.

Both return the singular values of the results and the error bounds of all matrices, each concatenated to one axis,
fp64, on the device of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import backends
from . import inplace
from .svt_info import SvtInfo

__all__ = ["SOLVER", "firm_svt_", "svt_"]

SOLVER = backends.Backend("solver", ops=("small_svd", "gram_eigh", "wide_product", "sum_of_squares", "subspace_step"))
for _op in backends.SPECTRAL_OPS:
    for _rows in backends.TABLE[_op].values():
        _rows.append(SOLVER)


@torch.library.custom_op("compaware::svt_", mutates_args={"weights"})
def svt_(weights: Sequence[Tensor], tau: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """SVT of matrices ``[..., m, n]``, in place, tau fp64 ``[L]``; returns singular values and error bounds."""
    return _concatenated(inplace.svt_(weights, tau, tol=tol, fold=None), weights[0] if weights else tau)


@torch.library.custom_op("compaware::firm_svt_", mutates_args={"weights"})
def firm_svt_(weights: Sequence[Tensor], tau: Tensor, gamma: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Firm SVT of matrices ``[..., m, n]``, in place, tau and gamma fp64 ``[L]``; returns as :func:`svt_`."""
    return _concatenated(inplace.firm_svt_(weights, tau, gamma, tol=tol, fold=None), weights[0] if weights else tau)


def _concatenated(infos: Sequence[SvtInfo], like: Tensor) -> tuple[Tensor, Tensor]:
    empty = like.new_empty(0, dtype=torch.float64)
    found = ([getattr(info, what).flatten().to(like.device) for info in infos] for what in ("s", "error_bound"))
    return tuple(torch.cat([empty, *parts]) for parts in found)


@svt_.register_fake
def _(weights, tau, tol):
    batches = [W.shape[:-2].numel() for W in weights]
    spectra = sum(count * min(W.shape[-2:]) for W, count in zip(weights, batches, strict=True))
    like = weights[0] if weights else tau
    return like.new_empty(spectra, dtype=torch.float64), like.new_empty(sum(batches), dtype=torch.float64)


@firm_svt_.register_fake
def _(weights, tau, gamma, tol):
    return svt_._abstract_fn(weights, tau, tol)
