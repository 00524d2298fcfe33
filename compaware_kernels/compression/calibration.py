"""Activation-aware low-rank factorization: truncated SVD weighted by the second moment of each layer's inputs.

With ``x`` the columns that a layer's folded matrix M multiplies, the rank-r matrix with the least output error,

    ``argmin E ||(M - M_r) x||^2 = U_r U_r^T M,   M C M^T = U diag(s^2) U^T,   C = E[x x^T]``

has factors of the same shapes as the best approximation of the weight alone (C = I). A few inputs leave C singular, so
it is regularized with a hundredth of its mean eigenvalue on the diagonal (ridge). Needs inputs, no labels.

Only the shorter side is decomposed: of ``M = L Q`` with orthonormal rows Q (LQ decomposition) the outputs depend on
``Q x`` only, so ``K = Q C Q^T`` ``[k, k]``, k = min(m, n), is all that is kept of C. With the Cholesky factor
``K = R R^T``, s and U are those of ``L R``, to eps of the largest s; eigenvalues of M C M^T would lose half the digits.

Source: Yu & Wu, Compressing Transformers, AAAI 2023 (AFM); Wang et al., SVD-LLM, ICLR 2025 (section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.eval_mode import layer_by_layer
from .._utils.progress import tracked
from ..folds import CONVS, row_axes
from ..nn.discovery import Layer
from ..nn.factorization import SVD, singular_values
from ..nn.truncation import Truncation
from ..ranks import Rule
from .arguments import Inputs

__all__ = ["Calibration", "WeightedSVD", "columns"]

RIDGE = 1e-2
TINY = 1e-280  # mean squares below it are no information: their own rounding is as large
ROWS = 4096  # inputs of a Linear that are converted to fp64 at once
WANTED = "inputs of the model, [(x,), ...]"
FORWARDS = {kind.forward for kind in (nn.Linear, *CONVS)}  # a subclass with its own forward may pad differently


class WeightedSVD(NamedTuple):
    """Energies ``M C M^T = U diag(s^2) U^T`` of the outputs of a folded weight M, k = min(m, n), in fp64."""

    U: Tensor  # [G, m, k]
    s: Tensor  # [G, k], descending: singular values of M C^(1/2)
    M: Tensor  # [G, m, n]

    def rank(self, rule: Rule) -> int:
        """The rank that the rule gives for the singular values."""
        return rule(self.s)

    def nearest(self, rank: int) -> Tensor:
        """Rank-r matrix ``[G, m, n]`` nearest to M on the inputs, in fp64: ``U_r U_r^T M``."""
        U = self.U[..., :rank]
        return U @ (U.mT @ self.M)

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Balanced factors ``U`` ``[G, m, r]`` and ``V`` ``[G, r, n]`` of :meth:`nearest`, rounded to ``dtype``."""
        U = self.U[..., :rank]
        rotation, V = SVD.of(U.mT @ self.M).factors(rank, torch.float64)
        return (U @ rotation).to(dtype), V.to(dtype)


class _Moments:
    """Second moment of a layer's inputs x as its matrix ``M = L Q`` sees them.

    ``energy`` ``[G]``: the sum of ``||x||^2``; ``K`` ``[G, k, k]``: the sum of ``Q x x^T Q^T``, Q = I if m >= n.
    """

    def __init__(self, M: Tensor):
        G, m, n = M.shape
        self.n, k = n, min(m, n)
        self.Q = torch.linalg.qr(M.detach().double().mT).Q.mT if m < n else None  # [G, k, n]
        self.energy, self.K = (torch.zeros(G, *more, dtype=torch.float64, device=M.device) for more in ((), (k, k)))

    def add(self, X: Tensor) -> None:
        """Add inputs ``[G, positions, n]``."""
        X = X.double()
        self.energy += X.square().sum((-2, -1))
        X = X if self.Q is None else X @ self.Q.mT
        self.K += X.mT @ X

    def svd(self, M: Tensor) -> WeightedSVD:
        """Output energies of a matrix M ``[G, m, n]`` whose rows are spanned by Q."""
        M, mean = M.detach().double(), self.energy / self.n  # [G], the mean eigenvalue of C
        seen, eye = (mean > TINY)[:, None, None], torch.eye(self.K.shape[-1]).to(self.K)
        K = torch.where(seen, self.K / mean.clamp_min(TINY)[:, None, None] + RIDGE * eye, eye)
        root = torch.linalg.cholesky(K)
        U, s, _ = torch.linalg.svd((M if self.Q is None else M @ self.Q.mT) @ root, full_matrices=False)
        return WeightedSVD(U, s * torch.where(mean > TINY, mean, 1.0).sqrt()[:, None], M)


