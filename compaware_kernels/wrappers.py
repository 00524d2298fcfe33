"""What training puts around a model and an optimizer, taken off again."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")  # what wrappers inside a model add to its names


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel, DataParallel and AveragedModel, in any order."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile; its class lies in a module that is slow to import
            model = model._orig_mod
        elif isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        else:
            return model


def plain_name(name: str) -> str:
    """The name of a submodule without what compiling or checkpointing its parents has added."""
    for part in NAMES:
        name = name.replace(part, "")
    return name.removesuffix("._orig_mod").removesuffix("._checkpoint_wrapped_module")


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the steps, inside those of Accelerate and Lightning, which may pass some over."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
