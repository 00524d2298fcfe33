"""Folds: a layer's weight as a matrix (per group), by name.

A convolution ``[O, C/G, *K]`` (``K`` the kernel axes) becomes ``G`` matrices by sending the first ``k`` kernel axes to
the rows, with the output channels, and the others to the columns, with the input channels::

    M[g] : (O/G prod(K[:k])) x (C/G prod(K[k:]))

    name      k        rank-r factors (first, then second convolution)
    paper     0        K -> then 1 x 1              Alvarez & Salzmann, NIPS 2017; Denton et al., 2014 ("scheme 1")
    spatial   1        1 x kw -> then kh x 1        Alvarez & Petersson, DecomposeMe, 2016; Jaderberg et al., 2014
    input     all      1 x 1 -> then K

A transposed convolution's weight ``[C, O/G, *K]`` is read as ``[O, C/G, *K]`` first (:func:`oriented`).

A Linear weight ``[O, I]`` is its own fold under every name. A 1-D convolution has one kernel axis, so its spatial fold
is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

FOLDS = ("paper", "spatial", "input")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def row_axes(fold: str, kernel_axes: int) -> int:
    """How many kernel axes the fold sends to the rows.  Raises ValueError for an unknown name."""
    if fold not in FOLDS:
        raise ValueError(f"fold must be one of {', '.join(FOLDS)}; got {fold!r}")
    return {"paper": 0, "spatial": min(1, kernel_axes - 1), "input": kernel_axes}[fold] if kernel_axes else 0


def to_matrix(weight: Tensor, fold: str = "paper", groups: int = 1) -> Tensor:
    """``[O, C/G, *K]`` -> ``[G, m, n]``.  A view where the strides allow it (always, for contiguous ``paper``).

    Raises:
        ValueError: unknown fold, fewer than two axes, or O not divisible by ``groups``.
    """
    k = row_axes(fold, weight.ndim - 2)
    if weight.ndim < 2:
        raise ValueError(f"a fold needs a weight of two or more axes [O, C, ...]; got {list(weight.shape)}")
    O, C, *K = weight.shape
    if groups < 1 or O % groups:
        raise ValueError(f"groups must divide the {O} output channels; got {groups}")
    W = weight.unflatten(0, (groups, O // groups)).movedim(2, 2 + k)  # [G, O/G, *K[:k], C, *K[k:]]
    return W.flatten(2 + k).flatten(1, 1 + k)


def from_matrix(M: Tensor, shape: Sequence[int], fold: str = "paper") -> Tensor:
    """``[G, m, n]`` -> the weight of ``shape`` ``[O, C/G, *K]``: the inverse of :func:`to_matrix`."""
    O, C, *K = shape
    k = row_axes(fold, len(K))
    G = M.shape[0]
    return M.reshape(G, O // G, *K[:k], C, *K[k:]).movedim(2 + k, 2).reshape(*shape)


def oriented(weight: Tensor, kind: type[nn.Module], groups: int = 1) -> Tensor:
    """The weight with outputs first, ``[O, C/G, *K]``: as it is, unless a transposed convolution has ``[C, O/G, *K]``.

    Its own inverse: for a transposed convolution it also leads from ``[O, C/G, *K]`` to what the layer stores.
    """
    if not issubclass(kind, TRANSPOSED):
        return weight
    if groups == 1:
        return weight.transpose(0, 1)
    if hasattr(weight, "placements"):  # a DTensor, whose parts may end within a group
        from torch.distributed.tensor import Replicate

        weight = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
