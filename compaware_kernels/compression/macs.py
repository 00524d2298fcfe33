"""Multiply-adds of a model's layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs"]


def count_macs(model: nn.Module, inputs: tuple) -> dict[str, int]:
    """Multiply-adds per submodule (and of the whole model under "") of one forward pass in eval mode."""
    modes = {module: module.training for module in model.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention kernels are not counted
    try:
        model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training
    root, first, macs = type(model).__name__, {}, {}
    names = {name: first.setdefault(module, name) for name, module in model.named_modules(remove_duplicate=False)}
    for key, ops in counter.get_flop_counts().items():
        if key.startswith(f"{root}."):
            name = key.removeprefix(f"{root}.")
            name = names.get(name, name)  # of a module with several names the counter uses the last
            macs[name] = macs.get(name, 0) + sum(ops.values()) // 2
    return macs | {"": counter.get_total_flops() // 2}
