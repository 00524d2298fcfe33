"""``compaware::svt_``: the proximal step of a list of matrices as one op, which a compiler can put in its graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import backends
from .functional import svt_ as functional_svt_

for _backends in backends.TABLE["svt_"].values():
    _backends.append(backends.Backend("solver", ops=("small_svd", "wide_product")))


@torch.library.custom_op("compaware::svt_", mutates_args={"weights"})
def svt_(weights: Sequence[Tensor], tau: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Returns the shrunk singular values and the error bounds of all matrices, concatenated, fp64, on their device."""
    infos, like = functional_svt_(weights, tau, tol=tol, fold=None), weights[0] if weights else tau
    empty = like.new_empty(0, dtype=torch.float64)
    found = ([getattr(info, what).flatten().to(like.device) for info in infos] for what in ("s", "error_bound"))
    return tuple(torch.cat([empty, *parts]) for parts in found)


@svt_.register_fake
def _(weights, tau, tol):
    batches = [W.shape[:-2].numel() for W in weights]
    spectra = sum(count * min(W.shape[-2:]) for W, count in zip(weights, batches, strict=True))
    like = weights[0] if weights else tau
    return like.new_empty(spectra, dtype=torch.float64), like.new_empty(sum(batches), dtype=torch.float64)
