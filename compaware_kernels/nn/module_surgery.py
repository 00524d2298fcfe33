"""Resizing and replacing the layers of a model: same class and settings, other numbers of inputs and outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from .._utils.copied import MODULE_STATE
from ..folds import CONVS, TRANSPOSED

__all__ = ["NORMS", "copy_requires_grad", "is_plain", "is_shared", "keep_inputs", "keep_outputs", "plain_attributes",
           "replace", "resized", "short_name", "sizes", "to_channels_last", "why_fixed",
           "why_irreplaceable"]  # fmt: skip

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
STATE_KEYS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
HOOKS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]


def sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a Linear, convolution or batch norm, in features or channels."""
    if isinstance(module, NORMS):
        return module.num_features, module.num_features
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def resized(module: nn.Module, inputs: int, outputs: int, bias: bool | None = None) -> nn.Module:
    """A layer of the same class, geometry, device, dtype and mode with other sizes; its weights are uninitialized.

    Args:
        inputs, outputs: features or channels; a batch norm has ``outputs`` of them.
        bias: default: as the module.
    """
    state = next(iter(module.state_dict().values()), torch.empty(0))
    place = {"device": state.device, "dtype": state.dtype if state.is_floating_point() else None}
    if isinstance(module, NORMS):
        new = type(module)(outputs, module.eps, module.momentum, module.affine, module.track_running_stats, **place)
    else:
        bias = module.bias is not None if bias is None else bias
        place["dtype"] = module.weight.dtype
        if isinstance(module, nn.Linear):
            new = nn.utils.skip_init(nn.Linear, inputs, outputs, bias, **place)
        else:
            names = ["kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
            names += ["output_padding"] if isinstance(module, TRANSPOSED) else []
            geometry = {name: getattr(module, name) for name in names}
            new = nn.utils.skip_init(type(module), inputs, outputs, bias=bias, **geometry, **place)
    for name, parameter in new.named_parameters():
        like = module.weight if getattr(module, name) is None else getattr(module, name)
        parameter.requires_grad_(like.requires_grad)
    return new.train(module.training)


@torch.no_grad()
def keep_outputs(module: nn.Module, keep: Tensor) -> nn.Module:
    """The layer with only the outputs (of a batch norm: channels) whose indices are in ``keep``, int64 ``[kept]``."""
    inputs, _ = sizes(module)
    new = resized(module, inputs, len(keep))
    for name, tensor in module.state_dict().items():
        new.state_dict()[name].copy_(tensor[keep] if tensor.ndim else tensor)
    return new


@torch.no_grad()
def keep_inputs(module: nn.Module, keep: Tensor, constant: Tensor) -> nn.Module:
    """The layer with only the inputs in ``keep``; the bias takes the contribution of the constant others.

    ``b' = b + W c``, in fp64, with W summed over the kernel: padding other than with ``c`` is not accounted for.

    Args:
        keep: int64 ``[kept]``, indices of the inputs that stay.
        constant: c ``[inputs]``, the value of each input that is removed; zero for those that stay.
    """
    _, outputs = sizes(module)
    shift = module.weight.detach().flatten(2).sum(2) if module.weight.ndim > 2 else module.weight.detach()
    shift = shift.double() @ constant.double()
    new = resized(module, len(keep), outputs, bias=module.bias is not None or bool(shift.any()))
    new.weight.copy_(module.weight[:, keep])
    if new.bias is not None:
        new.bias.copy_(shift if module.bias is None else module.bias.double() + shift)
    return new


def short_name(kind: type) -> str:
    """Name of a class; with its module if torch.nn has another one of this name."""
    alone = getattr(nn, kind.__name__, kind) is kind
    return kind.__name__ if alone else f"{kind.__module__}.{kind.__name__}"


def why_fixed(module: nn.Module) -> str:
    """Why this layer cannot be resized; "" for a plain Linear, ungrouped convolution or batch norm."""
    kind = f"a {short_name(type(module))}"
    if type(module) not in (nn.Linear, *CONVS, *NORMS):  # a subclass may do anything in its forward
        return kind
    if getattr(module, "groups", 1) > 1:
        return f"{kind} with groups"
    if not is_plain(module):
        return f"{kind} with hooks or a forward of its own"
    return f"{kind} with more state than its own" if module.state_dict().keys() - STATE_KEYS else ""


def is_plain(module: nn.Module) -> bool:
    """Whether the module's forward is that of its class: no forward hooks, no ``forward`` set on the object."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_shared(model: nn.Module, module: nn.Module) -> bool:
    """Whether another module of ``model`` shares a parameter that ``module`` owns."""
    own = {id(p) for p in module.parameters(recurse=False)}
    return any(id(p) in own for m in model.modules() if m is not module for p in m.parameters(recurse=False))


def why_irreplaceable(module: nn.Module, parts: Collection[str] = ()) -> str:
    """Why a layer cannot be replaced by one of another class, because it has what that would lose; "" otherwise.

    Args:
        parts: names of the submodules that a layer of its class has.
    """
    if hasattr(module, "_hf_hook"):
        return "a forward of accelerate; accelerate.hooks.remove_hook_from_module first"
    if "forward" in vars(module):
        return "a forward set on the object"
    if module._state_dict_hooks:
        return "a hook that changes its state dict, which has other names once it is replaced"
    children = module._modules.keys() - set(parts)
    return f"submodules of its own: {', '.join(sorted(children))}" if children else ""


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """Attributes of a module beside the state that torch keeps in every module: sizes, geometry, flags."""
    return {name: value for name, value in vars(module).items() if name not in (*MODULE_STATE, "_compiled_call_impl")}


def copy_requires_grad(old: nn.Module, new: nn.Module) -> None:
    """Set ``requires_grad`` of the weight, or of both factors, and of the bias of ``new`` as in ``old``."""
    new.requires_grad_(old.weight.requires_grad)
    if old.bias is not None and new.bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)


def replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace the submodule ``name`` by ``new``, under every name it has in the model; returns the model.

    ``new`` takes over hooks, buffers, parameters and attributes that it lacks; what it cannot take over is named by
    :func:`why_irreplaceable`. For the name "", which is the model itself, returns ``new``.
    """
    old = model.get_submodule(name)
    _take_over(old, new)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)
    return new if old is model else model


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what ``old`` has been given: hooks, parameters, buffers, attributes, ``requires_grad``."""
    own_hooks, own_attributes = (getattr(old, name, ()) for name in ("own_hooks", "own_attributes"))
    for name in HOOKS:
        hooks = {key: hook for key, hook in vars(old)[name].items() if getattr(hook, "hook", hook) not in own_hooks}
        for key, hook in hooks.items():
            if isinstance(hook, _WrappedHook) and hook.with_module:
                hooks[key] = _WrappedHook(hook.hook, new)
        if hooks and vars(new)[name]:
            vars(new)[name] = OrderedDict(hooks | vars(new)[name])
        elif hooks:
            vars(new)[name] = vars(old)[name]  # the same, so that handles still remove them
    new._is_full_backward_hook = old._is_full_backward_hook
    if isinstance(getattr(old, "weight", None), Tensor) and isinstance(getattr(new, "weight", None), Tensor):
        copy_requires_grad(old, new)
    mine, theirs = (getattr(module, "second", module) for module in (old, new))
    if (mine is old) != (theirs is new) and _same_kind(getattr(mine, "bias", None), getattr(theirs, "bias", None)):
        theirs.bias = mine.bias  # to or from a low-rank layer: a bias that others share stays shared
    for name, parameter in old._parameters.items():
        if not hasattr(new, name) and name not in ("weight", "bias"):
            new.register_parameter(name, parameter)
    for name, buffer in old._buffers.items():
        if not hasattr(new, name):
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for name, value in plain_attributes(old).items():
        if name not in own_attributes:
            vars(new).setdefault(name, value)


def _same_kind(a: object, b: object) -> bool:
    """Whether both are parameters of the same shape and dtype on the same device."""
    if not (isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)):
        return False
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def to_channels_last(model: nn.Module) -> nn.Module:
    """The model, its 2-D convolutions converted to channels_last in place; ``model.to`` would fail on 3-D ones."""
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)
    return model
