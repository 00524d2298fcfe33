"""The proximal step of a whole network on a GPU, as far as it shows without one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import compaware_kernels as ck
from compaware_kernels.gpu import kernels

pytest.importorskip("triton")
from compaware_kernels.gpu import plan, step
from compaware_kernels.gpu.sizes import width

ROOT = Path(__file__).parents[1]
MOST_LAUNCHES = 16


def shapes(network: str) -> list[tuple[int, int]]:
    sys.path.append(str(ROOT / "bench"))
    import workloads

    return getattr(workloads, network)()


def launches(weights, widths, monkeypatch) -> list[str]:
    """Of one step; nothing is computed."""
    found = []
    monkeypatch.setattr(plan.Program, "run", lambda self, counters: found.append("program"))
    token = kernels.instead.set(lambda kernel, *rest: found.append(kernel))
    step.run(plan.Plan(weights, widths), 1e-3)
    kernels.instead.reset(token)
    return found


def test_under_interpreter_and_emulator():
    """In a process of its own: Triton interprets kernels or compiles them, as decided when it is imported."""
    file = Path(__file__).with_name("gpu_step_emulated.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", str(file)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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


def test_the_last_polynomials_leave_rounding():
    """Of numbers in any interval that a step is made for, the composition of the rest makes 1."""
    from compaware_kernels.gpu.schedule import schedule

    for first, (low, *_) in enumerate(schedule()[:-1]):
        x = torch.logspace(math.log10(low), 0, 20_000, dtype=torch.float64)
        for _, a, b, c in schedule()[first:]:
            x = x * (a + b * x**2 + c * x**4)
        assert float((1 - x).abs().max()) < 1e-11, first


def test_nothing_is_taken_without_a_gpu():
    weights = [torch.randn(40, 40)]
    (info,) = ck.svt_(weights, 0.1)
    assert "products" not in info.method
