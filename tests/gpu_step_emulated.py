"""The whole proximal step as a GPU would run it: Triton kernels under the interpreter, CUDA kernels under the emulator.

test_gpu_step.py runs this in a process of its own. Workspace is poisoned with NaN; the truth is fp64.
"""

import emulator
import oracle
import pytest
import torch
import triton_sim
from cases import low_rank, with_spectrum

import compaware_kernels as ck
from compaware_kernels.gpu import kernels, plan

TOL = 1e-3
counted = []  # the launches


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Launches go to the emulator and the interpreter, and are counted."""
    counted.clear()

    def launch(kernel, grid, block, shared, device, stream, numbers):
        counted.append(kernel)
        emulator.launch(kernel, grid, block, shared, numbers)

    def program(self, counters, run=plan.Program.run):
        counted.append("program")
        with triton_sim.register(*self.tensors):
            run(self, counters)

    token = kernels.instead.set(launch)
    monkeypatch.setattr(plan.Program, "run", program)
    yield
    kernels.instead.reset(token)


def network(seed=0, dtype=torch.float32):
    """Ragged: tall and wide ones of low rank, and small ones."""
    weights = [low_rank(160, 120, 10, seed=seed), low_rank(96, 260, 4, seed=seed), low_rank(20, 12, 3, seed=seed),
               with_spectrum(40, 48, torch.linspace(3, 0, 40), seed=seed)]  # fmt: skip
    return [W.to(dtype) for W in weights]


def check(weights, before, tau, infos, storage=0.0):
    """The result is that of fp64, as near as the report says, and as the tolerance asks."""
    for W, X, info in zip(weights, before, infos, strict=True):
        exact = torch.from_numpy(oracle.svt(X.double().numpy(), tau))
        error = W.double() - exact
        assert float(error.norm()) <= float(info.error_bound), info.method
        assert float(torch.linalg.matrix_norm(error, 2)) <= TOL * tau + storage * float(X.norm()), info.method
        assert int(info.rank) == int((torch.linalg.svdvals(X.double()) > tau).sum()), info.method


def test_cold_then_warm():
    state, weights, methods = ck.WarmState(), network(), []
    for call in range(4):
        for W, fresh in zip(weights, network(), strict=True):
            W.copy_(fresh + 1e-4 * call * torch.randn(W.shape, generator=torch.Generator().manual_seed(call)))
        before = [W.clone() for W in weights]
        infos = ck.svt_(weights, 1.0, state=state, tol=TOL)
        check(weights, before, 1.0, infos, 2e-7)
        methods.append([info.method for info in infos])
    assert methods[0][:2] == ["products", "products"]
    assert methods[-1][:2] == ["subspace", "subspace"]
