"""Ways to run a low-rank layer on the CPU, and which of them is the fastest for a call: measured by ops/tuner.py.

* One kernel: the C++ op.
* Two steps: two layers of torch.
* Two steps, prepacked, and dense, prepacked: the factors, or their product, in oneDNN's layout (ops/prepacked.py).

Inductor's freezing prepacks layers of torch itself and folds the product of two constants, so a graph for a compiler
holds the C++ op, two layers of torch or one: chosen by the same times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.autocast import without_autocast
from . import library, prepacked, tuner
from .lowrank import ACTIVATIONS, Geometry, lowrank_pack
from .lowrank_limits import cpu_cannot

__all__ = ["DENSE", "ONE_KERNEL", "PREPACKED", "TWO_STEPS", "Call", "Run", "fastest", "fastest_compiled", "function",
           "one_kernel", "pack", "times", "ways"]  # fmt: skip

ONE_KERNEL, TWO_STEPS = "one kernel", "two steps"
PREPACKED, DENSE = "two steps, prepacked", "dense, prepacked"
OPAQUE = 1.05  # of a compiler's graph: what the C++ op must gain, into which nothing around it can be fused
FILL = 0.01  # value of the numbers that are multiplied to measure; times do not depend on it
LAST = torch.channels_last


class Call(NamedTuple):
    """What the time of a low-rank layer depends on, beside the machine and the number of threads."""

    x: tuple[int, ...]  # shape; of a linear layer's input two axes, whatever it has
    V: tuple[int, ...]
    U: tuple[int, ...]
    dtype: torch.dtype
    last: tuple[bool, bool]  # whether x and the weights are channels_last
    bias: bool
    residual: bool
    in_place: bool
    activation: str
    geometry: tuple | None  # stride, padding, dilation, groups, fold of a convolution

    def whole(self) -> Geometry | None:
        return Geometry(*self.geometry, self.activation) if self.geometry else None


def times(call: Call) -> tuner.Times:
    """Milliseconds of the ways to run this call; empty if there is only one."""
    some = ways(call)
    if len(some) < 2:
        return {}
    key = f"{torch.get_num_threads()} threads, {', '.join(some)}: {tuple(call)}"
    with torch.inference_mode(), without_autocast():
        return tuner.times(key, partial(_calls, call, some))


def fastest(call: Call) -> str:
    """The fastest way to run this call; two steps if there is no other."""
    found = times(call)
    return min(found, key=found.__getitem__, default=TWO_STEPS)


@torch.compiler.assume_constant_result  # measured while the graph is traced, where the call is a constant
def fastest_compiled(*call: object) -> str:
    """The fastest way in a graph for a compiler: one kernel, two steps, or dense; "" if nothing is measured."""
    if not tuner.enabled():
        return ""
    call = Call(*call)
    # Freezing prepacks what oneDNN runs, with the activation in it; MKL runs linear layers in fp32.
    by_mkl = call.geometry is None and call.dtype is torch.float32 and torch.backends.mkl.is_available()
    frozen = torch._inductor.config.freezing and not by_mkl and PREPACKED in ways(call)
    found = dict(times(call._replace(activation="none") if frozen else call))
    packed, dense = found.pop(PREPACKED, None), found.pop(DENSE, None)
    if frozen:
        found |= {TWO_STEPS: packed, DENSE: dense}
    if ONE_KERNEL in found:
        found[ONE_KERNEL] *= OPAQUE
    return min(found, key=found.__getitem__, default=TWO_STEPS)


def ways(call: Call) -> list[str]:
    """The ways that the arguments permit on this machine."""
    geometry = call.whole()
    kernel = not (library.missing or cpu_cannot(call.dtype, len(call.V), geometry.fold if geometry else "paper"))
    packs = not prepacked.why_not(call.dtype, call.V, call.U, geometry)
    return [ONE_KERNEL] * kernel + [TWO_STEPS] + [PREPACKED, DENSE] * packs


# --- the ways as functions --------------------------------------------------------------------------------------------

Run = Callable[..., Tensor]  # run(x, V, U, bias, residual, packed)


def pack(
    way: str, V: Tensor, U: Tensor, geometry: Geometry | None, product: Callable[[], Tensor]
) -> Tensor | list | None:
    """The weights as this way wants them beside V and U; ``product``: makes the dense weight."""
    if way == ONE_KERNEL:
        return lowrank_pack(V, U, geometry.groups if geometry else 1)
    return None if way == TWO_STEPS else prepacked.pack((V, U) if way == PREPACKED else (product(),), geometry)


def function(way: str, call: Call) -> Run:
    """The function that runs this call: what does not change from call to call is computed here."""
    geometry, act = call.whole(), call.activation
    if way == ONE_KERNEL:
        return one_kernel(geometry or (act,), call.in_place and geometry is not None)
    if way == TWO_STEPS:
        return _two_convolutions(geometry) if geometry else _two_linears(ACTIVATIONS[act])
    last = LAST if any(call.last) else torch.contiguous_format
    count = 2 if way == PREPACKED else 1
    layers = prepacked.convolutions(count, geometry, call.in_place, last) if geometry else prepacked.linears(act)
    return lambda x, V, U, bias, residual, packed: layers(x, bias, residual, packed)


def one_kernel(rest: Sequence, over: bool) -> Run:
    """The fused op; ``rest``: its arguments after ``packed``; ``over``: whether it writes over the residual."""
    ops = torch.ops.compaware
    op = ops.lowrank_conv2d if len(rest) > 1 else ops.lowrank_linear

    def run_over(
        x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor, packed: Tensor | None
    ) -> Tensor:
        ops.lowrank_conv2d_(x, V, U, bias, residual, packed, *rest)
        return residual

    return run_over if over else lambda *args: op(*args, *rest)


def _two_convolutions(geometry: Geometry) -> Run:
    first, second = ((*part, geometry.groups) for part in geometry.parts())
    activation = ACTIVATIONS[geometry.activation]

    def run(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, _: None) -> Tensor:
        y = torch.conv2d(torch.conv2d(x, V, None, *first), U, bias, *second)
        return activation(y if residual is None else y + residual)

    return run


def _two_linears(activation: Callable[[Tensor], Tensor]) -> Run:
    def run(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, _: None) -> Tensor:
        y = F.linear(F.linear(x, V), U, bias)
        return activation(y if residual is None else y + residual)

    return run


# --- what is timed ----------------------------------------------------------------------------------------------------


def _calls(call: Call, some: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    """A call in each way, on numbers of no meaning."""

    def made(shape: Sequence[int], last: bool) -> Tensor:
        A = torch.full(shape, FILL, dtype=call.dtype)
        return A.contiguous(memory_format=LAST) if last and A.ndim == 4 else A

    geometry, (x_last, last) = call.whole(), call.last
    x, V, U = made(call.x, x_last), made(call.V, last), made(call.U, last)
    W = (U.shape[0], V.shape[1], *(a * b for a, b in zip(V.shape[2:], U.shape[2:], strict=True)))
    bias = made(U.shape[:1], False) if call.bias else None
    residual, found = None, {}
    if call.residual:
        residual = made(function(TWO_STEPS, call)(x, V, U, bias, None, None).shape, x_last or last)
    for way in some:
        packed = pack(way, V, U, geometry, lambda: made(W, last))
        found[way] = partial(function(way, call), x, V, U, bias, residual, packed)
    return found
