"""Schedule-free optimizers: the proximal step acts on the average x of the weights, which ``optimizer.eval()`` shows.

Such an optimizer keeps an iterate z, which takes the gradient steps, and its average ``x <- (1 - c) x + c z``. In
training the parameter is ``y = (1 - beta) z + beta x``; shrinking y alone would leave x of full rank. As x follows z by
the share c, its threshold is smaller by c, and z moves by 1 / c as much as x does:

    ``x' = prox(x, c tau)``,   ``z' = z + (x' - x) / c``,   ``y' = (1 - beta) z' + beta x'``

In the directions that x keeps, z is shrunk by tau as without an average; in those that x has lost, z is set to 0 while
it stays below tau. What x held of them before vanishes only as 1 / steps: choose its ranks by their energy, not by the
number of singular values. The derivation is this library's own.

Source of the optimizer: Defazio et al., The road less scheduled, NeurIPS 2024 (arXiv 2405.15682).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._utils.dtypes import compute_dtype

__all__ = ["Average", "average_of", "is_schedule_free"]


@dataclass(frozen=True)
class Average:
    """Average x of a parameter: ``y = (1 - beta) z + beta x``."""

    y: Tensor  # the parameter
    z: Tensor
    beta: float  # 1 after ``optimizer.eval()``
    share: float  # c, of all optimizer steps since the last proximal step

    @property
    def x(self) -> Tensor:
        """The average, in new memory, in the compute dtype."""
        dtype = compute_dtype(self.y.dtype)
        return torch.lerp(self.z.to(dtype), self.y.detach().to(dtype), 1 / self.beta)

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        """Give the average this value, and move z and the parameter with it."""
        moved = x - self.x
        self.y.add_(moved, alpha=self.beta + (1 - self.beta) / self.share)
        self.z.add_(moved, alpha=1 / self.share)


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether the optimizer switches its parameters between an average and training."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def average_of(optimizer: Optimizer, p: Tensor, steps: int) -> Average | None:
    """Average of a parameter; None unless the optimizer is schedule-free and has taken a step.

    Schedule-free optimizers have methods ``train`` and ``eval``, a state ``z`` by parameter, and in each parameter
    group the number of steps ``k``, ``train_mode`` and beta, as ``momentum`` or the first of ``betas``.

    Args:
        steps: of the optimizer since the last proximal step.
    """
    z = optimizer.state.get(p, {}).get("z")
    if z is None or not is_schedule_free(optimizer):
        return None
    group = next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))
    beta = (group["betas"][0] if "betas" in group else group["momentum"]) if group["train_mode"] else 1.0
    return Average(p, z, beta, min(1.0, max(1, steps) * _share(group)))


def _share(group: Mapping[str, Any]) -> float:
    """Share c of z in the average at the last step: 1 / k, or by the weights of the package ``schedulefree``."""
    k = max(1, group["k"])
    if "weight_sum" not in group:
        return 1 / k
    return k ** group["r"] * group["lr_max"] ** group["weight_lr_power"] / group["weight_sum"]
