"""The checks of test_gpu_step.py, emulated: they pass here, so a failure on a GPU is one of the GPU.

Run with TRITON_INTERPRET=1, on its own.
"""

import pytest
import torch

from compaware_kernels.ops import cuda_launcher
from compaware_kernels.proximal.cuda import matmul_program
from tests.emulation import emulator, triton_sim
from tests.helpers import solver_checks as checks

pytestmark = pytest.mark.emulation


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Send launches to the emulator and the interpreter."""
    run = matmul_program.Program.run

    def interpreted(self, counters):
        with triton_sim.register(*self.tensors):
            run(self, counters)

    monkeypatch.setattr(matmul_program.Program, "run", interpreted)
    with cuda_launcher.registered(emulator.launcher):
        yield


def test_values():
    checks.check_values("cpu", torch.float16)


def test_firm_values():
    checks.check_values("cpu", torch.float32, gamma=3.0)


def test_replay():
    checks.check_replay("cpu", checks.CaptureOnCpu)


def test_refusal():
    checks.check_refusal("cpu")


def test_no_wait():
    checks.check_no_wait("cpu")


def test_proximal_step():
    checks.check_proximal_step("cpu")


def test_soak():
    checks.check_soak("cpu", 2, 0)
