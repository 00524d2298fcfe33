"""Activation-aware low-rank factorization: truncated SVD weighted by the second moment of each layer's inputs.

With ``x`` the columns that a layer's folded matrix M multiplies, the rank-r matrix with the least output error,

    ``argmin E ||(M - M_r) x||^2 = U_r U_r^T M,   M C M^T = U diag(s^2) U^T,   C = E[x x^T]``

has factors of the same shapes as the best approximation of the weight alone (C = I). A few inputs leave C singular, so
it is regularized with a hundredth of its mean eigenvalue on the diagonal (ridge). Needs inputs, no labels.

Only the shorter side is decomposed. Where there are fewer outputs than columns, ``M C M^T`` is the second moment of the
outputs without bias, and nothing is unfolded. Else, and for folds whose rows are no outputs, of ``M = L Q`` with
orthonormal rows Q (LQ decomposition) the outputs depend on ``Q x`` only, so ``K = Q C Q^T`` ``[k, k]``, k = min(m, n),
is all that is kept of C; with the Cholesky factor ``K = R R^T``, s and U are those of ``L R``.

Weights in fp64 get s to eps of the largest: inputs are taken in fp64, and ``L R`` itself is decomposed. For others,
products are in fp32, sums in fp64, and Gram matrices are decomposed in fp64: s is right to about 1e-7 of the largest.

Source: Yu & Wu, Compressing Transformers, AAAI 2023 (AFM); Wang et al., SVD-LLM, ICLR 2025 (section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.eval_mode import layer_by_layer
from .._utils.progress import tracked
from ..folds import CONVS, row_axes
from ..nn.discovery import Layer
from ..nn.factorization import singular_values
from ..nn.truncation import Truncation
from ..ops.linalg import product
from ..ranks import Rule
from .arguments import Inputs

__all__ = ["Calibration", "WeightedSVD", "columns"]

RIDGE = 1e-2
TINY = 1e-280  # mean squares below it are no information: their own rounding is as large
ROWS = 4096  # columns of one product, after which sums are in fp64
WANTED = "inputs of the model, [(x,), ...]"
FORWARDS = {kind.forward for kind in (nn.Linear, *CONVS)}  # a subclass with its own forward may pad differently


class WeightedSVD:
    """Energies ``M C M^T = U diag(s^2) U^T`` of the outputs of a folded weight M ``[G, m, n]``, in fp64.

    Args:
        s: ``[G, k]``, descending: singular values of ``M C^(1/2)``, k = min(m, n).
        span: of a rank r, ``[G, m, r]``: an orthonormal basis of the span of the leading r columns of U.
    """

    def __init__(self, M: Tensor, s: Tensor, span: Callable[[int], Tensor]):
        self.M, self.s, self._span = M.detach(), s, span

    def rank(self, rule: Rule) -> int:
        """The rank that the rule gives for the singular values."""
        return rule(self.s)

    def nearest(self, rank: int) -> Tensor:
        """Rank-r matrix ``[G, m, n]`` nearest to M on the inputs, in fp64: ``U_r U_r^T M``."""
        U = self._span(rank)
        return U @ (U.mT @ self.M.double())

    def factors(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Balanced factors ``U`` ``[G, m, r]`` and ``V`` ``[G, r, n]`` of :meth:`nearest`, rounded to ``dtype``."""
        U = self._span(rank)
        B = U.mT @ self.M.double()
        W = torch.linalg.eigh(B @ B.mT).eigenvectors  # the rows of W^T B are orthogonal
        U, V = U @ W, W.mT @ B
        root = torch.linalg.vector_norm(V, dim=2).sqrt()[:, :, None]
        return (U * root.mT).to(dtype), (V / root.clamp_min(TINY)).to(dtype)


def _ridged(K: Tensor, energy: Tensor, n: int, eye: Tensor) -> tuple[Tensor, Tensor]:
    """The regularized K over the mean eigenvalue of C, and that mean ``[G]``; ``eye``, what C = I gives, if it is 0."""
    mean = energy / n
    seen = (mean > TINY)[:, None, None]
    K = torch.where(seen, K / mean.clamp_min(TINY)[:, None, None] + RIDGE * eye, eye)
    return K, torch.where(mean > TINY, mean, 1.0)


