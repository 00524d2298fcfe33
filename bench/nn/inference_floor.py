"""Lower bound of a layer's time on this machine: the longer of its bytes at the rate of a measured copy, and its
multiply-adds at the best rate measured."""

from functools import cache
from math import log2, prod

import torch
from torch import Tensor, nn

from bench.common import workloads
from compaware_kernels.nn.lowrank import LowRank

LAYERS = (LowRank, nn.Conv2d, nn.Linear)


def best(function, times: int) -> float:
    return min(workloads.seconds(function) for _ in range(times))


@cache
def flop_rate(threads: int) -> float:
    """Best flop/s measured, of a matrix product or a dense convolution, which run in different libraries.

    The torch threads must be set.
    """
    A, B = torch.randn(2, 2048, 2048)
    conv = nn.Conv2d(512, 512, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(32, 512, 14, 14).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        product = 2 * 2048**3 / best(lambda: A @ B, 10)
        return max(product, 2 * 32 * 14 * 14 * conv.weight.numel() / best(lambda: conv(x), 10))


@cache
def bandwidth(log_size: int, threads: int) -> float:
    """Bytes/s, read plus written, of a copy that moves 2^log_size bytes: from the cache if they fit."""
    source = torch.ones(2**log_size // 8)
    target = torch.ones_like(source)
    return 2**log_size / best(lambda: target.copy_(source), 30)


def floor(layer: nn.Module, x: Tensor, y: Tensor, threads: int) -> float:
    """Lower bound in milliseconds: the pixels needed and the weights are read once, the output is written once."""
    weights = [p for p in layer.parameters() if p.ndim > 1]
    unread = prod(max(1, s // k) for s, k in zip(layer.stride, layer.kernel_size, strict=True)) if x.ndim == 4 else 1
    size = 4 * (x.numel() // unread + y.numel() + sum(p.numel() for p in layer.parameters()))
    flops = 2 * y.numel() // len(weights[-1]) * sum(W.numel() for W in weights)
    return 1e3 * max(size / bandwidth(min(28, max(20, round(log2(size)))), threads), flops / flop_rate(threads))


def network_floor(model: nn.Module, x: Tensor, threads: int) -> float:
    """Sum of the lower bounds of all layers with weights, in milliseconds; other modules count as free."""
    total, handles = [], []
    factors = {part for module in model.modules() if isinstance(module, LowRank) for part in module.children()}
    for module in model.modules():
        if isinstance(module, LAYERS) and module not in factors:
            hook = module.register_forward_hook(lambda layer, args, y: total.append(floor(layer, args[0], y, threads)))
            handles.append(hook)
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return sum(total)


def measured() -> str:
    threads = torch.get_num_threads()
    rates = ", ".join(f"{bandwidth(n, threads) / 1e9:.0f} GB/s at {2**n >> 20} MiB" for n in (20, 24, 28))
    return f"floor, {threads} threads: {flop_rate(threads) / 1e9:.0f} Gflop/s; copies {rates}"
