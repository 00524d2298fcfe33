"""Comparison of two models on example inputs: the same outputs up to the rounding of reordered sums, or why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .arguments import Inputs

__all__ = ["difference", "output_tensors"]

SEEDS = 0x5EED_C0DE, 0x5EED_CAFE  # of no user: noise that tracing has made a constant shall differ from a new draw
TOLERANCE = 1e3  # relative error in eps; at most 1 / 16, which is 16 roundings of bf16


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> str:
    """Why ``other`` does not give the outputs of ``model``, "" if it does; both are run on clones of the inputs.

    Outputs are all tensors and numbers in tuples, mappings, dataclasses and other objects. Floating-point values may
    differ by 1000 eps (of the coarsest dtype among outputs and parameters) times the largest value that differs: a
    mask's large constants give no tolerance to the rest. Equal infinities are equal, and so is NaN with NaN. Both
    models draw the same random numbers; one whose outputs change with the seed, or from call to call, is named as such
    if they are not the same with one seed.
    """
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    wanted = _outputs(model, inputs, SEEDS[0])
    if not wanted:
        return "the outputs hold no tensor"
    try:
        got = _outputs(other, inputs, SEEDS[0])
    except Exception as error:  # user code may fail on sizes it was not written for
        return f"the changed model fails: {' '.join(str(error).split())}"
    if _same(wanted, got, eps):
        return ""
    if not _same(wanted, _outputs(model, inputs, SEEDS[1]), eps):
        return "the model itself gives other outputs in every call: it draws random numbers, or keeps a state"
    return "the outputs change"


def _outputs(model: nn.Module, inputs: Inputs, seed: int) -> list[Tensor]:
    """Tensors and numbers in the model's output, random numbers drawn with this seed."""
    devices = {tensor.device for tensor in (*model.parameters(), *inputs.tensors()) if tensor.is_cuda}
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return list(output_tensors(inputs.cloned().run(model), set()))


def output_tensors(output: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors and numbers in an output, in order; objects that are no pytree are searched by attribute."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, (bool, int, float, complex)):
            yield torch.as_tensor(leaf)
        elif not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
            seen.add(id(leaf))
            slots = [field.name for field in dataclasses.fields(leaf)] if dataclasses.is_dataclass(leaf) else ()
            named = {name: getattr(leaf, name) for name in slots} | getattr(leaf, "__dict__", {})
            yield from output_tensors(list(named.values()), seen)


def _same(wanted: list[Tensor], got: list[Tensor], eps: float) -> bool:
    return len(wanted) == len(got) and all(_close(a, b, eps) for a, b in zip(wanted, got, strict=True))


def _close(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether two tensors of any layout are the same up to rounding in a dtype of this ``eps``, or in their own."""
    if (a.dtype, a.device, a.layout, a.is_nested) != (b.dtype, b.device, b.layout, b.is_nested):
        return False
    if a.is_nested:
        return _same(list(a.unbind()), list(b.unbind()), eps)
    if a.shape != b.shape:
        return False
    inexact = a.is_floating_point() or a.is_complex()
    eps = max(eps, torch.finfo(a.dtype).eps) if inexact else 0.0
    a, b = _plain(a), _plain(b)
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not (inexact and differs.any()):
        return not differs.any()
    a, b = a[differs], b[differs]
    error, largest = (a - b).abs().max(), a.abs().max()
    return bool(largest.isfinite() and error <= min(TOLERANCE * eps, 1 / 16) * largest)


def _plain(x: Tensor) -> Tensor:
    """Strided tensor of the same values, in fp64 (complex128, or integers as they are)."""
    x = x.dequantize() if x.is_quantized else x
    x = x if x.layout is torch.strided else x.to_dense()
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x
