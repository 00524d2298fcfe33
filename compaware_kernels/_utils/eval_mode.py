"""A model in training or eval mode, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode", "set_mode"]


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """The model, put into training or eval mode; of exported programs, which refuse that, only the flag is set."""
    try:
        return model.train(training)
    except NotImplementedError:
        for module in model.modules():
            module.training = training
        return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; afterwards every module has the mode that it had, whatever is raised."""
    modes = {module: module.training for module in model.modules()}
    try:
        set_mode(model, False)
        yield
    finally:
        for module, training in modes.items():
            module.training = training  # train() would pack the low-rank layers again