class Calibration:
    """Second moments (up to a factor) of the inputs of a model's layers, one per fold.

    Args:
        model: run in eval mode.
        names: layers to calibrate; a layer whose forward is not that of Linear or a convolution gets C = I.
        batches: inputs of the model, ``[(x,), ...]``: each a tuple of positional ones, or a mapping of keywords.
        folds: folds whose moments :meth:`spectrum` and :meth:`svd` will need.
        progress: whether to show a progress bar on stderr; None: if that is a terminal.

    Raises:
        ValueError: no batch; NaN or Inf in a layer's input.  TypeError: a batch is neither a tuple nor a mapping.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Iterable[Sequence[object] | Mapping[str, object]],
        folds: Sequence[str],
        progress: bool | None = None,
    ):
        self._moments: dict[tuple[str, str], _Moments] = {}
        self._folds, count = folds, 0
        modules = {name: model.get_submodule(name) for name in names}
        hooks = [
            module.register_forward_pre_hook(partial(self._accumulate, name), with_kwargs=True)
            for name, module in modules.items()
            if type(module).forward in FORWARDS
        ]  # fmt: skip
        try:
            with layer_by_layer(model), torch.no_grad():
                for count, batch in enumerate(tracked(batches, "calibrate", progress), 1):  # noqa: B007
                    if not isinstance(batch, (Sequence, Mapping)) or isinstance(batch, str):
                        raise TypeError(f"calibration: wanted {WANTED}; got one of {type(batch).__name__}")
                    Inputs.of(batch).run(model)
        finally:
            for hook in hooks:
                hook.remove()
        if not count:
            raise ValueError(f"calibration: wanted {WANTED}; got none")
        for (name, _), moments in self._moments.items():
            if not (moments.K.isfinite().all() and moments.energy.isfinite().all()):
                raise ValueError(f"calibration: {name} reads NaN or Inf")

    def _accumulate(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        for fold in self._folds:
            if (name, fold) not in self._moments:
                self._moments[name, fold] = _Moments(Layer(name, module).matrix(fold))
            for X in columns(module, x.detach(), fold):
                self._moments[name, fold].add(X)

    def spectrum(self, name: str, fold: str, M: Tensor) -> Tensor:
        """Singular values ``[G, k]`` of ``M C^(1/2)``, the spectrum that rank rules see.  M: ``[G, m, n]``."""
        return self.svd(name, fold, M).s if (name, fold) in self._moments else singular_values(M)

    def svd(self, name: str, fold: str, M: Tensor) -> Truncation | WeightedSVD:
        """SVD of ``M C^(1/2)``, or of M itself for a layer without moments.

        Args:
            M: the layer's matrix ``[G, m, n]``, or one whose rows are in the span of its rows.
        """
        return self._moments[name, fold].svd(M) if (name, fold) in self._moments else Truncation(M)


def columns(module: nn.Module, x: Tensor, fold: str) -> Iterator[Tensor]:
    """Columns ``[G, positions, n]`` that the folded matrix multiplies: parts of the unfolded (im2col) input ``x``.

    Only kernel axes that the fold puts into columns are unfolded; along the others every pixel counts, unpadded.
    """
    if isinstance(module, nn.Linear):
        for part in x.unbind() if x.is_nested else (x,):
            yield from part.reshape(1, part[..., :1].numel(), part.shape[-1]).split(ROWS, dim=1)
        return
    axes = x.ndim - 2 if x.ndim > len(module.kernel_size) + 1 else x.ndim - 1
    x = x if x.ndim == axes + 2 else x[None]
    k = row_axes(fold, axes)
    pads = list(module._reversed_padding_repeated_twice)  # the last axis first
    pads[2 * (axes - k) :] = [0] * (2 * k)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    for part in F.pad(x, pads, mode=mode).split(1):
        yield _columns(part, module, k)


def _columns(x: Tensor, module: nn.Module, k: int) -> Tensor:
    """im2col along kernel axes k and up: ``[1, C, *S]`` -> ``[G, positions, C/G prod(K[k:])]``."""
    for axis in range(k, len(module.kernel_size)):
        span = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        x = x.unfold(2 + axis, span, module.stride[axis])[..., :: module.dilation[axis]]
    kernel = tuple(range(2 + len(module.kernel_size), x.ndim))
    x = x.permute(1, *kernel, 0, *range(2, 2 + len(module.kernel_size)))  # [C, *K[k:], 1, *positions]
    return x.reshape(module.groups, x.shape[0] // module.groups * x.shape[1 : 1 + len(kernel)].numel(), -1).mT
