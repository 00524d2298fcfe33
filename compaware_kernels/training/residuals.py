"""Residuals of a model's bf16 and fp16 weights and biases, by name; see :mod:`.proximal.error_feedback`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..nn.discovery import Layer
from ..proximal.error_feedback import HALF

__all__ = ["Residuals"]


class Residuals(dict[str, Tensor]):
    """``<layer>.weight`` and ``<layer>.bias`` -> int16, of the tensor's shape, device and sharding, output axis first.

    Replicas compute equal residuals from the results they share, and shards have those of their own elements: nothing
    is communicated.
    """

    def __init__(self, *entries: Mapping[str, Tensor]):
        super().__init__(*entries)
        self._copies: dict[str, Tensor] = {}  # fp32 copies on a GPU, whose step is planned for their addresses

    def same_copy(self, key: str, X: Tensor) -> Tensor:
        """X, in the memory of the last call for this key if it fits."""
        kept = self._copies.get(key)
        if kept is None or kept.shape != X.shape or kept.stride() != X.stride() or kept.device != X.device:
            self._copies[key] = X
            return X
        return kept.copy_(X)

    def of(self, key: str, W: Tensor) -> Tensor | None:
        """Residual of a tensor, zeros if there is none that fits; None for dtypes that need none."""
        if W.dtype not in HALF:
            self.pop(key, None)
            return None
        E = self.get(key)
        placements = getattr(W, "placements", None)
        if E is None or E.shape != W.shape or E.device != W.device or getattr(E, "placements", None) != placements:
            E = self[key] = torch.zeros_like(W, dtype=torch.int16)
        return E

    def saved(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Copies of the residuals that :meth:`loaded` takes for these layers; layers may have been replaced since."""
        wanted = _by_key(layers)
        return {key: E.clone() for key, E in self.items() if _fits(E, wanted.get(key))}

    @classmethod
    def loaded(cls, state: Mapping[str, Tensor], layers: Sequence[Layer]) -> Residuals:
        """Copy of saved residuals on the devices of the layers.

        Raises:
            ValueError: no mapping, or an entry that is of no layer, or no int16 tensor of its shape.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"residuals: wanted a mapping of tensors; got {type(state).__name__}")
        wanted = _by_key(layers)
        for key, E in state.items():
            if not _fits(E, wanted.get(key)):
                shape = list(wanted[key].shape) if key in wanted else "a weight or bias of a layer that is shrunk"
                raise ValueError(f"residual of {key}: wanted torch.int16 {shape}; got {E!r:.80}")
        return cls({key: E.detach().to(wanted[key].device, copy=True) for key, E in state.items()})


def _by_key(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Weights, output axis first, and biases by the keys of their residuals."""
    weights = {f"{layer.name}.weight": layer.rows for layer in layers}
    return weights | {f"{layer.name}.bias": layer.module.bias for layer in layers if layer.module.bias is not None}


def _fits(E: object, W: Tensor | None) -> bool:
    return isinstance(E, Tensor) and E.dtype == torch.int16 and W is not None and E.shape == W.shape
