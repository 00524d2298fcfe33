"""Activation-aware low-rank factorization: truncated SVD weighted by the second moment of each layer's inputs.

With ``x`` the columns that a layer's folded matrix M multiplies, the rank-r matrix with the least output error,

    ``argmin E ||(M - M_r) x||^2 = trunc_r(M C^(1/2)) C^(-1/2)``,  ``C = E[x x^T]``

has factors of the same shapes as the best approximation of the weight alone (C = I). A few inputs leave C singular, so
it is regularized with a hundredth of its mean eigenvalue on the diagonal (ridge). Needs inputs, no labels.

Source: Yu & Wu, Compressing Transformers, AAAI 2023 (AFM); Wang et al., SVD-LLM, ICLR 2025 (section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.eval_mode import eval_mode
from ..folds import CONVS, row_axes
from ..nn.factorization import SVD, singular_values

__all__ = ["Calibration", "WeightedSVD", "second_moment"]

RIDGE = 1e-2
WANTED = "inputs of the model, [(x,), ...]"
FORWARDS = {kind.forward for kind in (nn.Linear, *CONVS)}  # a subclass with its own forward may pad differently


class WeightedSVD(NamedTuple):
    """Thin SVD ``M C^(1/2) = U diag(s) Vh`` of a folded weight ``M`` ``[G, m, n]``, k = min(m, n), in fp64."""

    U: Tensor  # [G, m, k]
    s: Tensor  # [G, k], descending
    Vh: Tensor  # [G, k, n]
    inverse: Tensor  # C^(-1/2) [G, n, n]

    def nearest(self, rank: int) -> Tensor:
        """Rank-r matrix ``[G, m, n]`` nearest to M on the inputs, in fp64: ``trunc_r(M C^(1/2)) C^(-1/2)``."""
        return (self.U[..., :rank] * self.s[..., None, :rank]) @ (self.Vh[..., :rank, :] @ self.inverse)

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Balanced factors ``U`` ``[G, m, r]`` and ``V`` ``[G, r, n]`` of :meth:`nearest`, rounded to ``dtype``."""
        return SVD.of(self.nearest(rank).to(dtype)).factors(rank, dtype)


class Calibration:
    """Second moments ``C = E[x x^T]`` ``[G, n, n]`` (up to a factor) of the inputs of a model's layers, per fold.

    Args:
        model: run in eval mode.
        names: layers to calibrate; a layer whose forward is not that of Linear or a convolution gets C = I.
        batches: positional inputs of the model, ``[(x,), ...]``.
        folds: folds whose column moments :meth:`spectrum` and :meth:`svd` will need.

    Raises:
        ValueError: no batch; NaN or Inf in a layer's input.  TypeError: a batch is not a tuple.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Iterable[tuple], folds: Sequence[str]):
        self._moments: dict[tuple[str, str], Tensor] = {}
        modules = {name: model.get_submodule(name) for name in names}
        hooks = [
            module.register_forward_pre_hook(partial(self._accumulate, name), with_kwargs=True)
            for name, module in modules.items()
            if type(module).forward in FORWARDS
        ]  # fmt: skip
        self._folds, count = folds, 0
        try:
            with eval_mode(model), torch.no_grad():
                for count, batch in enumerate(batches, 1):  # noqa: B007
                    if not isinstance(batch, Sequence):
                        raise TypeError(f"calibration: wanted {WANTED}; got one of {type(batch).__name__}")
                    model(*batch)
        finally:
            for hook in hooks:
                hook.remove()
        if not count:
            raise ValueError(f"calibration: wanted {WANTED}; got none")
        for (name, _), moment in self._moments.items():
            if not moment.isfinite().all():
                raise ValueError(f"calibration: {name} reads NaN or Inf")

    def _accumulate(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        for fold in self._folds:
            moment = second_moment(module, x.detach(), fold)
            key = (name, fold)
            self._moments[key] = self._moments[key] + moment if key in self._moments else moment

    def spectrum(self, name: str, fold: str, M: Tensor) -> Tensor:
        """Singular values ``[G, k]`` of ``M C^(1/2)``, the spectrum that rank rules see.  M: ``[G, m, n]``."""
        return singular_values(M if (roots := self._roots(name, fold)) is None else M.detach().double() @ roots[0])

    def svd(self, name: str, fold: str, M: Tensor) -> SVD | WeightedSVD:
        """SVD of ``M C^(1/2)``, or of M itself for a layer without moments.  M: ``[G, m, n]``."""
        if (roots := self._roots(name, fold)) is None:
            return SVD.of(M)
        root, inverse = roots
        return WeightedSVD(*SVD.of(M.detach().double() @ root), inverse)

    def _roots(self, name: str, fold: str) -> tuple[Tensor, Tensor] | None:
        """``C^(1/2)`` and ``C^(-1/2)`` ``[G, n, n]``, up to a factor; None for a layer without moments."""
        if (C := self._moments.get((name, fold))) is None:
            return None
        values, Q = torch.linalg.eigh(C)
        mean = values.clamp_min(0).mean(-1, keepdim=True)
        root = (values.clamp_min(0) + torch.where(mean > 0, RIDGE * mean, 1.0)).sqrt()
        return Q * root[..., None, :] @ Q.mT, Q / root[..., None, :] @ Q.mT


def second_moment(module: nn.Module, x: Tensor, fold: str) -> Tensor:
    """Second moment ``sum x x^T`` ``[G, n, n]``, fp64, over all columns of the unfolded (im2col) input ``x``.

    Only kernel axes that the fold puts into columns are unfolded; along the others every pixel counts, unpadded.
    """
    if isinstance(module, nn.Linear):
        X = x.reshape(1, -1, x.shape[-1])
        return _gram(X)
    axes = x.ndim - 2 if x.ndim > len(module.kernel_size) + 1 else x.ndim - 1
    x = x if x.ndim == axes + 2 else x[None]
    k = row_axes(fold, axes)
    pads = list(module._reversed_padding_repeated_twice)  # the last axis first
    pads[2 * (axes - k) :] = [0] * (2 * k)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return sum(_gram(_columns(part, module, k)) for part in F.pad(x, pads, mode=mode).split(1))


def _columns(x: Tensor, module: nn.Module, k: int) -> Tensor:
    """im2col along kernel axes k and up: ``[1, C, *S]`` -> ``[G, positions, C/G prod(K[k:])]``."""
    for axis in range(k, len(module.kernel_size)):
        span = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        x = x.unfold(2 + axis, span, module.stride[axis])[..., :: module.dilation[axis]]
    kernel = tuple(range(2 + len(module.kernel_size), x.ndim))
    x = x.permute(1, *kernel, 0, *range(2, 2 + len(module.kernel_size)))  # [C, *K[k:], 1, *positions]
    return x.reshape(module.groups, x.shape[0] // module.groups * x.shape[1 : 1 + len(kernel)].numel(), -1).mT


def _gram(X: Tensor) -> Tensor:
    """Gram matrix ``X^T X`` ``[G, n, n]`` of ``[G, positions, n]``, in fp64."""
    X = X.double()
    return X.mT @ X
