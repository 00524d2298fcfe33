"""Proximal step of a whole network on a GPU, which it needs. solver_emulated.py runs most of it without one."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import compaware_kernels as ck
from compaware_kernels.ops import backends, cuda_launcher
from compaware_kernels.proximal.cuda import backend
from tests.helpers import solver_checks as checks

missing = (
    (backends.triton_missing() or cuda_launcher.missing())
    if torch.cuda.is_available()
    else "torch.cuda.is_available() is False"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing), reason=missing)]
DEVICE = "cuda:0"
MOST_LAUNCHES = 16
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shapes", [checks.FEW, checks.MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", checks.ROUNDING, ids=str)
def test_values(dtype, shapes):
    checks.check_values(DEVICE, dtype, shapes, calls=5)


@pytest.mark.parametrize("shapes", [checks.FEW, checks.MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", checks.ROUNDING, ids=str)
@pytest.mark.parametrize("gamma", [1.2, 3.0])
def test_firm_values(gamma, dtype, shapes):
    checks.check_values(DEVICE, dtype, shapes, calls=5, gamma=gamma)


def test_other_stream():
    """The step is ordered after pending work of the current stream; the default stream waits for nothing."""
    weights, state = checks.warm(DEVICE)
    fresh, stream, default = checks.network(call=4, device=DEVICE), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        infos = checks.call(weights, fresh, state)
    default.record(torch.cuda.default_stream())
    default.synchronize()
    assert not stream.query(), "the call has waited, or the default stream for it"
    torch.cuda.synchronize()
    checks.assert_right(weights, fresh, infos)


def test_graph():
    checks.check_replay(DEVICE, checks.capture_on_gpu)


def test_refusal():
    checks.check_refusal(DEVICE)


def test_no_wait():
    checks.check_no_wait(DEVICE, no_waiting)


def test_proximal_step_without_waiting():
    checks.check_proximal_step(DEVICE, no_waiting)


def test_soak():
    checks.check_soak(DEVICE, 1000, 100, torch.cuda.memory_allocated)


def test_launches():
    """As many kernels for two layers as for all; copies are not counted."""
    counts = []
    for shapes in (checks.FEW, checks.MANY):
        weights, state = checks.warm(DEVICE, shapes)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            ck.svt_(weights, checks.TAU, state=state)
            torch.cuda.synchronize()
        events = [e.name for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts.append([name for name in events if not name.startswith(("Memcpy", "Memset"))])
    few, many = counts
    assert len(few) == len(many) <= MOST_LAUNCHES, counts


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    """Same results on another device, with the current device unchanged; lists with weights on both devices work,
    too."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        weights, state = checks.warm(device)
        assert torch.device(device) in backend.engines(state)
        results.append([W.cpu() for W in weights])
        assert torch.cuda.current_device() == 0
    assert all(map(torch.equal, *results))
    fresh = [X.to(f"cuda:{i % 2}") for i, X in enumerate(checks.network())]
    weights = [X.clone() for X in fresh]
    checks.assert_right(weights, fresh, ck.svt_(weights, checks.TAU))


@pytest.mark.skipif(not SANITIZER, reason="compute-sanitizer is not found")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool):
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", checks.__name__]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
