"""WarmState: what the proximal engine remembers of each layer from one call to the next."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class WarmState:
    """The leading singular vectors of every layer's shorter side, kept between calls of :func:`svt_`.

    Training moves singular subspaces slowly, so the last ones are nearly right for the next call. They only make it
    faster: the error bound of a result never rests on them. A layer that changed shape, or that comes for the first
    time, starts from nothing; one whose weights were edited costs a few more passes.

    Holds at most ``(rank + 15) min(m, n)`` numbers per matrix, in its compute dtype, on its device. The same calls with
    the same seed and number of threads give the same results, also after :meth:`load_state_dict`.

    Args:
        seed: of the random probes.
    """

    def __init__(self, seed: int = 0):
        self.seed, self.calls = seed, 0
        self.bases: dict[str, Tensor] = {}  # matrix -> [min(m, n), k]; no column: full rank at the last call

    def remember(self, bases: Mapping[str, Tensor]) -> None:
        """Take the bases of these matrices in the place of those of the last call."""
        self.bases |= bases

    def advance(self) -> None:
        """Count a call: the next one draws other probes."""
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only: loads with ``torch.load(weights_only=True)``."""
        return {"seed": self.seed, "calls": self.calls, "bases": dict(sorted(self.bases.items()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.  Raises ValueError for anything else, and then changes nothing."""
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
        """Move the bases, as ``torch.Tensor.to`` does; returns itself."""
        self.bases = {name: V.to(*args, **kwargs) for name, V in self.bases.items()}
        return self

    def numbers(self) -> int:
        """How many numbers it holds."""
        return sum(V.numel() for V in self.bases.values())

    def __repr__(self) -> str:
        return f"WarmState({len(self.bases)} matrices, {self.numbers()} numbers, {self.calls} calls, seed={self.seed})"


def to_text(state: Mapping[str, Any]) -> str:
    """Tensors and numbers as one text: torch.distributed.checkpoint takes that as a whole, while it loads tensors only
    into others of the same shapes, which a state that grows does not have."""
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(zlib.compress(file.getvalue(), 0)).decode()  # not smaller, but with a checksum


def from_text(text: str) -> Any:
    """The inverse of :func:`to_text`, on the CPU; executes no code.  Raises ValueError for any other text."""
    try:
        file = io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"wanted a WarmState as it was saved; got a damaged one: {error!r:.200}") from error
