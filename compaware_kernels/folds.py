"""Folds: reshaping a layer's weight [O, C/G, *K] to G matrices [m, n], by name.

A convolution ``[O, C/G, *K]`` (``K`` the kernel axes) becomes ``G`` matrices: the rows are the output channels and the
first ``k`` kernel axes, the columns the input channels and the other kernel axes::

    M[g] : (O/G prod(K[:k])) x (C/G prod(K[k:]))

    name      k        rank-r factors (first, then second convolution)
    paper     0        K -> then 1 x 1              Alvarez & Salzmann, NIPS 2017; Denton et al., 2014 ("scheme 1")
    spatial   1        1 x kw -> then kh x 1        Alvarez & Petersson, DecomposeMe, 2016; Jaderberg et al., 2014
    input     all      1 x 1 -> then K

A transposed convolution's weight ``[C, O/G, *K]`` is first brought to ``[O, C/G, *K]`` (:func:`oriented`).

A Linear weight ``[O, I]`` is the matrix itself under every name. A 1-D convolution has one kernel axis: its spatial
fold is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["CONVS", "FOLDS", "TRANSPOSED", "from_matrix", "oriented", "row_axes", "to_matrix"]

FOLDS = ("paper", "spatial", "input")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def row_axes(fold: str, kernel_axes: int) -> int:
    """Number of kernel axes that become rows of the matrix.

    Raises:
        ValueError: unknown fold.
    """
    if fold not in FOLDS:
        raise ValueError(f"fold: wanted one of {', '.join(FOLDS)}; got {fold!r}")
    return {"paper": 0, "spatial": min(1, kernel_axes - 1), "input": kernel_axes}[fold] if kernel_axes else 0


def to_matrix(weight: Tensor, fold: str = "paper", groups: int = 1) -> Tensor:
    """Weight ``[O, C/G, *K]`` -> matrices ``[G, m, n]``; a view if the strides allow (``paper``, contiguous: always).

    Raises:
        ValueError: unknown fold, fewer than two axes, or O not divisible by ``groups``.
    """
    k = row_axes(fold, weight.ndim - 2)
    if weight.ndim < 2:
        raise ValueError(f"weight: wanted two or more axes [O, C, ...]; got {list(weight.shape)}")
    O, C, *K = weight.shape
    if groups < 1 or O % groups:
        raise ValueError(f"groups: wanted a divisor of the {O} output channels; got {groups}")
    W = weight.unflatten(0, (groups, O // groups)).movedim(2, 2 + k)  # [G, O/G, *K[:k], C, *K[k:]]
    return W.flatten(2 + k).flatten(1, 1 + k)


def from_matrix(M: Tensor, shape: Sequence[int], fold: str = "paper") -> Tensor:
    """Matrices ``[G, m, n]`` -> weight of ``shape`` ``[O, C/G, *K]``: the inverse of :func:`to_matrix`.

    Raises:
        ValueError: unknown fold.
    """
    O, C, *K = shape
    k = row_axes(fold, len(K))
    G = M.shape[0]
    return M.reshape(G, O // G, *K[:k], C, *K[k:]).movedim(2 + k, 2).reshape(*shape)


def oriented(weight: Tensor, kind: type[nn.Module], groups: int = 1) -> Tensor:
    """The weight with the output axis first: ``[C, O/G, *K]`` of a transposed convolution -> ``[O, C/G, *K]``.

    Weights of other layers are returned as they are. Its own inverse: for a transposed convolution it also converts
    ``[O, C/G, *K]`` to the layout in which the layer stores it.

    Args:
        kind: class of the layer.
    """
    if not issubclass(kind, TRANSPOSED):
        return weight
    if groups == 1:
        return weight.transpose(0, 1)
    if isinstance(weight, Tensor) and hasattr(weight, "placements"):  # a DTensor, whose shards may end within a group
        from torch.distributed.tensor import Replicate

        weight = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
