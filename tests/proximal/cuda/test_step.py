"""GPU proximal step: what can be tested without a GPU (launches, structs, fake tensors, polynomials)."""

import math
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import compaware_kernels as ck
from compaware_kernels.ops import cuda_launcher

pytest.importorskip("triton")
from compaware_kernels.proximal.cuda import plan, step
from compaware_kernels.proximal.cuda.sizes import width

ROOT = Path(__file__).parents[3]
MOST_LAUNCHES = 16


def shapes(network: str) -> list[tuple[int, int]]:
    from bench.common import workloads

    return getattr(workloads, network)()


def launches(weights, widths, monkeypatch) -> list[str]:
    """Kernels that one step launches; nothing is computed."""
    found = []
    monkeypatch.setattr(plan.Program, "run", lambda self, counters: found.append("program"))
    with cuda_launcher.registered(lambda kernel, *rest: found.append(kernel), "meta"):
        step.run(plan.Plan(weights, widths), 1e-3)
    return found


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_launches(warm, monkeypatch):
    counts = {}
    for network in ("resnet50", "vit_b", "lenet"):
        weights = [torch.empty(shape, device="meta") for shape in shapes(network)]
        widths = [width(min(W.shape) // 8, min(W.shape)) if warm else 0 for W in weights]
        counts[network] = len(launches(weights, widths, monkeypatch))
    assert counts["resnet50"] == counts["vit_b"] == counts["lenet"] <= MOST_LAUNCHES


class Net(torch.nn.Module):
    def forward(self, W, V):
        s, bounds = torch.ops.compaware.svt_([W, V], torch.tensor([0.1, 0.2]).double(), 1e-3)
        return W, V, s, bounds


def test_traced_with_fake_cuda_tensors():
    with FakeTensorMode():
        W, V = torch.empty(40, 30, device="cuda"), torch.empty(20, 70, device="cuda", dtype=torch.bfloat16)
        W, V, s, bounds = Net()(W, V)
        assert {x.device.type for x in (W, V, s, bounds)} == {"cuda"}
        assert s.shape == (50,) and bounds.shape == (2,)


def test_exported_with_fake_cuda_tensors():
    with FakeTensorMode():
        inputs = torch.empty(40, 30, device="cuda"), torch.empty(20, 70, device="cuda")
        program = torch.export.export(Net(), inputs)
    assert "compaware.svt_" in program.graph_module.code


def test_the_last_polynomials_converge_to_rounding():
    """From any interval for which a step is made, the remaining polynomials map all numbers to 1."""
    from compaware_kernels.proximal.cuda.polar_express import schedule

    for first, (low, *_) in enumerate(schedule()[:-1]):
        x = torch.logspace(math.log10(low), 0, 20_000, dtype=torch.float64)
        for _, a, b, c in schedule()[first:]:
            x = x * (a + b * x**2 + c * x**4)
        assert float((1 - x).abs().max()) < 1e-11, first


def test_cpu_weights_are_not_taken():
    weights = [torch.randn(40, 40)]
    (info,) = ck.svt_(weights, 0.1)
    assert "products" not in info.method
