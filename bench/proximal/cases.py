"""Cases of the SVT benchmarks: shapes and ranks of layers, regimes, the fp64 truth, and floors of the time."""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import compaware_kernels as ck
from bench.common import workloads
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.ops.linalg import product

TAU = 1.0
WIDE = 1500  # no SVD of a wider matrix for its truth

CASES = {  # layer shapes, and the rank or its share of the full rank
    "lenet": (workloads.lenet(), 0.125),
    "demo network": ([tuple(W.flatten(1).shape) for W in small_convnet().parameters() if W.ndim > 1], 0.125),
    "resnet18": (workloads.resnet18(), 0.125),
    "resnet50": (workloads.resnet50(), 0.125),
    "resnet50, rank 6%": (workloads.resnet50(), 0.0625),
    "vit_b": (workloads.vit_b(), 0.125),
    "4096 x 4096, rank 64": ([(4096, 4096)], 64),
    "11008 x 4096, rank 64": ([(11008, 4096)], 64),
    **{f"1000 of {n} x {n}": (workloads.small(n), 0.25) for n in (16, 32, 64)},
}


@dataclass
class Drifted:
    """Weights that drifted since the last call, that call with its state and without, and its results and ranks."""

    weights: list[Tensor]
    calls: dict[str, Callable]  # "warm", "cold": weights -> reports, in place
    previous: list[Tensor]
    ranks: list[int]


def svt_(weights: list[Tensor], state: ck.WarmState | None) -> list[ck.SvtInfo]:
    return ck.svt_(weights, TAU, state=state, fold=None)


def drifted(
    shapes: list[tuple[int, int]], share: float | int, call: Callable = svt_, directions: int | None = None
) -> Drifted:
    """Drift in so many directions (default: all) since the last of two calls ``call(weights, state)``."""
    torch.manual_seed(0)
    bases, state = workloads.low_rank(shapes, share), ck.WarmState()
    weights = workloads.drifted(workloads.shrunk(bases), bases, directions)
    for _ in range(2):
        infos, previous = call(weights, state), weights
        weights = workloads.drifted(weights, bases, directions)
    saved = copy.deepcopy(state.state_dict())

    def warm(Ws):
        state.load_state_dict(saved)
        return call(Ws, state)

    ranks = [int(info.rank.max()) for info in infos]
    return Drifted(weights, {"warm": warm, "cold": lambda Ws: call(Ws, None)}, previous, ranks)


def full_rank(shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Gaussian weights, all of whose singular values exceed TAU."""
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes]
    return [
        1.5 * W / torch.linalg.svdvals(W)[-1] if min(W.shape) > 40 else W + 3 * torch.eye(*W.shape) for W in weights
    ]


def one_batch(Ws: list[Tensor]) -> list[ck.SvtInfo]:
    """svt_ of layers of equal shape as one batch."""
    X = torch.stack(Ws)
    (info,) = ck.svt_([X], TAU, fold=None)
    torch._foreach_copy_(Ws, X.unbind())
    parts = zip(info.rank, info.s, info.error_bound, strict=True)
    return [ck.SvtInfo(*part, info.method, info.reason) for part in parts]


def truth(W: Tensor, rank: int | None = None) -> Tensor:
    """SVT of W in fp64: by an SVD, or of a wide matrix of this rank by subspace iteration until nothing changes."""
    X = W.double()
    if rank is None or min(W.shape) < WIDE / 4:
        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
        return (U * (s - TAU).clamp_min(0)) @ Vh
    V, last = torch.randn(X.shape[1], min(rank + 64, *X.shape), dtype=X.dtype, device=X.device), None
    for _ in range(60):
        V = torch.linalg.qr(X.mT @ torch.linalg.qr(X @ V).Q).Q
        U, s, Qh = torch.linalg.svd(X @ V, full_matrices=False)
        kept = (s - TAU).clamp_min(0)
        if last is not None and float((kept - last).abs().max()) < 1e-9:
            break
        last = kept
    return (U * kept) @ (V @ Qh.mT).mT


def product_rate(columns: int = 128, dtype: torch.dtype = torch.float32) -> float:
    """Flops per second of our product of a large matrix with so many columns."""
    A, B = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, columns, dtype=dtype)
    return 2 * A.numel() * columns / min(workloads.seconds(lambda: product(A, B)) for _ in range(20))


def own_floor(weights: Iterable[Tensor], infos: Iterable[ck.SvtInfo]) -> float:
    """Milliseconds of the products with the weights that were made, and of writing the results, at product_rate()."""
    flops = 0
    for W, info in zip(weights, infos, strict=True):
        found = re.search(r"(\d+) products", info.reason)
        columns = int(found[1]) if found and info.method.startswith("subspace") else 2 * min(W.shape)
        flops += 2 * W.numel() * (columns + rank_of(W, info))
    return 1e3 * flops / product_rate()


def rank_floor(weights: Iterable[Tensor], infos: Iterable[ck.SvtInfo], rate: float) -> float:
    """Milliseconds of three products of each weight with as many columns as its rank, at so many flops per second."""
    return 1e3 * sum(6 * W.numel() * rank_of(W, info) for W, info in zip(weights, infos, strict=True)) / rate


def rank_of(W: Tensor, info: ck.SvtInfo) -> int:
    """Rank of the result, but at most half the full one: beyond, products with a square matrix are cheaper."""
    return min(int(info.rank.max()), min(W.shape) // 2)
