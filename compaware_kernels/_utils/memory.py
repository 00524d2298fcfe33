"""Memory of tensors: which of them lie in the same storage."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["distinct", "has_memory", "span"]


def has_memory(tensor: Tensor) -> bool:
    """Whether the values lie at the tensor's ``data_ptr()``; not if it is meta, sparse, empty, lazy or a DTensor."""
    if nn.parameter.is_lazy(tensor):
        return False
    plain = tensor.layout is torch.strided and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)
    return plain and tensor.numel() > 0


def span(tensor: Tensor) -> tuple[int, int, int]:
    """Memory of a tensor: its storage, first byte and end; a tensor without one has a storage of its own."""
    if not has_memory(tensor):
        return id(tensor), 0, 1
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, those that occupy the same memory only once."""
    return list({span(tensor): tensor for tensor in tensors}.values())
