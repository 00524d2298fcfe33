"""NaN and Inf in weights on a GPU, found without waiting for it: :class:`Guard`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Guard:
    """Knows on the GPU, at once, whether all weights are finite; on the host, at a later call.

    Where they are not, thresholds become 0, with which a proximal operator changes nothing.

    Attributes:
        all_finite: bool, on the GPU, from :meth:`look` on; None again once the penalties are done.
    """

    def __init__(self):
        self.all_finite: Tensor | None = None
        self._arriving: tuple | None = None  # whether each was finite, when that is here, and their names
        self._captured: list[Tensor] = []  # what replays of CUDA graphs read again

    def look(self, weights: Sequence[Tensor], names: Sequence[str]) -> None:
        """Before weights are changed.  Raises ValueError if one was not finite at an earlier call."""
        device = weights[0].device
        capturing = _capturing(device)  # no event may be asked then
        if not capturing:
            self._raise()
        largest = torch._foreach_norm([W.detach() for W in weights if W.numel()], float("inf"))
        finite = torch.stack(largest).isfinite()
        self.all_finite = finite.all()
        if not capturing and self._arriving is None:
            found = torch.empty_like(finite, device="cpu", pin_memory=device.type == "cuda")
            found.copy_(finite, non_blocking=True)
            event = torch.cuda.Event() if device.type == "cuda" else None
            if event:
                event.record()
            names = [name for name, W in zip(names, weights, strict=True) if W.numel()]
            self._arriving = found, event.query if event else lambda: True, names

    def thresholds(self, tau: Tensor) -> Tensor:
        """On the GPU; tau: fp64, on the CPU."""
        device = self.all_finite.device
        tau = tau.pin_memory() if device.type == "cuda" else tau
        if _capturing(device):
            self._captured.append(tau)
        return torch.where(self.all_finite, tau.to(device, non_blocking=True), 0.0)

    def _raise(self) -> None:
        if self._arriving is None or not self._arriving[1]():
            return
        (found, _, names), self._arriving = self._arriving, None
        if broken := [name for name, finite in zip(names, found.tolist(), strict=True) if not finite]:
            raise ValueError(f"{broken[0]}: contained NaN or Inf at an earlier call; nothing was changed, then or now")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
