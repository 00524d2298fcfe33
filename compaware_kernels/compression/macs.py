"""Multiply-add count of a model and its submodules."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .._utils.eval_mode import eval_mode

__all__ = ["count_macs"]


def count_macs(model: nn.Module, inputs: tuple) -> dict[str, int]:
    """Multiply-adds of one forward pass in eval mode, by submodule name; the whole model under ``""``."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention kernels are not counted
    try:
        with eval_mode(model), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    root, first, macs = type(model).__name__, {}, {}
    names = {name: first.setdefault(module, name) for name, module in model.named_modules(remove_duplicate=False)}
    for key, ops in counter.get_flop_counts().items():
        if key.startswith(f"{root}."):
            name = key.removeprefix(f"{root}.")
            name = names.get(name, name)  # the counter uses the last name of a shared module, named_modules the first
            macs[name] = macs.get(name, 0) + sum(ops.values()) // 2
    return macs | {"": counter.get_total_flops() // 2}
