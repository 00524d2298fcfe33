"""Single layers for the inference benchmark: shapes, implementations (two factors, dense, two layers of torch),
checks."""

import copy
import math
import os
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compaware_kernels as ck
from bench.common import networks

# Optional (pip install --no-deps tensorly-torch tensorly): 0.5.0 with tensorly 0.10.0 runs on torch 2.13.
try:
    import tltorch
except ImportError:
    tltorch = None

OURS, DENSE, TWO_STEP, TENSORLY = "ours", "dense", "two-step", "tensorly"
OTHER = ", other"  # NCHW; for linear layers: as 1x1 convolutions, which torch runs in another library
ROWS = (DENSE, DENSE + OTHER, TWO_STEP, TWO_STEP + OTHER, TENSORLY, OURS)
BATCHES, SHARES = (1, 8, 32), {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2}
THREADS = [int(n) for n in os.environ.get("BENCH_THREADS", "1,2").split(",") if int(n) <= (os.cpu_count() or 1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative to the largest output


class Layer(NamedTuple):
    """Convolution C -> O with kernel k x k on H x H pixels; k = 0: a linear layer on H tokens."""

    C: int
    O: int
    k: int
    H: int
    stride: int = 1

    @property
    def kind(self) -> str:
        return f"{self.k} x {self.k}" if self.k else "linear"

    def __str__(self) -> str:
        size = f"{self.H} x {self.H}" + ("" if self.stride == 1 else f" / {self.stride}")
        return f"{self.kind}, {self.C} -> {self.O}, " + (size if self.k else f"{self.H} tokens")

    def rank(self, share: float) -> int:
        return max(8, round(share * min(self.O, self.C * max(1, self.k) ** 2)))

    def pixels(self, batch: int) -> int:
        """Number of output pixels (or tokens) of a batch."""
        return batch * math.ceil(self.H / self.stride) ** 2

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, self.C, self.H, self.H) if self.k else torch.randn(batch, self.H, self.C)

    def low_rank(self, rank: int) -> nn.Module:
        if not self.k:
            return ck.LowRankLinear(self.C, self.O, rank).eval()
        return ck.LowRankConv2d(self.C, self.O, self.k, rank, self.stride, self.k // 2).eval()


class Case(NamedTuple):
    layer: Layer
    batch: int
    share: str
    threads: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = ", bf16" if self.dtype is torch.bfloat16 else ""
        return f"{self.layer}, batch {self.batch}, r = {self.share}, {self.threads} threads{dtype}"


# --- shapes -----------------------------------------------------------------------------------------------------------

LINEAR = [Layer(C, O, 0, tokens) for C, O in ((768, 768), (768, 3072), (3072, 768)) for tokens in (16, 128, 1024)]
CHOSEN = [  # ResNets, VGG-16, MobileNetV2, BERT
    *(Layer(C, C, 3, H) for C, H in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(Layer(C, C, 3, H) for C, H in ((128, 112), (512, 28))),
    *(Layer(C, O, 1, H) for C, O, H in ((64, 256, 56), (256, 64, 56), (1024, 256, 14), (512, 2048, 7))),
    *(Layer(C, O, 1, H) for C, O, H in ((24, 144, 56), (96, 576, 14), (960, 160, 7))),
    *(Layer(C, O, 0, 128) for C, O in ((768, 768), (768, 3072), (3072, 768))),
    *(Layer(768, 3072, 0, tokens) for tokens in (16, 1024)),
]


def cases() -> list[Case]:
    """The layers, batches, ranks and threads to measure: a fixed selection, or all of them with BENCH_GRID=whole.

    Of these, the ones that match BENCH_ONLY, a regular expression: "^3 x 3.*batch 8.*1 threads".
    """
    layers = [*convolutions(), *LINEAR] if os.environ.get("BENCH_GRID") == "whole" else CHOSEN
    cases = [Case(*case) for case in product(layers, BATCHES, SHARES, THREADS)]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        cases += [Case(layer, batch, "1/4", THREADS[-1], torch.bfloat16) for layer in CHOSEN[::2] for batch in (1, 8)]
    return [case for case in cases if re.search(os.environ.get("BENCH_ONLY", ""), str(case))]


def convolutions() -> list[Layer]:
    """Shapes of the networks' 3x3 convolutions with stride 1 and of their 1x1 convolutions; stems and depthwise
    convolutions are left out."""
    found = {}

    def note(conv, args, y):
        layer = Layer(conv.in_channels, conv.out_channels, conv.kernel_size[0], args[0].shape[-1], conv.stride[0])
        if conv.groups == 1 and conv.in_channels > 3 and (layer.k == 1 or layer.stride == 1):
            found[layer] = None

    for network in (networks.resnet18, networks.resnet50, networks.vgg16, networks.mobilenet):
        with torch.device("meta"):
            model = network().eval()
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(note)
            model(torch.empty(1, 3, 224, 224))
    return sorted(found, key=lambda layer: -layer.k)


# --- implementations --------------------------------------------------------------------------------------------------


def rows(layer: Layer, ours: nn.Module, x: Tensor) -> tuple[dict[str, Callable[[], Tensor]], nn.Module | None]:
    """(Implementations by name, tensorly-torch's layer or None.)

    Each has weights of its own, in channels_last unless its name ends in OTHER.
    """
    found, peer = {}, None
    x_last = x.contiguous(memory_format=torch.channels_last) if layer.k else x
    for name, model in ((DENSE, ours.to_dense()), (TWO_STEP, ours.to_sequential())):
        found[name] = bind(channels_last(model), x_last)
        found[name + OTHER] = bind(copy.deepcopy(model) if layer.k else AsConvolutions(model), x)
    if layer.k and tltorch and x.dtype is torch.float32:
        peer = tensorly(layer, ours.rank)
        found[TENSORLY] = bind(peer, x)
    return found | {OURS: bind(channels_last(ours) if layer.k else ours, x_last)}, peer


def channels_last(model: nn.Module) -> nn.Module:
    """Copy of the model in channels_last."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


class AsConvolutions(nn.Module):
    """Linear layers as 1x1 convolutions of an image one pixel wide: ``[N, T, C]`` is that image in channels_last."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.convs = nn.Sequential()
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            conv = nn.Conv2d(linear.in_features, linear.out_features, 1, dtype=linear.weight.dtype)
            conv.weight, conv.bias = nn.Parameter(linear.weight[..., None, None]), linear.bias
            self.convs.append(channels_last(conv))

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x.unsqueeze(2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).squeeze(2)


def bind(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model.eval()
    return partial(nn.Module.__call__, model, x)


def way(model: nn.Module, x: Tensor) -> str:
    """How our layer runs on x."""
    return model.why_two_step(x).partition(":")[0] or "one kernel"


def tensorly(layer: Layer, rank: int) -> nn.Module:
    """A 1x1 convolution in CP form, the same two factors; a k x k one, for lack of that form, in Tucker form of equal
    size."""
    form, kernel, channels = "cp", layer.k**2, layer.C + layer.O
    if layer.k > 1:
        weights = rank * (layer.C * kernel + layer.O)
        both = round((-channels + (channels**2 + 4 * kernel * weights) ** 0.5) / (2 * kernel))
        form, rank = "tucker", (min(both, layer.O), min(both, layer.C), layer.k, layer.k)
    conv = tltorch.FactorizedConv(
        layer.C, layer.O, (layer.k, layer.k), factorization=form, rank=rank, implementation="factorized",
        stride=layer.stride, padding=layer.k // 2, bias=True,
    )  # fmt: skip
    conv.reset_parameters(std=0.1)
    return conv


# --- correctness ------------------------------------------------------------------------------------------------------


def samples(layer: Layer, x: Tensor, count: int = 256) -> tuple[tuple, Tensor]:
    """(Indices of sampled outputs, corners of the first and last image included; the input patch of each.)"""
    k, s = max(1, layer.k), layer.stride
    sizes = (len(x), layer.H) if not layer.k else (len(x), *[(layer.H - 1) // s + 1] * 2)
    corners = torch.tensor(list(product(*((0, n - 1) for n in sizes)))).T
    at = [torch.cat([torch.randint(n, (count,)), ends]) for n, ends in zip(sizes, corners, strict=True)]
    if not layer.k:
        return tuple(at), x[tuple(at)]
    windows = F.pad(x, [k // 2] * 4).unfold(2, k, s).unfold(3, k, s)
    index = (at[0], slice(None), at[1], at[2])
    return index, windows[index].flatten(1)


def verdicts(layer: Layer, ours: nn.Module, peer: nn.Module | None, x: Tensor, outputs: dict[str, Tensor]):
    """By name: the largest error against fp64, relative to the largest output, and whether it meets the tolerance.

    Ours must also keep the error bound that its documentation promises, and agree with the dense layer everywhere.
    """
    at, patches = samples(layer, x)
    V, U = (factor.weight.double().flatten(1) for factor in (ours.first, ours.second))
    truths = dict.fromkeys(outputs, patches.double() @ V.T @ U.T + ours.bias.double())
    if peer:
        truths[TENSORLY] = patches.double() @ peer.weight.to_tensor().double().flatten(1).T + peer.bias.double()
    errors = {
        name: float((outputs[name][at] - truth).abs().max() / truth.abs().max()) for name, truth in truths.items()
    }
    tolerance, eps = TOLERANCE[x.dtype], torch.finfo(x.dtype).eps
    ok = {name: error <= tolerance for name, error in errors.items()}
    apart = float((outputs[OURS] - outputs[DENSE]).abs().max() / outputs[DENSE].abs().max())
    ok[OURS] &= errors[OURS] <= 2 * errors[TWO_STEP] + 8 * eps and apart <= 2 * tolerance
    return {name: (errors[name], ok[name]) for name in outputs}


def speedup(result: dict[str, dict], others: tuple[str, ...], name: str = OURS) -> float | None:
    """Speed-up over the fastest correct one of ``others``; None if all of them or ours are wrong."""
    right = {who: row["ms"] for who, row in result.items() if row["ok"]}
    others = [ms for who, ms in right.items() if who in others]
    return min(others) / right[name] if others and name in right else None
