"""Derivatives and vmap rules of the ops, for all of torch: autograd in both modes, the transforms of ``torch.func``.

The autograd kernel that ``torch.library`` generates makes reverse-mode nodes only: ``torch.func.grad`` refuses it, and
forward mode takes its derivative as zero, without a word (pytorch#168393). The kernels registered here make the nodes
that torch's own ops make: one per transform ("single level"), which knows both modes, and calls the op again for the
transforms outside it. They are registered with the dispatcher, so ``torch.compile`` traces them as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import CustomOpDef

__all__ = ["is_transformed", "register_derivatives", "register_vmap"]

_library = torch.library.Library("compaware", "FRAGMENT")


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is active: tensors may have no memory of their own."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register_derivatives(
    op: CustomOpDef,
    backward: Callable,
    jvp: Callable | None = None,
    *,
    save: Callable | None = None,
    composite: Callable[..., Tensor] | None = None,
) -> None:
    """Give op derivatives in reverse and in forward mode.

    Args:
        backward: ``backward(ctx, *grads)`` returns the gradient of every input, by differentiable ops.
        jvp: ``jvp(inputs, *tangents)`` returns the tangent of every output, likewise.
        save: ``save(ctx, inputs, output)`` keeps what ``backward`` needs; default: all inputs, which are tensors.
        composite: instead of ``jvp``, the op as a function of torch's own ops: what runs under transforms.
    """
    overload = op._opoverload

    def below_autograd(*args):
        *args, keyset = args
        with _C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & _C._after_autograd_keyset, *args)

    def forward(*args):
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # for the transforms outside this one
            return below_autograd(*args)

    def gradients(ctx, *grads):
        found = backward(ctx, *grads)
        return *(found if isinstance(found, tuple) else (found,)), None

    def tangents(ctx, *steps):
        inputs = [forward_ad.unpack_dual(x, level=0).primal for x in ctx.saved_tensors]  # 0: torch's only level
        with forward_ad._set_fwd_grad_enabled(True):  # torch turns it off here; jvp of jvp would be zero
            return jvp(inputs, *steps[:-1])

    members = {
        "forward": forward,
        "setup_context": lambda ctx, inputs, output: (save or _save_inputs)(ctx, inputs[:-1], output),
        "backward": gradients,
        "jvp": tangents,
    }
    members = {name: staticmethod(member) for name, member in members.items()}
    Node = type(op._name.removeprefix("compaware::"), (_SingleLevelFunction,), members)

    def kernel(keyset, *args):
        transformed = is_transformed()
        if composite and transformed:
            return composite(*args)
        if not (transformed or (torch.is_grad_enabled() and _C._any_requires_grad(*args))):
            return below_autograd(*args, keyset)
        with enable_single_level_autograd_function():
            return Node.apply(*args, keyset)

    _library.impl(overload, kernel, "Autograd", with_keyset=True, allow_override=True)
    if composite:
        _library.impl(overload, composite, "FuncTorchBatched")


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def register_vmap(op: CustomOpDef, fold: Callable) -> None:
    """Give op a vmap rule.  ``fold(info, in_dims, *args)``: the arguments, with the mapped axis as leading axis."""
    op.register_vmap(lambda info, in_dims, *args: (op(*fold(info, in_dims, *args)), 0))
