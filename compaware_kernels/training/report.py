"""What the layers of a network are like now: ranks, singular values, live rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._utils.tables import text_table
from ..distributed.dtensor import local, shards_of
from ..folds import to_matrix
from ..nn.factorization import singular_values
from ..ranks import numerical_rank


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer now: its rank and spectrum under the fold (over groups: largest rank, summed sigma)."""

    name: str
    shape: tuple[int, ...]  # of the folded weight, [G, m, n]
    rank: int
    full_rank: int
    sigma_sum: float  # nuclear norm
    sigma_max: float
    neurons: int
    rows_alive: float  # share of the neurons with a weight other than zero
    thresholds: dict[str, float]  # that the next proximal step will use


class ProximalReport(list[LayerSpectrum]):
    """A list of :class:`LayerSpectrum`; ``str(report)`` is a table."""

    def __str__(self) -> str:
        rows = [(r.name, "x".join(map(str, r.shape[-2:])), f"{r.rank}/{r.full_rank}", f"{r.sigma_sum:.4g}",
                 f"{r.sigma_max:.4g}", f"{r.rows_alive:.0%}") for r in self]  # fmt: skip
        return text_table(("layer", "matrix", "rank", "sum sigma", "max sigma", "rows alive"), rows, right=range(1, 6))

    def scalars(self) -> dict[str, float]:
        """What a trainer's logger takes: ``rank/<layer>`` and ``rows_alive/<layer>``, and of all layers together
        ``rank_share`` (sum of ranks over sum of full ranks) and ``rows_alive``."""
        ranks = {f"rank/{r.name}": float(r.rank) for r in self}
        alive = {f"rows_alive/{r.name}": r.rows_alive for r in self}
        share = sum(r.rank for r in self) / max(1, sum(r.full_rank for r in self))
        live = sum(r.rows_alive * r.neurons for r in self) / max(1, sum(r.neurons for r in self))
        return ranks | alive | {"rank_share": share, "rows_alive": live}


def spectrum(name: str, rows: Tensor, fold: str, groups: int, thresholds: dict[str, float]) -> LayerSpectrum:
    """rows: the weight, outputs first, ``[O, C/G, ...]``; a collective call where it is sharded."""
    shards = shards_of(rows, fold, name)
    if shards and groups > 1:
        rows, shards = rows.full_tensor(), None
    M, flags = to_matrix(local(rows), fold, groups), local(rows).flatten(1).any(1).double()
    s = shards.singular_values(M[0])[None] if shards else singular_values(M)
    shape = (groups, *(shards.shape if shards else M.shape[1:]))
    rank, sums = int(numerical_rank(s, M.dtype).max()), (float(s.sum()), float(s.max()))
    alive = shards.count_rows(flags) / len(rows) if shards else float(flags.mean())
    return LayerSpectrum(name, shape, rank, s.shape[-1], *sums, len(rows), alive, thresholds)