class _InputMoments:
    """Second moment of a layer's inputs x as its matrix ``M = L Q`` sees them.

    ``energy`` ``[G]``: the sum of ``||x||^2``; ``K`` ``[G, k, k]``: the sum of ``Q x x^T Q^T``, Q = I if m >= n. Of
    layers in fp64 all is computed in fp64, and L R decomposed; of others, products are in fp32, and sums in fp64.
    """

    def __init__(self, M: Tensor):
        G, m, n = M.shape
        self.n, k, self.exact = n, min(m, n), M.dtype == torch.float64
        self.dtype = torch.float64 if self.exact else torch.float32
        self.Q = torch.linalg.qr(M.detach().to(self.dtype).mT).Q.mT if m < n else None  # [G, k, n]
        self.energy, self.K = (torch.zeros(G, *more, dtype=torch.float64, device=M.device) for more in ((), (k, k)))

    def add(self, module: nn.Module, x: Tensor, y: Tensor, fold: str) -> None:
        """Add inputs x of a call of the layer."""
        for X in columns(module, x, fold):
            X = X.to(self.dtype)
            self.energy += torch.linalg.vector_norm(X, dim=(1, 2), dtype=torch.float64).square()
            X = X if self.Q is None else X @ self.Q.mT
            self.K += _products(X.mT)

    def svd(self, M: Tensor) -> WeightedSVD:
        """Output energies of a matrix M ``[G, m, n]`` whose rows are spanned by Q."""
        eye = torch.eye(self.K.shape[-1]).to(self.K)
        K, mean = _ridged(self.K, self.energy, self.n, eye)
        L, root = (M.detach() if self.Q is None else M.detach().to(self.dtype) @ self.Q.mT), torch.linalg.cholesky(K)
        if self.exact or not L.numel():
            U, s, _ = torch.linalg.svd(L.double() @ root, full_matrices=False)
            return WeightedSVD(M, s * mean.sqrt()[:, None], lambda rank: U[..., :rank])
        L = L.float()
        values, V = torch.linalg.eigh(root.mT @ (L.mT @ L).double() @ root)
        s = (values.flip(-1).clamp_min(0) * mean[:, None]).sqrt()
        return WeightedSVD(M, s, lambda rank: torch.linalg.qr(L.double() @ (root @ V[..., -rank:].flip(-1))).Q)


