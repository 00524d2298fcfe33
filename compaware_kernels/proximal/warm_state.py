"""WarmState: warm start of the spectral solver, the singular subspaces of every layer kept between calls."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["WarmState", "from_text", "to_text"]


class WarmState:
    """Leading singular vectors ``[min(m, n), k]`` of every matrix, its shorter side, kept between :func:`svt_` calls.

    Singular subspaces change slowly during training, so those of the last call are a good initial guess. They only save
    time: no error bound relies on them. A layer that is new or has changed shape starts cold; one whose weights were
    edited takes a few more iterations.

    Holds at most ``(rank + 23) min(m, n)`` numbers per matrix, in its compute dtype, on its device. The same calls with
    the same seed and number of threads give the same results, also after :meth:`load_state_dict`.

    Args:
        seed: seed of the random probes.
    """

    def __init__(self, seed: int = 0):
        self.seed, self.calls = seed, 0
        self.bases: dict[str, Tensor] = {}  # key of the matrix -> [min(m, n), k]; k = 0: full rank at the last call

    def remember(self, bases: Mapping[str, Tensor]) -> None:
        """Replace the bases of these matrices: key -> ``[min(m, n), k]``."""
        self.bases |= bases

    def advance(self) -> None:
        """Count one call; the next one draws different probes."""
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        """Seed, number of calls and bases: tensors and numbers only, for ``torch.load(weights_only=True)``."""
        return {"seed": self.seed, "calls": self.calls, "bases": dict(sorted(self.bases.items()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`.  Raises ValueError for anything else, leaving the state unchanged."""
        wanted = {"seed", "calls", "bases"}
        if not isinstance(state, Mapping) or state.keys() != wanted:
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"wanted a WarmState with {', '.join(sorted(wanted))}; got {got}")
        if not all(isinstance(state[key], int) for key in ("seed", "calls")) or not isinstance(state["bases"], Mapping):
            raise ValueError("wanted a WarmState with whole numbers seed and calls, and a mapping of bases")
        for name, V in state["bases"].items():
            if not (isinstance(V, Tensor) and V.ndim == 2 and V.is_floating_point() and bool(V.isfinite().all())):
                raise ValueError(f"WarmState: wanted a finite matrix for {name!r}; got {V!r:.80}")
        self.seed, self.calls, self.bases = state["seed"], state["calls"], dict(state["bases"])

    def to(self, *args: Any, **kwargs: Any) -> WarmState:
        """Move or cast the bases in place, with the arguments of ``torch.Tensor.to``; returns self."""
        self.bases = {name: V.to(*args, **kwargs) for name, V in self.bases.items()}
        return self

    def numbers(self) -> int:
        """Number of elements of all bases."""
        return sum(V.numel() for V in self.bases.values())

    def __repr__(self) -> str:
        return f"WarmState({len(self.bases)} matrices, {self.numbers()} numbers, {self.calls} calls, seed={self.seed})"


def to_text(state: Mapping[str, Any]) -> str:
    """Serialize tensors and numbers to one string.

    torch.distributed.checkpoint restores a string of any length, but tensors only into tensors of the same shape, and
    the bases change shape from call to call.
    """
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(zlib.compress(file.getvalue(), 0)).decode()  # level 0: no compression, but a checksum


def from_text(text: str) -> Any:
    """The inverse of :func:`to_text`, on the CPU; executes no code.  Raises ValueError for any other text."""
    try:
        file = io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many exception types
        raise ValueError(f"wanted a WarmState as it was saved; got a damaged one: {error!r:.200}") from error
