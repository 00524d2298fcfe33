"""Memory of tensors: which bytes they span, whether elements share them, whether two tensors do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = ["distinct", "has_memory", "is_freed", "overlap", "overlapping_pairs", "overlaps_itself", "span", "view_of"]


def has_memory(t: Tensor) -> bool:
    """Whether t has an address of its own; not if it is meta, sparse, lazy, a wrapper (DTensor), or traced."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(t) or nn.parameter.is_lazy(t):
        return False
    plain = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and t.layout is torch.strided and not t.is_nested and not t.is_meta


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, those that occupy the same memory only once."""
    return list({span(t): t for t in tensors}.values())


def _length(t: Tensor) -> int:
    """Number of elements from the first one of t to behind its last one in memory."""
    if t.is_contiguous():
        return t.numel()
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0


def span(t: Tensor) -> tuple[int, int, int]:
    """Storage of t, the address of its first byte, and of the one behind its last; a storage of its own without any."""
    if not has_memory(t) or not t.numel():
        return id(t), 0, 1
    start = t.data_ptr()
    return t.untyped_storage().data_ptr(), start, start + _length(t) * t.element_size()


def is_freed(t: Tensor) -> bool:
    """Whether the storage of t ends before its last element, as after ``untyped_storage().resize_(0)``."""
    return t.untyped_storage().nbytes() < (t.storage_offset() + _length(t)) * t.element_size() if t.numel() else False


def view_of(t: Tensor) -> tuple:
    """Address, shape, strides and dtype of t: equal for tied weights, which are the same elements of memory."""
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of t have one address, as in an expanded tensor."""
    if t.is_contiguous():
        return False
    reach = 1  # elements that the axes looked at so far can reach
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < reach:
            return int(_mask(t, _length(t)).sum()) < t.numel()
        reach += (size - 1) * stride
    return False


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory; two columns of one matrix, say, do not."""
    (_, a_first, a_end), (_, b_first, b_end) = span(a), span(b)
    if max(a_first, b_first) >= min(a_end, b_end):
        return False
    first, size = min(a_first, b_first), a.element_size()
    if size != b.element_size() or (a_first - b_first) % size:
        return True
    length = (max(a_end, b_end) - first) // size
    masks = (_mask(t, length, (start - first) // size) for t, start in ((a, a_first), (b, b_first)))
    return bool(torch.logical_and(*masks).any())


def overlapping_pairs(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Pairs ``i < j`` of tensors that share memory."""
    spans = sorted((*span(t)[1:], t.device.index or 0, i) for i, t in enumerate(tensors) if t.numel())
    near: list[tuple[int, int, int, int]] = []  # earlier ones that end behind the start of this one
    for here in spans:
        near = [other for other in near if other[1] > here[0]]
        for _, _, device, i in near:
            if device == here[2] and overlap(tensors[i], tensors[here[3]]):
                yield min(i, here[3]), max(i, here[3])
        near.append(here)


def _mask(t: Tensor, length: int, start: int = 0) -> Tensor:
    """Which of ``length`` elements of memory belong to t, whose first one is at ``start``."""
    mask = torch.zeros(length, dtype=torch.bool)
    places = torch.tensor(start)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = places[..., None] + stride * torch.arange(size)
    mask[places] = True
    return mask
