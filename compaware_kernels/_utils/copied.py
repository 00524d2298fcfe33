"""Deep copies of models, also of those that keep computed tensors."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["copied"]


class _DetachedCopies(TorchFunctionMode):
    """Deep copies of tensors that an operation computed are detached; ``copy.deepcopy`` refuses them otherwise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module) -> nn.Module:
    """Deep copy of a model; computed tensors that it keeps (a cache, the last loss) are copied without their graph."""
    with _DetachedCopies():
        return copy.deepcopy(model)
