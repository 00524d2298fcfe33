"""Latency model: predicted (roofline) or measured time of dense and low-rank layers on a device.

``seconds = overhead + max(multiply-adds / rate, bytes / bandwidth)``. Rate, bandwidth and overheads are measured on the
device at first use, in a second: the fastest of probes so short that other programs on the machine leave some of them
alone. A low-rank layer in one kernel has one overhead and moves its input, output and weights once; in two steps it has
two, and writes and reads the intermediate; where a layer measures which is faster, the faster counts. Output columns
are rounded up to multiples of 16, and each tap of the CPU kernel costs as much as 8 channels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle

import torch
from torch import Tensor, nn

from .._utils.eval_mode import layer_by_layer
from ..nn.conv import LowRankConv2d
from ..nn.lowrank import LowRank
from ..nn.registry import low_rank_type
from ..ops.lowrank_ways import ONE_KERNEL
from .arguments import ExampleInputs, Inputs

__all__ = ["Device", "choose", "fastest", "measure", "measure_device", "predict", "record", "recording",
           "seconds", "times"]  # fmt: skip

PREDICTED, MEASURED = 1.25, 1.05  # least speed-up for which a layer is factorized
COLUMNS, TAP = 16, 8  # output columns per vector block; cost of a kernel tap, in channels
ROUNDS, MOST, SECONDS = 7, 50, 0.2  # of a measurement: least and most rounds, and target time
PROBES = 3  # of the device, of which the fastest counts


@dataclass(frozen=True)
class Device:
    """Device parameters of the latency model.

    Attributes:
        rate: multiply-adds per second.  bandwidth: bytes per second.
        dense, low_rank: overhead, seconds of a call on a minimal input.
    """

    rate: float
    bandwidth: float
    dense: float
    low_rank: float


def seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Least seconds of each call, in interleaved rounds: other programs on the machine change it less than a mean."""
    return [min(taken) for taken in times(calls, device)]


def times(calls: Sequence[Callable[[], object]], device: torch.device) -> list[list[float]]:
    """Seconds of each call in each round, interleaved, so that changes of machine speed affect all alike."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(found[0]) < ROUNDS + 2 or (time.perf_counter() - start < SECONDS and len(found[0]) < MOST):
        for call, taken in zip(calls, found, strict=True):
            sync()
            begin = time.perf_counter()
            call()
            sync()
            taken.append(time.perf_counter() - begin)
    return [taken[2:] for taken in found]


@cache
def measure_device(device: torch.device, dtype: torch.dtype, threads: int) -> Device:
    """Measure the latency model's parameters of a device, once per dtype and number of threads."""
    place, last = {"device": device, "dtype": dtype}, torch.channels_last
    with torch.inference_mode():
        conv = nn.Conv2d(128, 128, 3, padding=1, **place).to(memory_format=last)
        size, part = ((threads, 128, 20, 20), 2**21) if device.type == "cpu" else ((4, 128, 28, 28), 2**23)
        x = torch.randn(size, **place).to(memory_format=last)
        source, target = (torch.zeros(2**23, **place).split(part) for _ in range(2))
        parts = (a.copy_(b) for a, b in cycle(zip(target, source, strict=True)))  # in turn, so that no cache has them
        dense, tiny = nn.Conv2d(16, 16, 1, **place).eval(), torch.zeros(1, 16, 1, 1, **place)
        low_rank = LowRankConv2d.like(dense, 8).eval()
        macs, moved = conv.weight.numel() * x[:, 0].numel(), _bytes(source[0], 2 * source[0].numel())
        probes = [
            [*seconds((lambda: conv(x), lambda: next(parts)), device),
             *seconds((lambda: dense(tiny), lambda: low_rank(tiny)), device)]
            for _ in range(PROBES)
        ]  # fmt: skip
    computed, copied, *overheads = map(min, zip(*probes, strict=True))
    return Device(macs / computed, moved / copied, *overheads)


