"""The table of backends: what ``compaware info`` says is what runs. Which body runs is seen, not asked."""

import logging
import subprocess
import sys

import pytest
import torch

import compaware_kernels as ck
from compaware_kernels.ops import backends, cuda_launcher, library, linalg, lowrank, shrinkage, svt
from compaware_kernels.proximal import svt_op
from compaware_kernels.proximal.cuda import backend as gpu

CPU = torch.device("cpu")
# what the solver is made of
PARTS = ("small_svd", "gram_eigh", "wide_product", "sum_of_squares", "subspace_step")
MODULES = (linalg, lowrank, shrinkage, svt, svt_op)
BODIES = {op: next(getattr(module, op) for module in MODULES if hasattr(module, op)) for op in backends.TABLE}


@pytest.fixture
def fresh(monkeypatch):
    """What is remembered of Triton is forgotten before and after."""
    caches = backends.triton_missing, backends._too_old, backends.log_once
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


def plain_bodies_of(f):
    """The ops whose plain PyTorch body runs while f does."""
    found, codes = set(), {body._init_fn.__code__: op for op, body in BODIES.items()}

    def look(frame, event, _):
        if event == "call" and frame.f_code in codes:
            found.add(codes[frame.f_code])

    sys.setprofile(look)
    try:
        f()
    finally:
        sys.setprofile(None)
    return found


def arguments(op):
    W, tau = torch.randn(6, 5), torch.tensor(0.3)
    low = torch.randn(300, 4) @ torch.randn(4, 200)
    weights, taus = [torch.randn(6, 5), low], torch.tensor([0.3, 0.3], dtype=torch.float64)
    spectral = [torch.randn(20, 6, 5), low, torch.randn(40, 30)]  # of every route
    x, V, U = torch.randn(2, 16, 6, 6), torch.randn(12, 16, 3, 3), torch.randn(8, 12, 1, 1)
    geometry, residual = ([1, 1], [1, 1], [1, 1], 1, "paper", "relu"), torch.randn(2, 8, 6, 6)
    return {
        "small_svd": (W[None],),
        "gram_eigh": ([W], taus[:1]),
        "wide_product": (W, W.mT.contiguous()),
        "sum_of_squares": (W,),
        "subspace_step": (W, torch.randn(5, 2), 0.3),
        "sparse_group_shrink": (W, tau, tau),
        "sparse_group_shrink_": (weights, taus, taus),
        "neuron_shrink_": (weights, [torch.randn(len(W)) for W in weights], taus),
        "svt_": (spectral, taus[:1].repeat(3), 1e-3),
        "firm_svt_": (spectral, taus[:1].repeat(3), torch.tensor([3.0] * 3, dtype=torch.float64), 1e-3),
        "lowrank_pack": (V, U, 1),
        "lowrank_conv2d": (x, V, U, None, None, None, *geometry),
        "lowrank_conv2d_": (x, V, U, None, residual, None, *geometry),
        "lowrank_linear": (W, torch.randn(3, 5), torch.randn(4, 3), None, None, None, "none"),
    }.get(op, (weights, taus) if op.endswith("_") else (W, tau))


def check_info():
    """On the CPU: a body in C++ where it says so, plain PyTorch where it says that."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kernels = 0
    info = {op: where["CPU"] for op, where in ck.info()["ops"].items()}
    for op, said in info.items():
        ran = plain_bodies_of(lambda op=op: getattr(torch.ops.compaware, op)(*arguments(op)))
        if op in backends.SPECTRAL_OPS:
            built = [part for part in PARTS if info[part] == "C++ kernel"]
            parts = "; ".join(f"{part}: C++ kernel" for part in built) or "plain PyTorch"
            assert said == f"solver ({parts})" and ran == {op, *PARTS} - set(built)
        elif said == "C++ kernel":
            assert op not in ran, op
            kernels += 1
        else:
            assert said.startswith("reference (plain PyTorch)") and op in ran, (op, said)
    assert bool(kernels) != bool(library.missing)


def test_info_says_what_runs():
    check_info()


def test_info_says_what_runs_without_the_library():
    script = """if True:
        import torch
        def fail(path): raise OSError("planted")
        torch.ops.load_library = fail
        from tests.ops import test_backends
        assert "planted" in test_backends.library.missing
        assert "planted" in test_backends.ck.info()["ops"]["small_svd"]["CPU"]
        test_backends.check_info()"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("there", [True, False], ids=["with triton", "without"])
