"""Multiply-adds of a model's layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
    root = type(model).__name__
    counts = counter.get_flop_counts().items()
    macs = {key.removeprefix(f"{root}."): sum(ops.values()) // 2 for key, ops in counts if key.startswith(f"{root}.")}
    return macs | {"": counter.get_total_flops() // 2}
