"""Models and optimizers without the wrappers of training: torch.compile, activation checkpointing, DDP, averages."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from .._utils.copied import copied

__all__ = [
    "data_parallel_group",
    "name_without_wrappers",
    "optimizer_chain",
    "reshard",
    "unwrapped",
    "without_wrappers",
    "wrapped_module",
]  # fmt: skip

# Names under which the wrappers of torch.compile and activation checkpointing keep the module they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of torch.compile or activation checkpointing; else None."""
    return next((module._modules[name] for name in WRAPPED if name in module._modules), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, activation checkpointing, DistributedDataParallel, DataParallel, AveragedModel.

    Wrappers may be nested in any order; those of submodules stay, see :func:`without_wrappers`.
    """
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        elif (found := wrapped_module(model)) is not None:
            model = found
        else:
            return model


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model without any wrapper, also of its submodules; a copy if a submodule is wrapped, else the model itself.

    Its submodules and its state dict have the names that the model's code gives them.
    """
    model = unwrapped(model)
    if all(wrapped_module(module) is None for module in model.modules()):
        return model
    model = copied(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            while child is not None and (found := wrapped_module(child)) is not None:
                child = found
            parent._modules[name] = child
    return model


def data_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """Process group of the DistributedDataParallel around the model, compiled or not; None if there is none."""
    while not isinstance(model, DistributedDataParallel):
        model = wrapped_module(model)
        if model is None:
            return None
    return model.process_group


def reshard(model: nn.Module) -> None:
    """Reshard FSDP2 modules left unsharded after forward."""
    if fsdp := sys.modules.get("torch.distributed.fsdp"):
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def name_without_wrappers(name: str) -> str:
    """Qualified name of a submodule without the parts that wrappers of it or of its parents have added."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def optimizer_chain(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and the ones inside it, outermost first: those of Accelerate, Lightning, SAM, Lookahead, others.

    Inside is an attribute ``optimizer``, or any attribute that is an optimizer of at least the same parameters.
    """
    chain = [optimizer]
    while (inside := _inner_optimizer(chain[-1])) is not None and all(inside is not each for each in chain):
        chain.append(inside)
    return chain


def _inner_optimizer(optimizer: Optimizer) -> Optimizer | None:
    inside = getattr(optimizer, "optimizer", None)
    if isinstance(inside, Optimizer):
        return inside
    parameters = _parameter_ids(optimizer)
    attributes = getattr(optimizer, "__dict__", {}).values()
    return next((x for x in attributes if isinstance(x, Optimizer) and parameters <= _parameter_ids(x)), None)


def _parameter_ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
