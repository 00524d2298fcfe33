"""Report of a network during training: rank, singular values and nonzero rows of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._utils.tables import text_table
from ..distributed.dtensor import local, sharding_of
from ..folds import to_matrix
from ..nn.factorization import singular_values
from ..ranks import numerical_rank

__all__ = ["LayerSpectrum", "ProximalReport", "layer_spectrum"]


@dataclass(frozen=True)
class LayerSpectrum:
    """Rank and singular values of one layer's folded weight; over groups: largest rank, sum of the nuclear norms."""

    name: str
    shape: tuple[int, ...]  # of the folded weight, [G, m, n]
    rank: int  # numerical rank
    full_rank: int  # min(m, n)
    sigma_sum: float  # nuclear norm
    sigma_max: float  # spectral norm
    neurons: int  # outputs O
    rows_alive: float  # fraction of the neurons with a nonzero weight
    thresholds: dict[str, float]  # penalty -> threshold of the next proximal step


class ProximalReport(list[LayerSpectrum]):
    """List of :class:`LayerSpectrum`, one per layer; ``str(report)`` is a table."""

    def __str__(self) -> str:
        rows = [(r.name, "x".join(map(str, r.shape[-2:])), f"{r.rank}/{r.full_rank}", f"{r.sigma_sum:.4g}",
                 f"{r.sigma_max:.4g}", f"{r.rows_alive:.0%}") for r in self]  # fmt: skip
        return text_table(("layer", "matrix", "rank", "sum sigma", "max sigma", "rows alive"), rows, right=range(1, 6))

    def scalars(self) -> dict[str, float]:
        """Scalars for the logger of a trainer.

        ``rank/<layer>`` and ``rows_alive/<layer>`` of every layer; of all layers together ``rank_share`` (sum of the
        ranks over sum of the full ranks) and ``rows_alive`` (fraction of the neurons with a nonzero weight).
        """
        ranks = {f"rank/{r.name}": float(r.rank) for r in self}
        alive = {f"rows_alive/{r.name}": r.rows_alive for r in self}
        share = sum(r.rank for r in self) / max(1, sum(r.full_rank for r in self))
        live = sum(r.rows_alive * r.neurons for r in self) / max(1, sum(r.neurons for r in self))
        return ranks | alive | {"rank_share": share, "rows_alive": live}


def layer_spectrum(name: str, rows: Tensor, fold: str, groups: int, thresholds: dict[str, float]) -> LayerSpectrum:
    """Rank, singular values and nonzero rows of one weight; a collective call if the weight is sharded.

    Args:
        rows: the weight ``[O, C/G, *K]``, output axis first.
        fold: see :mod:`compaware_kernels.folds`.
        groups: G.
        thresholds: penalty -> threshold, for the result.

    Raises:
        ValueError: the weight is sharded along a kernel axis.
    """
    sharding = sharding_of(rows, fold, name)
    if sharding and groups > 1:
        rows, sharding = rows.full_tensor(), None
    M, flags = to_matrix(local(rows), fold, groups), local(rows).flatten(1).any(1).double()
    s = sharding.singular_values(M[0])[None] if sharding else singular_values(M)
    shape = (groups, *(sharding.shape if sharding else M.shape[1:]))
    rank, sums = int(numerical_rank(s, M.dtype).max()), (float(s.sum()), float(s.max()))
    alive = sharding.count_flagged_rows(flags) / len(rows) if sharding else float(flags.mean())
    return LayerSpectrum(name, shape, rank, s.shape[-1], *sums, len(rows), alive, thresholds)
