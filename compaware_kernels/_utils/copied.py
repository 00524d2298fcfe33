"""Deep copies of models that keep shared memory shared, also of models that keep computed tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .memory import has_memory, span

__all__ = ["MODULE_STATE", "copied", "with_the_same_parameters"]

MODULE_STATE = frozenset(vars(nn.Module()))  # what torch keeps in every module


def copied(model: nn.Module, instead: Mapping[int, object] | None = None) -> nn.Module:
    """Deep copy of a model; computed tensors that it keeps (a cache, the last loss) are copied without their graph.

    Parameters in one storage stay in one: ``copy.deepcopy`` keeps a tied parameter, but separates two parameters of
    the same data. ``instead``: what takes the place of tensors, by their ``id``.
    """
    memo: dict[int, object] = {**_in_shared_storages(model), **_not_strided(model), **(instead or {})}
    with _DetachedCopies():
        new = copy.deepcopy(model, memo)
        for module in model.modules():
            if isinstance(module, fx.GraphModule):
                _complete(memo[id(module)], module, memo)
    return new


def with_the_same_parameters(model: nn.Module) -> nn.Module:
    """Deep copy of a model whose parameters are new objects in the memory of the old ones."""
    alike = (p for p in model.parameters() if type(p) is nn.Parameter and p.layout is torch.strided)
    return copied(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in alike})


def _complete(new: fx.GraphModule, old: fx.GraphModule, memo: dict[int, object]) -> None:
    """Give a copy what torch.fx does not copy: the name of its class, hooks, attributes of a subclass."""
    type(new).__name__ = type(old).__name__
    for name, value in vars(old).items():
        lost = name not in vars(new) and name != "_compiled_call_impl"  # which deepcopy of other modules drops, too
        if lost or (name in MODULE_STATE and "hooks" in name):
            vars(new)[name] = copy.deepcopy(value, memo)


class _DetachedCopies(TorchFunctionMode):
    """Deep copies of tensors that an operation computed are detached; ``copy.deepcopy`` refuses them otherwise."""

    def __init__(self):
        super().__init__()
        self.alive: list[Tensor] = []  # the memo of deepcopy goes by id, which another tensor would get

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            self.alive.append(args[0].detach())
            args = (self.alive[-1], *args[1:])
        return func(*args, **(kwargs or {}))


def _in_shared_storages(model: nn.Module) -> dict[int, Tensor]:
    """Copies of the parameters and buffers that lie in one storage with others, by ``id``: a memo for deepcopy."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        by_storage.setdefault(span(tensor)[0], []).append(tensor)
    memo: dict[int, Tensor] = {}
    for tensors in by_storage.values():
        if len(tensors) > 1 and has_memory(tensors[0]):
            storage = tensors[0].untyped_storage().clone()
            for old in tensors:
                new = torch.empty(0, dtype=old.dtype, device=old.device)
                new.set_(storage, old.storage_offset(), old.shape, old.stride())
                memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return memo


def _not_strided(model: nn.Module) -> dict[int, Tensor]:
    """Copies by ``id`` of the parameters of a sparse or mkldnn layout, which deepcopy cannot copy."""
    found = (p for p in model.parameters() if not nn.parameter.is_lazy(p) and p.layout is not torch.strided)
    return {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in found}