def test_the_step_runs_where_it_is_said_to(there, fresh, caplog):
    """On the CPU, where a launcher is registered, as on a GPU."""
    if there:
        pytest.importorskip("triton")
    else:
        fresh.setitem(sys.modules, "triton", None)
    taken = []
    fresh.setattr(gpu, "shrink_", lambda *args: taken.append(args) or [])
    with cuda_launcher.registered(lambda *launch: None):
        said = backends.describe("svt_", CPU, kind="cuda")
        for _ in range(2):
            ck.svt_([torch.randn(6, 5)], 0.1)
        ck.truncate_([torch.randn(6, 5)], 2)
    assert len(taken) == (2 if there else 0)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    if there:
        assert said == "GPU step: all layers in 13 launches" and not warnings
    else:
        assert said.startswith("solver (") and said.endswith(str(warnings[0].args[-1]))
        assert len(warnings) == 1 and "triton cannot be imported" in said
    ck.svt_([torch.randn(6, 5)], 0.1)
    assert len(taken) == (2 if there else 0), "no launcher is left"


@pytest.mark.parametrize("there", [True, False], ids=["with triton", "without"])
@pytest.mark.parametrize("op", ["lowrank_conv2d", "lowrank_linear"])
def test_the_fused_kernel_runs_where_it_is_said_to(op, there, fresh):
    """The body that the dispatcher has for CUDA, on tensors that the kernel is made to take."""
    args, found = arguments(op), []
    if there:
        pytest.importorskip("triton")
        from compaware_kernels.ops import triton_lowrank

        fresh.setattr(triton_lowrank, op, lambda x, *rest: found.append("Triton kernel") or x)
    else:
        fresh.setitem(sys.modules, "triton", None)
    two_steps = "lowrank_two_step" if op == "lowrank_conv2d" else "lowrank_linear_two_step"
    fresh.setattr(lowrank, two_steps, lambda *args: found.append("reference (plain PyTorch)"))
    (row,) = backends.TABLE[op]["cuda"]
    fresh.setitem(backends.TABLE[op], "cpu", [row._replace(declines=lambda *args: "")])
    {"lowrank_conv2d": backends._conv2d, "lowrank_linear": backends._linear}[op](*args)
    assert found == [ck.info()["ops"][op]["CUDA"].partition(":")[0]] and ("Triton" in found[0]) == there


def test_a_backend_is_a_row(fresh):
    """What is put first runs; what it declines goes on to the next."""
    x, V, U = torch.randn(2, 16), torch.randn(4, 16), torch.randn(8, 4)
    new = backends.Backend("new", declines=lambda x, *_: "" if len(x) == 2 else "two rows are wanted",
                           run=lambda x, V, U, *rest: (x @ V.mT) @ U.mT + 1)  # fmt: skip
    fresh.setitem(backends.TABLE["lowrank_linear"], "cpu", [new, *backends.TABLE["lowrank_linear"]["cpu"]])
    assert backends.describe("lowrank_linear", CPU) == ck.info()["ops"]["lowrank_linear"]["CPU"] == "new"
    torch.testing.assert_close(backends._linear(x, V, U, None, None, None, "none"), (x @ V.mT) @ U.mT + 1)
    backend, reason = backends.choose("lowrank_linear", CPU, x[:1], V, U)
    assert backend is not new and reason.startswith("two rows are wanted")


def test_a_layer_logs_once_why_it_takes_two_steps(fresh, caplog):
    layer = ck.LowRankConv2d(8, 8, 3, 4).eval()
    with caplog.at_level(logging.INFO, logger="compaware_kernels"), torch.no_grad():
        for _ in range(3):
            layer(torch.randn(1, 8, 5, 5))
        reason = layer.why_two_step(torch.randn(1, 8, 5, 5))
    assert caplog.messages == [f"LowRankConv2d: two steps, not the fused kernel: {reason}"]
