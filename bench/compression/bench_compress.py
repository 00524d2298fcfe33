"""ck.compress of whole networks against a loop of torch.linalg.svd over the same matrices, and the cost of calibration.

ResNet-50 and a transformer encoder of 12 layers, 768 wide, fp32, with ``ck.ranks.energy(0.9)`` and both goals. Spectra
of the weights: ``random`` as torch initializes them, of full rank; ``slow``, ``sigma_i = i^-0.7``; ``drifted``, between
two proximal steps of a training (bench/common/workloads.py), of rank 1/8 and noise. ``compress`` is the whole call:
copies, multiply-adds, what the layers see, ranks, latency model, factors, new layers. The loop takes the thin SVD of
each matrix in fp32 and builds nothing. First, every rank is compared with that of singular values in fp64, and every
factorized layer's error with the least one.

Calibration: 64 inputs in batches of 16, once through the model alone, and once with the moments of all layers.
"""

from functools import partial

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from bench.common import networks, workloads
from compaware_kernels.compression.calibration import RIDGE, Calibration
from compaware_kernels.nn.discovery import Layer, foldable_layers

RULE = ck.ranks.energy(0.9)
NETWORKS = {
    "ResNet-50": (networks.resnet50, (3, 224, 224)),
    "12-layer encoder": (partial(networks.bert, 12), (128, 768)),
}
SPECTRA = ("random", "slow", "drifted")
LOST = 1e-3  # of the squared truncation error, as compaware_kernels/nn/truncation.py allows


def trained(model: nn.Module, spectrum: str) -> nn.Module:
    """The model with weights of this spectrum and of the norms that it had."""
    layers = foldable_layers(model)[0]
    shapes = [tuple(layer.matrix()[0].shape) for layer in layers]
    if spectrum == "drifted":
        bases = workloads.low_rank(shapes, 1 / 8)
        weights = workloads.drifted(workloads.shrunk(bases), bases)
    elif spectrum == "slow":
        bases = workloads.low_rank(shapes, 1.0)
        weights = [(U * torch.arange(1.0, U.shape[1] + 1) ** -0.7) @ V.mT for U, V in bases]
    else:
        return model
    for layer, W in zip(layers, weights, strict=True):
        layer.set_rows((W * (layer.rows.norm() / W.norm())).reshape(layer.rows.shape))
    return model


def correct(model: nn.Module, goal: str, x: torch.Tensor) -> tuple[int, bool]:
    """The number of factorized layers, and whether all ranks and errors are those of an SVD in fp64."""
    small, report = ck.compress(model, RULE, (x,), goal=goal)
    ok, count = True, 0
    for row in report.layers:
        M = Layer(row.name, model.get_submodule(row.name)).matrix().double()
        s = torch.linalg.svdvals(M if M.shape[1] >= M.shape[2] else M.mT)
        rank = RULE(s)
        if row.rank:
            M_r = Layer(row.name, ck.to_dense(small.get_submodule(row.name))).matrix().double()
            error, least = float((M - M_r).square().sum()), float(s[:, row.rank :].square().sum())
            rounded = rank if goal == "size" else -(-rank // 8) * 8
            ok &= row.rank in (rank, rounded) and error <= (1 + LOST) * least
            count += 1
        elif row.reason.startswith("rank "):
            ok &= int(row.reason.split()[1].strip(",")) in (rank, -(-rank // 8) * 8)
    return count, ok


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", NETWORKS)
def test_compress(compress_race, name, spectrum):
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model, x = trained(make().eval(), spectrum), torch.randn(1, *size)
    matrices = [layer.matrix()[0].detach() for layer in foldable_layers(model)[0]]

    def loop():
        for M in matrices:
            torch.linalg.svd(M, full_matrices=False)

    checks = {goal: correct(model, goal, x) for goal in ("speed", "size")}
    compress_race(
        f"{name}, {spectrum}",
        {"loop": loop} | {goal: partial(ck.compress, model, RULE, (x,), goal=goal) for goal in checks},
        {goal: (f"{count} of {len(matrices)} factorized", ok) for goal, (count, ok) in checks.items()},
    )
    assert all(ok for _, ok in checks.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_calibration(compress_race, name):
    """Moments of every layer; checked against the energies of the outputs in fp64 of one layer."""
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model, batches = make().eval(), [(torch.randn(16, *size),) for _ in range(4)]
    names = [layer.name for layer in foldable_layers(model)[0]]

    def forward():
        with torch.no_grad():
            for batch in batches:
                model(*batch)

    calibrate = partial(Calibration, model, names, batches, ["paper"])
    checked = names[3]
    ok = outputs_match(model, checked, batches[:1])
    compress_race(f"{name}, 64 inputs", {"forward": forward, "calibrate": calibrate}, {"calibrate": ("", ok)}, rounds=2)
    assert ok


def outputs_match(model: nn.Module, name: str, batches: list) -> bool:
    """Whether the moments of a layer whose columns are its inputs give the energy of its outputs, to 1e-5."""
    layer, found = model.get_submodule(name), []
    handle = layer.register_forward_hook(lambda _, args, y: found.append((args[0], y)))
    with torch.no_grad():
        model(*batches[0])
    handle.remove()
    (x, y), M = found[0], Layer(name, layer).matrix()
    y = y if layer.bias is None else y - layer.bias
    ridge = RIDGE * x.double().square().sum() / M.shape[2] * M.double().square().sum()
    s = Calibration(model, [name], batches, ["paper"]).spectrum(name, "paper", M)
    energy = y.double().square().sum()
    return bool((s.square().sum() - energy - ridge).abs() <= 1e-5 * energy)
