"""Guard against NaN and Inf in weights on a GPU, without device-to-host synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Guard"]


class Guard:
    """Check that all weights are finite: the result is on the GPU at once, on the host only at a later call.

    If a weight is not finite, the device sets all thresholds to 0, so that a proximal operator changes nothing.

    Attributes:
        all_finite: bool ``[]`` on the GPU, set by :meth:`look`; reset to None after the penalties.
    """

    def __init__(self):
        self.all_finite: Tensor | None = None
        self._pending: tuple | None = None  # finite per weight; query of the copy's completion; names
        self._captured: list[Tensor] = []  # kept alive: replays of CUDA graphs read them again

    def look(self, weights: Sequence[Tensor], names: Sequence[str]) -> None:
        """Check the weights, before they are changed.  Raises ValueError if one was not finite at an earlier call."""
        device = weights[0].device
        capturing = _capturing(device)  # events must not be queried during capture
        if not capturing:
            self._raise_if_not_finite()
        largest = torch._foreach_norm([W.detach() for W in weights if W.numel()], float("inf"))
        finite = torch.stack(largest).isfinite()
        self.all_finite = finite.all()
        if not capturing and self._pending is None:
            found = torch.empty_like(finite, device="cpu", pin_memory=device.type == "cuda")
            found.copy_(finite, non_blocking=True)
            event = torch.cuda.Event() if device.type == "cuda" else None
            if event:
                event.record()
            names = [name for name, W in zip(names, weights, strict=True) if W.numel()]
            self._pending = found, event.query if event else lambda: True, names

    def thresholds(self, tau: Tensor) -> Tensor:
        """Thresholds fp64 ``[L]`` on the GPU, 0 unless all weights are finite; tau: fp64 ``[L]`` on the CPU."""
        device = self.all_finite.device
        tau = tau.pin_memory() if device.type == "cuda" else tau
        if _capturing(device):
            self._captured.append(tau)
        return torch.where(self.all_finite, tau.to(device, non_blocking=True), 0.0)

    def _raise_if_not_finite(self) -> None:
        """Raise if an earlier check has arrived on the host and found NaN or Inf."""
        if self._pending is None or not self._pending[1]():
            return
        (found, _, names), self._pending = self._pending, None
        if broken := [name for name, finite in zip(names, found.tolist(), strict=True) if not finite]:
            raise ValueError(f"{broken[0]}: contained NaN or Inf at an earlier call; nothing was changed, then or now")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
