"""Multiply-add count of a model and its submodules."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from .._utils.eval_mode import layer_by_layer
from .arguments import ExampleInputs, Inputs

__all__ = ["count_macs"]


class _Running:
    """Names of the submodules that run now, for FlopCounterMode, whose own tracker registers autograd hooks."""

    def __init__(self, model: nn.Module):
        self.names = {id(module): name for name, module in model.named_modules()}  # of a shared module the first name
        self.stack: list[str] = []

    @property
    def parents(self) -> set[str]:
        return {"", *self.stack}

    def _enter(self, module: nn.Module, _) -> None:
        self.stack.append(self.names.get(id(module), ""))

    def _leave(self, *_) -> None:
        self.stack.pop()

    def __enter__(self):
        # Hooks of all modules: a low-rank layer whose factors have hooks of their own runs in two steps.
        after = register_module_forward_hook(self._leave, always_call=True)
        self.hooks = register_module_forward_pre_hook(self._enter), after
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def count_macs(
    model: nn.Module, example_inputs: ExampleInputs | Inputs, example_kwargs: Mapping[str, object] | None = None
) -> dict[str, int] | None:
    """Multiply-adds of one forward pass in eval mode, by submodule name; the whole model under ``""``.

    Returns:
        the counts; None where a model that runs cannot be counted, because an op fails under torch's FLOP counter.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    inputs = Inputs.of(example_inputs, example_kwargs)
    with layer_by_layer(model), torch.no_grad():
        try:
            counter = FlopCounterMode(display=False)
            counter.mod_tracker = _Running(model)
            with counter:
                inputs.cloned().run(model)
        except Exception as error:
            inputs.cloned().run(model)
            logging.getLogger("compaware_kernels").warning(
                "multiply-adds are not counted: %s", str(error).partition("\n")[0]
            )
            return None
    return {"": 0} | {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
