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
from torch import Tensor

from .._utils.autocast import without_autocast
from . import library, prepacked, tuner
from .lowrank import Geometry, lowrank_pack, two_convolutions, two_linears
from .lowrank_limits import cpu_cannot

__all__ = ["DENSE", "ONE_KERNEL", "PREPACKED", "TWO_STEPS", "Call", "fastest", "fastest_compiled", "one_kernel",
           "times"]  # fmt: skip

ONE_KERNEL, TWO_STEPS = "one kernel", "two steps"
PREPACKED, DENSE = "two steps, prepacked", "dense, prepacked"
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
    ways = _ways(call)
    if len(ways) < 2:
        return {}
    key = f"{torch.get_num_threads()} threads, {', '.join(ways)}: {tuple(call)}"
    with torch.inference_mode(), without_autocast():
        return tuner.times(key, partial(_calls, call, ways))


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
    found = dict(times(call))
    packed, dense = found.pop(PREPACKED, None), found.pop(DENSE, None)
    # Freezing gives fp32 linear layers to MKL, as layers of torch do, and all others to oneDNN.
    by_mkl = call.geometry is None and call.dtype is torch.float32 and torch.backends.mkl.is_available()
    if torch._inductor.config.freezing and packed and dense and not by_mkl:
        found |= {TWO_STEPS: packed, DENSE: dense}
    return min(found, key=found.__getitem__, default=TWO_STEPS)


def _ways(call: Call) -> list[str]:
    """The ways that the arguments permit on this machine."""
    geometry = call.whole()
    kernel = not (library.missing or cpu_cannot(call.dtype, len(call.V), geometry.fold if geometry else "paper"))
    packs = not prepacked.why_not(call.dtype, call.V, call.U, geometry)
    return [ONE_KERNEL] * kernel + [TWO_STEPS] + [PREPACKED, DENSE] * packs


def one_kernel(
    x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, residual: Tensor | None, packed: Tensor | None,
    rest: Sequence, in_place: bool,
) -> Tensor:  # fmt: skip
    """The fused op; ``rest``: its arguments after ``packed``. ``in_place``: written over the residual of a
    convolution."""
    ops = torch.ops.compaware
    if V.ndim == 2:
        return ops.lowrank_linear(x, V, U, bias, residual, packed, *rest)
    if residual is None or not in_place:
        return ops.lowrank_conv2d(x, V, U, bias, residual, packed, *rest)
    ops.lowrank_conv2d_(x, V, U, bias, residual, packed, *rest)
    return residual


# --- what is timed ----------------------------------------------------------------------------------------------------


def _calls(call: Call, ways: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    """A call in each way, on numbers of no meaning."""

    def made(shape: Sequence[int], last: bool) -> Tensor:
        A = torch.full(shape, FILL, dtype=call.dtype)
        return A.contiguous(memory_format=LAST) if last and A.ndim == 4 else A

    geometry, act, (x_last, last) = call.whole(), call.activation, call.last
    rest, two_steps = (geometry, two_convolutions) if geometry else ((act,), two_linears)
    x, V, U, bias = made(call.x, x_last), made(call.V, last), made(call.U, last), None
    W = (U.shape[0], V.shape[1], *(a * b for a, b in zip(V.shape[2:], U.shape[2:], strict=True)))
    if call.bias:
        bias = made(U.shape[:1], False)
    wanted = LAST if x_last or last else torch.contiguous_format
    residual = made(two_steps(x, V, U, bias, None, *rest).shape, x_last or last) if call.residual else None

    def packed(*weights: Tensor) -> Callable[[], Tensor]:
        return partial(prepacked.Prepacked(weights, geometry), x, bias, residual, act, call.in_place, wanted)

    found = {TWO_STEPS: partial(two_steps, x, V, U, bias, residual, *rest)}
    if ONE_KERNEL in ways:
        hint = lowrank_pack(V, U, geometry.groups if geometry else 1)
        found[ONE_KERNEL] = partial(one_kernel, x, V, U, bias, residual, hint, rest, call.in_place)
    if PREPACKED in ways:
        found |= {PREPACKED: packed(V, U), DENSE: packed(made(W, last))}
    return found
