"""A model in training or eval mode, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["eval_mode", "layer_by_layer", "set_mode"]


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
    modes = [(module, module.training) for module in model.modules()]
    try:
        set_mode(model, False)
        yield
    finally:
        for module, training in modes:
            module.training = training  # train() would pack the low-rank layers again


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Eval mode in which torch's transformer layers call their parts, which its fused kernels and nested tensors hide.

    Those run no hooks of the parts, are not counted, and give the parts of an encoder with a padding mask inputs
    without a shape.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
