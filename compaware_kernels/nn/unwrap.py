"""What training puts around a model and an optimizer, taken off again."""

from __future__ import annotations

import copy
import sys

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

INSIDE = ("_orig_mod", "_checkpoint_wrapped_module")  # where torch.compile and activation checkpointing keep a module


def inner(module: nn.Module) -> nn.Module | None:
    """What torch.compile or activation checkpointing has wrapped, if this is their wrapper."""
    return next((module._modules[name] for name in INSIDE if name in module._modules), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the above, DistributedDataParallel, DataParallel and AveragedModel, in any order."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        elif (found := inner(model)) is not None:
            model = found
        else:
            return model


def bare(model: nn.Module) -> nn.Module:
    """The model without wrappers, whose names are those of the code: itself, or a copy where submodules are wrapped."""
    model = unwrapped(model)
    if all(inner(module) is None for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            while child is not None and (found := inner(child)) is not None:
                child = found
            parent._modules[name] = child
    return model


def data_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that a DistributedDataParallel around the model, compiled or not, keeps the same."""
    while not isinstance(model, DistributedDataParallel):
        model = inner(model)
        if model is None:
            return None
    return model.process_group


def reshard(model: nn.Module) -> None:
    """Reshard FSDP2 modules left unsharded after forward."""
    if fsdp := sys.modules.get("torch.distributed.fsdp"):
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def plain_name(name: str) -> str:
    """The name of a submodule without what wrapping it or its parents has added."""
    return ".".join(part for part in name.split(".") if part not in INSIDE)


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the steps, inside those of Accelerate and Lightning, which may pass some over."""
    while isinstance(inside := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inside
    return optimizer
