"""Dispatch to the fused low-rank kernel. Values of the kernel: tests/emulation/lowrank_interpreted.py."""

import logging
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import compaware_kernels as ck
from compaware_kernels.ops import backends
from compaware_kernels.ops import lowrank as lowrank_ops


def test_registered_and_imported_late():
    script = """if True:
        import sys
        import torch, compaware_kernels
        from compaware_kernels.ops import backends
        backends.register()
        for name in ("lowrank_conv2d", "lowrank_linear"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"compaware::{name}", "CUDA")
        assert "compaware_kernels.ops.triton_lowrank" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh(monkeypatch):
    """Clears the cached choice of the Triton kernel before and after."""
    caches = backends.triton_missing, backends._too_old, backends.log_once
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


def test_reasons_for_a_missing_triton(fresh):
    triton = pytest.importorskip("triton")
    assert backends.triton_missing() == ""
    backends.triton_missing.cache_clear()
    fresh.setattr(triton, "__version__", "3.5.1")
    assert backends.triton_missing() == "triton 3.6 or later is wanted; found 3.5.1"
    backends.triton_missing.cache_clear()
    fresh.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in backends.triton_missing()


@pytest.mark.parametrize("there", [True, False], ids=["with triton", "without"])
def test_info_says_what_runs(fresh, there):
    if not there:
        fresh.setitem(sys.modules, "triton", None)
    said = ck.info()["ops"]
    wanted = "Triton kernel" if there else "reference (plain PyTorch): triton cannot be imported"
    for name in ("lowrank_conv2d", "lowrank_conv2d_", "lowrank_linear"):
        assert said[name]["CUDA"].startswith(wanted) and "riton " not in said[name]["CPU"]
    assert said["lowrank_pack"]["CUDA"] == said["svt"]["CUDA"] == "reference (plain PyTorch)"


@pytest.mark.parametrize("triton", [True, False], ids=["with triton", "without"])
def test_two_steps_where_the_kernel_does_not_apply(fresh, caplog, triton):
    if not triton:
        fresh.setitem(sys.modules, "triton", None)
    x, V, U, bias = torch.randn(2, 8, 5, 5), torch.randn(3, 8, 3, 3), torch.randn(4, 3, 1, 1), torch.randn(4)
    more = ([2, 1], [1, 0], [1, 1], 1, "paper", "relu")
    for op in ("lowrank_conv2d", "lowrank_linear"):
        fresh.setitem(backends.TABLE[op], "cpu", backends.TABLE[op]["cuda"])
    with caplog.at_level(logging.INFO, logger="compaware_kernels"):
        for _ in range(2):
            y = backends._conv2d(x, V, U, bias, None, None, *more)
    assert torch.equal(y, lowrank_ops.lowrank_two_step(x, V, U, bias, None, *more))
    reason = "x is on cpu" if triton else "triton cannot be imported"
    assert len(caplog.records) == 1 and reason in caplog.text and "two steps" in caplog.text

    x, V, U = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(4, 3)
    wanted = lowrank_ops.lowrank_linear_two_step(x, V, U, bias, None, "gelu")
    assert torch.equal(backends._linear(x, V, U, bias, None, None, "gelu"), wanted)


CONV = {"x": (2, 16, 8, 8), "V": (4, 16, 3, 3), "U": (24, 4, 1, 1), "dtype": torch.bfloat16}
REFUSED = {
    "": {},
    "one dtype of fp16, bf16 and fp32": {"dtype": torch.float64},
    "got torch.bfloat16, torch.float32": {"weights": torch.float32},
    "groups 1 and fold paper": {"groups": 2},
    "got 1 and input": {"fold": "input"},
    "a rank of at most 128": {"V": (129, 16, 3, 3), "U": (24, 129, 1, 1)},
    "multiples of 8 are wanted: others load one by one; got 12 and 24": {"x": (2, 12, 8, 8), "V": (4, 12, 3, 3)},
    "got 16 and 20": {"U": (20, 4, 1, 1)},
    "at most 1073741824 pixels": {"x": (2**15, 16, 2**8, 2**8)},
    "sm_80 or later": {"capability": (7, 5)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_not(reason, fresh):
    """With tensors that only claim to be on a GPU."""
    pytest.importorskip("triton")
    case = CONV | REFUSED[reason]
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: case.get("capability", (9, 0)))
    with FakeTensorMode():
        x = torch.empty(case["x"], dtype=case["dtype"], device="cuda")
        V, U = (torch.empty(case[name], dtype=case.get("weights", x.dtype), device="cuda") for name in "VU")
        args = x, V, U, case.get("groups", 1), case.get("fold", "paper")
        backend, said = backends.choose("lowrank_conv2d", x.device, *args)
    assert reason in said and bool(said) == bool(reason) == (backend is backends.PLAIN), said


def test_a_layer_compiles_in_one_graph():
    """With tensors that only claim to be on a GPU: the op is in the graph, so the layer has been admitted."""
    pytest.importorskip("triton")
    graphs = []
    with FakeTensorMode(), torch.no_grad():
        layer, x = ck.LowRankLinear(64, 64, 16, bias=False, device="meta").eval(), torch.empty(2, 64, device="cuda")
        for factor in (layer.first, layer.second):
            factor.weight = torch.nn.Parameter(torch.empty(factor.weight.shape, device="cuda"), requires_grad=False)
        torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)(x)
    assert "compaware.lowrank_linear" in graphs[0].code


def test_refusals():
    pytest.importorskip("triton")
    from compaware_kernels.ops.triton_lowrank import lowrank_conv2d, lowrank_linear

    x, V, U = torch.randn(2, 8, 5, 5), torch.randn(3, 8, 3, 3), torch.randn(4, 3, 1, 1)
    with pytest.raises(ValueError, match=r"activation must be one of .*; got 'tanh'"):
        lowrank_conv2d(x, V, U, activation="tanh")
    for wrong, args in {
        r"V of shape \[3, 7, 3, 3\]; got \[3, 8, 3, 3\]": (x[:, :7], V, U),
        r"U of shape \[4, 3, 1, 1\]; got \[4, 2, 1, 1\]": (x, V, U[:, :2]),
        r"bias of shape \[4\]; got \[1\]": (x, V, U, torch.zeros(1)),
        r"residual of shape \[2, 4, 3, 3\]; got \[2, 4, 1, 3\]": (x, V, U, None, torch.zeros(2, 4, 1, 3)),
        "a kernel of 3 x 3 does not fit": (x[..., :2], V, U),
    }.items():
        with pytest.raises(RuntimeError, match=f"lowrank_conv2d: .*{wrong}"):
            lowrank_conv2d(*args)
    x, V, U = torch.randn(2, 8), torch.randn(3, 8), torch.randn(4, 3)
    for wrong, args in {
        r"x of shape \[2, 8\]; got \[2, 7\]": (x[:, :7], V, U),
        r"U of shape \[4, 3\]; got \[4, 2\]": (x, V, U[:, :2]),
        r"bias of shape \[4\]; got \[5\]": (x, V, U, torch.zeros(5)),
        r"residual of shape \[2, 4\]; got \[4\]": (x, V, U, None, torch.zeros(4)),
    }.items():
        with pytest.raises(RuntimeError, match=f"lowrank_linear: wanted {wrong}"):
            lowrank_linear(*args)