def predict(layer: nn.Module, x: Tensor, y: Tensor) -> float:
    """Predicted seconds of one call of a dense or low-rank layer with input ``x`` and output ``y``."""
    device, groups = measure_device(x.device, x.dtype, torch.get_num_threads()), getattr(layer, "groups", 1)
    pixels = y.numel() / _outputs(layer)

    def step(weight: Tensor, moved: float) -> float:
        macs = pixels * _columns(weight, groups) * weight[0].numel()
        return max(macs / device.rate, _bytes(x, moved + weight.numel()) / device.bandwidth)

    if not isinstance(layer, LowRank):
        return device.dense + step(layer.weight, x.numel() + y.numel())
    V, U = layer.first.weight, layer.second.weight
    with torch.no_grad():
        ways = layer.ways(x)
    middle = pixels * V.shape[0]
    found = (
        [2 * device.dense + step(V, x.numel() + middle) + step(U, middle + y.numel())] if ways != [ONE_KERNEL] else []
    )
    if ONE_KERNEL in ways:
        depth = V[0].numel() + TAP * V[0, 0].numel()
        macs = pixels * (_columns(V, groups) * depth + _columns(U, groups) * U[0].numel())
        moved = _bytes(x, x.numel() + y.numel() + V.numel() + U.numel())
        found.append(device.low_rank + max(macs / device.rate, moved / device.bandwidth))
    return min(found)


def _columns(weight: Tensor, groups: int) -> int:
    """Output channels, rounded up per group to a multiple of the vector block."""
    return groups * math.ceil(weight.shape[0] / groups / COLUMNS) * COLUMNS


def _bytes(like: Tensor, numbers: float) -> float:
    return numbers * like.element_size()


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if hasattr(layer, "out_features") else layer.out_channels


_measured: dict[tuple, list[float]] = {}  # device, threads, input and layers -> seconds


def measure(layers: Sequence[nn.Module], x: Tensor) -> list[float]:
    """Least seconds of one call of each layer on ``x``; cached by device, threads, layers and input layout."""
    key = (x.device, torch.get_num_threads(), x.dtype, x.shape, x.stride(), *(repr(layer) for layer in layers))
    if key not in _measured:
        with torch.inference_mode():
            _measured[key] = seconds([lambda layer=layer: layer(x) for layer in layers], x.device)
    return _measured[key]


def choose(
    dense: nn.Module, candidates: Sequence[tuple[str, int]], x: Tensor, y: Tensor, measured: bool
) -> tuple[tuple[str, int] | None, float, str]:
    """The fastest candidate (fold, rank), if its speed-up over the dense layer is large enough (1.25x; measured 1.05x).

    Returns:
        the candidate, or None; its speed-up (dense time / its time); and the reason as text.
    """
    layers = [dense, *(low_rank_type(dense).like(dense, rank, fold) for fold, rank in candidates)]
    if measured:
        taken = measure([copy.deepcopy(dense).eval(), *(layer.eval() for layer in layers[1:])], x)
    else:  # no weights are packed for that
        taken = [predict(layer, x, y) for layer in layers]
    best = min(range(len(candidates)), key=lambda i: taken[1 + i])
    gain, how, wanted = taken[0] / taken[1 + best], *(("measured", MEASURED) if measured else ("predicted", PREDICTED))
    if gain >= wanted:
        return candidates[best], gain, f"{gain:.2g}x {how}"
    fold, rank = candidates[best]
    return None, gain, f"rank {rank}, fold {fold}, would be {gain:.2g}x as fast ({how}; {wanted}x is wanted)"


def fastest(models: Sequence[nn.Module], inputs: ExampleInputs | Inputs) -> int:
    """Index of the fastest model; 0 unless another is faster by more than noise (1.05x)."""
    inputs = Inputs.of(inputs)
    with torch.inference_mode():
        taken = seconds([lambda model=model: inputs.run(model) for model in models], inputs.device())
    best = min(range(len(models)), key=taken.__getitem__)
    return best if taken[0] > MEASURED * taken[best] else 0


def record(model: nn.Module, names: Sequence[str], inputs: ExampleInputs | Inputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each named layer in one forward pass; of several calls of a layer, the first."""
    with recording(model, names) as seen, layer_by_layer(model), torch.no_grad():
        Inputs.of(inputs).cloned().run(model)
    return seen


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Records the input and output of each named layer in the model's first run within the context."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        seen.setdefault(name, (args[0] if args else kwargs["input"], y))

    handles = [model.get_submodule(name).register_forward_hook(partial(keep, name), with_kwargs=True) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
