"""Layers whose weight other code of the model reads, instead of calling the layer or besides; found by running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..nn.factored_weight import METADATA

__all__ = ["weights_read"]


@contextmanager
def weights_read(model: nn.Module, names: Sequence[str]) -> Iterator[set[str]]:
    """Those of the layers ``names`` whose weight is an argument of an op outside their own forward, within the context.

    As a low-rank layer, such a layer works, but forms the product of its factors at each read. To ask for the dtype,
    device or shape of a weight is no read: the product is not needed for that.
    """
    reads = _Reads({id(model.get_submodule(name).weight): name for name in names})
    handles = []
    for name in names:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: reads.running.append(name)))
        handles.append(layer.register_forward_hook(lambda *_: reads.leave(), always_call=True))
    try:
        with reads:
            yield reads.found
    finally:
        for handle in handles:
            handle.remove()


class _Reads(TorchFunctionMode):
    """Names of the layers, given by ``id`` of their weights, whose weights ops use while the layer does not run."""

    def __init__(self, weights: dict[int, str]):
        super().__init__()
        self.weights, self.running, self.found = weights, [], set()

    def leave(self) -> None:
        self.running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in METADATA:
            used = {self.weights[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.weights}
            self.found |= used - set(self.running)
        return func(*args, **(kwargs or {}))
