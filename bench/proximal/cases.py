"""Cases of the SVT benchmarks: the layer shapes of a network, the rank of its weights, and the regimes of a call."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

import compaware_kernels as ck
from bench.common import workloads
from compaware_kernels.ops.linalg import product

TAU = 1.0

CASES = {  # layer shapes, and the rank or its share of the full rank
    "lenet": (workloads.lenet(), 0.125),
    "resnet18": (workloads.resnet18(), 0.125),
    "resnet50": (workloads.resnet50(), 0.125),
    "resnet50, rank 6%": (workloads.resnet50(), 0.0625),
    "vit_b": (workloads.vit_b(), 0.125),
    "4096 x 4096, rank 64": ([(4096, 4096)], 64),
    "11008 x 4096, rank 64": ([(11008, 4096)], 64),
    **{f"1000 of {n} x {n}": (workloads.small(n), 0.25) for n in (16, 32, 64)},
}


def shrink(weights: list[Tensor], state: ck.WarmState | None) -> list[ck.SvtInfo]:
    return ck.svt_(weights, TAU, state=state, fold=None)


def regimes(shapes: list[tuple[int, int]], share: float | int, call: Callable = shrink) -> tuple[list[Tensor], dict]:
    """Weights that drifted since the last ``call(weights, state)``, and that call with its state, and without."""
    torch.manual_seed(0)
    bases, state = workloads.low_rank(shapes, share), ck.WarmState()
    weights = workloads.drifted(workloads.shrunk(bases), bases)
    for _ in range(2):
        call(weights, state)
        weights = workloads.drifted(weights, bases)
    saved = copy.deepcopy(state.state_dict())

    def warm(Ws):
        state.load_state_dict(saved)
        return call(Ws, state)

    return weights, {"warm": warm, "cold": lambda Ws: call(Ws, None)}


def full_rank(shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Gaussian weights, all of whose singular values exceed TAU."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes]
    return [
        1.5 * W / torch.linalg.svdvals(W)[-1] if min(W.shape) > 40 else W + 3 * torch.eye(*W.shape) for W in weights
    ]


def product_rate(columns: int = 128) -> float:
    """Flops per second of our fp32 product of a large matrix with so many columns."""
    A, B = torch.randn(2048, 2048), torch.randn(2048, columns)
    return 2 * A.numel() * columns / min(workloads.seconds(lambda: product(A, B)) for _ in range(20))
