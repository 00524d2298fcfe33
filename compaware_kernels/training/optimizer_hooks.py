"""Hooks on an optimizer and its wrappers: called once after each step, when no wrapper will move the weights any more.

Wrappers are found as attributes that are optimizers of the same parameters: ``SAM.base_optimizer``,
``Lookahead.optimizer``, Accelerate's and Lightning's. A wrapper's ``step`` may run the innermost step and then move the
weights (Lookahead), or not run it at all (gradient accumulation); SAM's ``second_step`` runs it without a ``step``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from .._utils.uninterrupted import uninterrupted
from ..nn.unwrap import optimizer_chain

__all__ = ["StepHooks", "attached"]

SILENT = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric")  # their wrappers do not move weights


class StepHooks:
    """Hooks that call ``after_step`` after each counted step of the innermost optimizer.

    Args:
        owner: the object that the hooks serve, see :func:`attached`.
        counts: (innermost optimizer, args, kwargs of its step) -> whether the step counts; asked at its end.
        after_step: called when the outermost ``step`` that is in progress has ended.
    """

    def __init__(self, optimizer: Optimizer, owner: Any, counts: Callable[..., bool], after_step: Callable[[], None]):
        self.owner, self._counts, self._after_step = owner, counts, after_step
        self._running: set[int] = set()  # wrappers whose step is in progress
        self._due = 0
        *wrappers, innermost = optimizer_chain(optimizer)
        self._handles = [innermost.register_step_post_hook(self._after_innermost)]
        for wrapper in wrappers:
            self._attach_to_wrapper(wrapper, innermost)

    def _attach_to_wrapper(self, wrapper: object, innermost: Optimizer) -> None:
        names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        if isinstance(wrapper, Optimizer) and all(name in vars(wrapper) for name in names):
            Optimizer.__setstate__(wrapper, {})  # lets a class that never called Optimizer.__init__ run hooks
            self._handles.append(wrapper.register_step_pre_hook(self._before_wrapper))
            self._handles.append(wrapper.register_step_post_hook(self._after_wrapper))
        elif not type(wrapper).__module__.startswith(SILENT):
            kinds = type(wrapper).__name__, type(innermost).__name__
            warnings.warn(f"optimizer: {kinds[0]} has no step hooks, so proximal steps follow the steps of the "
                          f"{kinds[1]} in it; if {kinds[0]} moves the weights after these, use every='epoch' and call "
                          "step() yourself", stacklevel=4)  # fmt: skip

    def remove(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def _before_wrapper(self, wrapper: Optimizer, args: tuple, kwargs: dict) -> None:
        self._running.add(id(wrapper))

    @torch.compiler.disable
    @uninterrupted
    def _after_innermost(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._due += self._counts(optimizer, args, kwargs)
        self._run()

    @torch.compiler.disable
    @uninterrupted
    def _after_wrapper(self, wrapper: Optimizer, args: tuple, kwargs: dict) -> None:
        self._running.discard(id(wrapper))
        self._run()

    def _run(self) -> None:
        if not self._running:
            due, self._due = self._due, 0
            for _ in range(due):
                self._after_step()


def attached(optimizer: Optimizer) -> list[Any]:
    """Owners of the hooks on the innermost optimizer."""
    hooks = optimizer_chain(optimizer)[-1]._optimizer_step_post_hooks.values()
    return [hook.__self__.owner for hook in hooks if isinstance(getattr(hook, "__self__", None), StepHooks)]
