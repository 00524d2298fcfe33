"""The checks of engine_checks.py on the CPU; test_engine_checks.py runs this in a process of its own."""

import pytest
import torch

from compaware_kernels.ops import cuda_launcher
from compaware_kernels.proximal.cuda import matmul_program
from tests.emulation import emulator, triton_sim
from tests.helpers import solver_checks as checks


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Launches go to the emulator and the interpreter."""
    run = matmul_program.Program.run

    def interpreted(self, counters):
        with triton_sim.register(*self.tensors):
            run(self, counters)

    monkeypatch.setattr(matmul_program.Program, "run", interpreted)
    token = cuda_launcher.instead.set(lambda kernel, grid, block, shared, device, stream, numbers:
                                emulator.launch(kernel, grid, block, shared, numbers))  # fmt: skip
    yield
    cuda_launcher.instead.reset(token)


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
