"""Whole networks for the inference benchmark: dense, and with all layers but the stem and the classifier factorized."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import compaware_kernels as ck
from bench.common import networks
from compaware_kernels.nn.lowrank import LowRank

DENSE, TWO_STEP, COMPILED, OURS = "dense", "two-step, folded", "two-step, compiled", "ours, fused"
NETWORKS = ("resnet18", "resnet50", "vgg16", "mobilenet", "bert")
BATCHES = (1, 8)
TOLERANCE = 1e3 * torch.finfo(torch.float32).eps  # relative to the largest output: that of ck.fuse


def quarter(s: Tensor) -> int:
    """Rank rule: a quarter of the full rank."""
    return max(8, s.shape[-1] // 4)


def build(name: str, batch: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """(Dense network, low-rank network, input.)"""
    torch.manual_seed(0)
    dense = getattr(networks, name)()
    x = torch.randn(batch, 128, 768) if name == "bert" else torch.randn(batch, 3, 224, 224)
    calibrate(dense, x)
    layers = [name for name, module in dense.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    small = compress(dense, x, skip=[] if name == "bert" else [layers[0], layers[-1]])
    calibrate(small, x)
    return dense, small, x


def compress(model: nn.Module, x: Tensor, skip: list[str]) -> nn.Module:
    """Network with all layers factorized, also those that do not get faster."""
    return ck.compress(model, quarter, (x,), goal="size", skip=skip)[0]


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Batch norms with random scales and statistics of x: activations keep their size, so that an error anywhere
    shows."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.2)
        norm.momentum = None  # averages the statistics of all inputs
        norm.reset_running_stats()
    model.train()
    model(x if len(x) > 1 or not norms else torch.randn(4, *x.shape[1:]))
    model.eval()


def rows(dense: nn.Module, small: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Implementations by name, each a model of its own, in channels_last unless the name says NCHW."""
    two_step = ck.fuse(ck.to_plain(small), (x,))
    ours, folded = ck.fuse(small, (x,)), ck.fuse(dense, (x,))
    found = {"dense NCHW": bind(copy.deepcopy(dense), x)} if x.ndim == 4 else {}
    if x.ndim == 4:
        dense, x = dense.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    found |= {DENSE: bind(dense, x), "dense, folded": bind(folded, x)}
    found["dense, compiled"] = bind(compiled(dense), x)
    found |= {TWO_STEP: bind(two_step, x), COMPILED: bind(compiled(two_step), x)}
    return found | {OURS: bind(ours, x), "ours, compiled": bind(compiled(ours), x)}


def bind(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x)


def compiled(model: nn.Module) -> nn.Module:
    """Model compiled for this batch, weights as constants (``torch._inductor.config.freezing`` must be on)."""
    return torch.compile(copy.deepcopy(model), dynamic=False)


@torch.inference_mode()
def verdicts(dense: nn.Module, small: nn.Module, x: Tensor, outputs: dict[str, Tensor]):
    """By name: the largest error against the network in fp64, relative to its largest output, and whether it meets the
    tolerance."""
    truths = {model: copy.deepcopy(model).double()(x.double()) for model in (dense, small)}
    found = {}
    for name, y in outputs.items():
        truth = truths[dense if name.startswith("dense") else small]
        error = float((y - truth).abs().max() / truth.abs().max())
        found[name] = error, error <= TOLERANCE
    return found


def low_rank_layers(model: nn.Module) -> int:
    return sum(isinstance(module, LowRank) for module in model.modules())
