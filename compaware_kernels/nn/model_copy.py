"""Copies of models without memory, on the meta device; and memory for what is on that device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._utils.copied import copied

__all__ = ["on_meta", "with_memory"]


def on_meta(model: nn.Module) -> nn.Module:
    """Copy of a model whose parameters and buffers are on the meta device: shapes and dtypes without memory."""
    empties: dict[int, object] = {}
    for module in model.modules():
        for T in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(T, Tensor) and _is_plain(T):
                empty = T.detach().to("meta")
                empties[id(T)] = nn.Parameter(empty, T.requires_grad) if isinstance(T, nn.Parameter) else empty
    return copied(model, empties)


def with_memory(model: nn.Module) -> nn.Module:
    """The model, with memory for every tensor: uninitialized, on the CPU, for what is on the meta device.

    Expanded tensors (stride 0), which cannot be written to, are replaced as well. Tensors that are one stay one.

    Raises:
        ValueError: a buffer on the meta device is not part of the state dict, so nothing can give its values.
    """
    new: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that no other gets its id
    for prefix, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, T in table.items():
                if T is None or not _is_plain(T) or not (T.is_meta or 0 in T.stride()):
                    continue
                if T.is_meta and name in module._non_persistent_buffers_set:
                    raise ValueError(
                        f"{f'{prefix}.{name}'.lstrip('.')}: wanted values; got a buffer on the meta device that is not "
                        "in the state dict: build the model on the CPU"
                    )
                if id(T) not in new:
                    empty = torch.empty_like(T, device="cpu") if T.is_meta else T.detach().contiguous()
                    new[id(T)] = T, nn.Parameter(empty, T.requires_grad) if isinstance(T, nn.Parameter) else empty
                table[name] = new[id(T)][1]
    return model


def _is_plain(T: Tensor) -> bool:
    """Whether it is an initialized tensor of numbers with strides, and of no subclass."""
    return (
        not nn.parameter.is_lazy(T) and type(T.detach()) is Tensor and T.layout == torch.strided and not T.is_quantized
    )
