"""Calibration of layers in fp32 and below, by moments of outputs or inputs in fp32, against fp64."""

import copy

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression import calibration
from compaware_kernels.compression.calibration import RIDGE, Calibration, columns
from compaware_kernels.folds import FOLDS
from compaware_kernels.nn.discovery import Layer
from tests.compression.test_calibration import LAYERS, inputs

WIDE = {
    "wide linear": (lambda: nn.Linear(40, 12), (7, 5, 40)),
    "wide, strided": (lambda: nn.Conv2d(9, 8, (3, 2), stride=2, padding=(1, 2), dilation=(2, 1)), (2, 9, 11, 10)),
    "wide, circular": (lambda: nn.Conv2d(6, 5, 3, padding=2, padding_mode="circular", bias=False), (2, 6, 9, 8)),
    "wide groups": (lambda: nn.Conv2d(12, 8, 3, groups=4, padding=1), (2, 12, 7, 8)),
    "wide, one image": (lambda: nn.Conv2d(6, 8, 3), (6, 9, 8)),
}
ALL = {**LAYERS, **WIDE}


def in_fp64(module, x, fold):
    """C ``[G, n, n]`` with its ridge, in fp64."""
    C = sum(X.mT @ X for X in columns(copy.deepcopy(module).double(), x.double(), fold))
    n = C.shape[-1]
    return C + RIDGE * C.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(n).double()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fold", FOLDS)
def test_factors_are_optimal(name, fold):
    """Spectrum to 1e-5 of its largest value (measured: 3e-7), loss to 1e-5 of the least (measured: 1e-7)."""
    make, shape = ALL[name]
    module, x = make(), inputs(shape).float()
    M, C = Layer("0", module).matrix(fold).detach(), in_fp64(module, x, fold)
    found = Calibration(nn.Sequential(module), ["0"], [(x,)], [fold]).svd("0", fold, M)
    s = torch.linalg.svdvals(M.double() @ torch.linalg.cholesky(C))
    torch.testing.assert_close(found.s, s, rtol=0, atol=1e-5 * float(s.max()))
    rank = min(M.shape[1:]) // 2 or 1
    least = float(s[:, rank:].square().sum())
    U, V = found.factors(rank, torch.float64)
    for R in (found.nearest(rank), U @ V):
        D = M.double() - R
        assert float((D @ C * D).sum()) <= (1 + 1e-5) * least + 1e-9 * float(s.square().sum())
    torch.testing.assert_close(U.norm(dim=(1, 2)), V.norm(dim=(1, 2)), rtol=1e-6, atol=0)


def moments(module, x):
    seen = Calibration(nn.Sequential(module), ["0"], [(x,)], ["paper"])
    return seen._moments["0", "paper"]


def test_outputs_are_taken_where_they_are_fewer():
    wide, tall = nn.Linear(40, 12), nn.Linear(12, 40)
    assert isinstance(moments(wide, torch.randn(9, 40)), calibration._OutputMoments)
    assert isinstance(moments(tall, torch.randn(9, 12)), calibration._InputMoments)
    assert isinstance(moments(wide.bfloat16(), torch.randn(9, 40).bfloat16()), calibration._InputMoments)


def test_outputs_that_a_hook_changes_are_not_taken():
    layer, x = nn.Linear(40, 12), torch.randn(9, 40)
    s = Calibration(nn.Sequential(layer), ["0"], [(x,)], ["paper"]).spectrum("0", "paper", layer.weight[None])
    handle = layer.register_forward_hook(lambda *args: args[-1] * 3)
    found = moments(layer, x)
    assert isinstance(found, calibration._InputMoments)
    torch.testing.assert_close(found.svd(layer.weight[None]).s, s, rtol=1e-4, atol=0)
    handle.remove()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22])
@pytest.mark.parametrize("sizes", [(40, 12), (12, 40)])
def test_inputs_whose_squares_are_out_of_range(scale, sizes):
    torch.manual_seed(0)
    layer, x = nn.Linear(*sizes, bias=False), torch.randn(30, sizes[0])
    s = [moments(layer, x * factor).svd(layer.weight[None]).s / factor for factor in (1, scale)]
    torch.testing.assert_close(s[0], s[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 60)).to(dtype), torch.randn(64, 40).to(dtype)
    small, report = ck.compress(model, ck.ranks.fixed(6), (x,), goal="size", calibration=[(x,)])
    plain, _ = ck.compress(model, ck.ranks.fixed(6), (x,), goal="size")
    losses = [float((net(x) - model(x)).float().norm()) for net in (small, plain)]
    assert [row.rank for row in report.layers] == [6, 6] and losses[0] < losses[1]