class _OutputMoments:
    """Second moment of a layer's outputs without bias, ``M C M^T`` itself, of a layer with fewer outputs than columns.

    Nothing is unfolded, and the products are at most those of the forward pass. ``energy`` ``[G]``: as of
    :class:`_InputMoments`; ``K`` ``[G, m, m]``.
    """

    def __init__(self, M: Tensor):
        (G, m, self.n), self.M = M.shape, M.detach()
        self.energy, self.K = (torch.zeros(G, *more, dtype=torch.float64, device=M.device) for more in ((), (m, m)))

    def add(self, module: nn.Module, x: Tensor, y: Tensor, fold: str) -> None:
        """Add a call of the layer with inputs x and outputs y."""
        G, m = self.K.shape[:2]
        axis = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)
        Y = y.detach().movedim(axis, 0).reshape(G, m, -1)
        Y = Y if module.bias is None else Y - module.bias.detach().reshape(G, m, 1)
        for part in Y.split(ROWS, dim=-1):
            self.K += _products(part)
        self.energy += _column_energy(module, x, fold, G)

    def svd(self, M: Tensor) -> WeightedSVD:
        """Output energies of the layer's matrix M."""
        L = self.M.float()
        K, mean = _ridged(self.K, self.energy, self.n, (L @ L.mT).double())
        values, U = torch.linalg.eigh(K)
        s = (values.flip(-1).clamp_min(0) * mean[:, None]).sqrt()
        return WeightedSVD(M, s, lambda rank: U[..., -rank:].flip(-1))


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
        self._moments: dict[tuple[str, str], _InputMoments | _OutputMoments] = {}
        self._folds, count = folds, 0
        modules = {name: model.get_submodule(name) for name in names}
        hooks = [
            module.register_forward_hook(partial(self._accumulate, name, not module._forward_hooks), with_kwargs=True)
            for name, module in modules.items()
            if type(module).forward in FORWARDS
        ]
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

    def _accumulate(self, name: str, own: bool, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        """Forward hook; ``own``: whether y is what the layer itself returned."""
        x = args[0] if args else kwargs["input"]
        for fold in self._folds:
            if (name, fold) not in self._moments:
                M = Layer(name, module).matrix(fold)
                outputs = own and not x.is_nested and _by_outputs(module, M, y, fold)
                self._moments[name, fold] = (_OutputMoments if outputs else _InputMoments)(M)
            self._moments[name, fold].add(module, x.detach(), y, fold)

    def spectrum(self, name: str, fold: str, M: Tensor) -> Tensor:
        """Singular values ``[G, k]`` of ``M C^(1/2)``, the spectrum that rank rules see.  M: ``[G, m, n]``."""
        return self.svd(name, fold, M).s if (name, fold) in self._moments else singular_values(M)

    def svd(self, name: str, fold: str, M: Tensor) -> Truncation | WeightedSVD:
        """SVD of ``M C^(1/2)``, or of M itself for a layer without moments.

        Args:
            M: the layer's matrix ``[G, m, n]``, or one whose rows are in the span of its rows.
        """
        return self._moments[name, fold].svd(M) if (name, fold) in self._moments else Truncation(M)


def _products(Y: Tensor) -> Tensor:
    """``Y Y^T`` ``[G, a, a]`` in fp64 of Y ``[G, a, positions]``, computed in its dtype if squares are in its range."""
    K = product(Y[0], Y[0].mT)[None] if len(Y) == 1 else Y @ Y.mT
    largest = float(K.diagonal(dim1=1, dim2=2).amax()) if K.numel() else 1.0
    return K.double() if 1e-25 < largest < 1e35 else Y.double() @ Y.double().mT


def _by_outputs(module: nn.Module, M: Tensor, y: Tensor, fold: str) -> bool:
    """Whether the outputs y of a layer are ``M x`` for its columns x, and fewer, in a dtype as good as that of M."""
    rows = 0 if isinstance(module, nn.Linear) else row_axes(fold, len(module.kernel_size))
    return not rows and M.shape[-2] < M.shape[-1] and M.dtype == y.dtype == torch.float32


def columns(module: nn.Module, x: Tensor, fold: str) -> Iterator[Tensor]:
    """Columns ``[G, positions, n]`` that the folded matrix multiplies: parts of the unfolded (im2col) input ``x``.

    Only kernel axes that the fold puts into columns are unfolded; along the others every pixel counts, unpadded.
    """
    if isinstance(module, nn.Linear):
        for part in x.unbind() if x.is_nested else (x,):
            yield from part.reshape(1, part[..., :1].numel(), part.shape[-1]).split(ROWS, dim=1)
        return
    x, k = _padded(module, x, fold)
    for part in x.split(1):
        yield _columns(_unfolded(part, module, k), module)


def _padded(module: nn.Module, x: Tensor, fold: str) -> tuple[Tensor, int]:
    """The input ``[N, C, *S]`` of a convolution, padded along the kernel axes that become columns, which start at k."""
    axes = len(module.kernel_size)
    x = x if x.ndim == axes + 2 else x[None]
    k = row_axes(fold, axes)
    pads = list(module._reversed_padding_repeated_twice)  # the last axis first
    pads[2 * (axes - k) :] = [0] * (2 * k)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return (F.pad(x, pads, mode=mode) if any(pads) else x), k


def _unfolded(x: Tensor, module: nn.Module, k: int) -> Tensor:
    """View ``[N, C, *positions, *K[k:]]`` of the padded input: windows along the kernel axes from k on."""
    for axis in range(k, len(module.kernel_size)):
        span = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        x = x.unfold(2 + axis, span, module.stride[axis])[..., :: module.dilation[axis]]
    return x


def _columns(x: Tensor, module: nn.Module) -> Tensor:
    """im2col of one unfolded input: ``[1, C, *positions, *K]`` -> ``[G, positions, C/G prod(K)]``."""
    kernel = tuple(range(2 + len(module.kernel_size), x.ndim))
    x = x.permute(1, *kernel, 0, *range(2, 2 + len(module.kernel_size)))  # [C, *K[k:], 1, *positions]
    return x.reshape(module.groups, x.shape[0] // module.groups * x.shape[1 : 1 + len(kernel)].numel(), -1).mT


def _column_energy(module: nn.Module, x: Tensor, fold: str, groups: int) -> Tensor:
    """Sum of ``||x||^2`` over all columns ``[G]``, from the norms of the pixels: no channel is unfolded."""
    if isinstance(module, nn.Linear):
        return torch.linalg.vector_norm(x, dtype=torch.float64).square()[None]
    x, k = _padded(module, x, fold)
    pixels = torch.linalg.vector_norm(x.unflatten(1, (groups, -1)), dim=2, dtype=torch.float64).square()
    windows = _unfolded(pixels, module, k)
    return windows.transpose(0, 1).flatten(1).sum(1)
