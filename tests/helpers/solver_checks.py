"""Checks of the solver on a GPU: test_gpu_step.py runs them there, solver_emulated.py emulated."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.proximal.cuda import backend, step
from tests.helpers import oracle
from tests.helpers.cases import low_rank, with_spectrum

TAU, TOL = 1.0, 1e-3
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of a weight, relative
FEW = [(136, 64, 6), (66, 144, 4), (20, 12, 3)]  # m, n, rank; the last one is small
MANY = [*FEW, (1, 9, 1), (9, 1, 1), (40, 48, 40), (64, 576, 5), (1000, 1000, 20), (513, 2049, 30), (400, 300, 250)]


def network(shapes=FEW, dtype=torch.float32, call=0, device="cpu"):
    """Ragged low-rank weights that drift from call to call."""
    generator = torch.Generator().manual_seed(call)
    weights = [low_rank(*shape, seed=7 * i) if min(shape[:2]) > 1 else with_spectrum(*shape[:2], [3.0], seed=i)
               for i, shape in enumerate(shapes)]  # fmt: skip
    return [(W + 1e-4 * call * torch.randn(W.shape, generator=generator)).to(device, dtype) for W in weights]


def wait(device):
    """Wait for the reports that the last call copies to the host; the next call chooses its routes by them."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def assert_right(weights, before, infos, tau=TAU, gamma=None):
    """The error is within the reported bound and within the tolerance."""
    for W, X, info in zip(weights, before, infos, strict=True):
        X = X.double().cpu()
        exact = oracle.svt(X.numpy(), tau) if gamma is None else oracle.firm_svt(X.numpy(), tau, gamma)
        error = W.double().cpu() - torch.from_numpy(exact)
        assert float(error.norm()) <= float(info.error_bound), info.method
        allowed = TOL * tau + 2 * ROUNDING[W.dtype] * float(X.norm())
        assert float(torch.linalg.matrix_norm(error, 2)) <= allowed, info.method
        assert int(info.rank) == int((torch.linalg.svdvals(X) > tau).sum()), info.method


def call(weights, fresh, state, tau=TAU, gamma=None, **options):
    for W, X in zip(weights, fresh, strict=True):
        W.copy_(X)
    options |= {"state": state, "tol": TOL}
    return ck.svt_(weights, tau, **options) if gamma is None else ck.firm_svt_(weights, tau, gamma, **options)


def warm(device, shapes=FEW, dtype=torch.float32, calls=3, **options):
    """Weights, and a warm state after this many calls."""
    weights, state = network(shapes, dtype, device=device), ck.WarmState()
    for i in range(calls):
        call(weights, network(shapes, dtype, i, device), state, **options)
        wait(device)
    return weights, state


def check_values(device, dtype, shapes=FEW, calls=3, gamma=None):
    weights, state, methods = network(shapes, dtype, device=device), ck.WarmState(), []
    for i in range(calls):
        fresh = network(shapes, dtype, i, device)
        infos = call(weights, fresh, state, gamma=gamma)
        wait(device)
        assert_right(weights, fresh, infos, gamma=gamma)
        methods.append([info.method for info in infos])
    assert methods[0][:2] == ["products"] * 2 and methods[-1][:2] == ["subspace"] * 2, methods


def check_replay(device, capture):
    """``capture(queue)`` returns a graph; its replay uses the weights and thresholds of that time."""
    weights, state = warm(device)
    twin = copy.deepcopy(state.state_dict())
    graph = capture(lambda: ck.svt_(weights, TAU, state=state, tol=TOL), state, weights)
    (engine,) = backend.engines(state).values()
    for i, tau in enumerate((TAU, TAU, 1.3)):
        fresh = network(call=10 + i, device=device)
        for W, X in zip(weights, fresh, strict=True):
            W.copy_(X)
        engine.plan.captured[: len(weights)] = tau
        graph.replay()
        wait(device)
        assert_right(weights, fresh, engine.reports(weights, [None] * len(weights)), tau)
        if i == 0:
            other, eager = [torch.empty_like(W) for W in weights], ck.WarmState()
            eager.load_state_dict(twin)
            call(other, fresh, eager)
            assert all(map(torch.equal, weights, other)), "not what the same call gives eagerly"


def capture_on_gpu(queue, state, weights):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue()
    return graph


class CaptureOnCpu:
    """Stand-in for a CUDA graph: the recorded launches and the copy before them."""

    def __init__(self, queue, state, weights):
        (self.engine,) = backend.engines(state).values()
        self.engine.plan.captured = torch.tensor([*[TAU] * len(weights), state.seed, state.calls], dtype=torch.float64)

    def replay(self):
        self.engine.plan.inputs.copy_(self.engine.plan.captured)
        step.run(self.engine.plan, TOL)


def check_refusal(device):
    """NaN in one weight: no weight changes, the next call names it, and the one after that works."""
    names = ["first", "second", "third"]
    weights, state = warm(device, names=names)
    fresh = network(call=3, device=device)
    broken = [X.clone() for X in fresh]
    broken[1][3, 4] = torch.nan
    infos = call(weights, broken, state, names=names)
    wait(device)
    for W, X, info in zip(weights, broken, infos, strict=True):
        assert torch.equal(W.view(torch.int32), X.view(torch.int32)) and "refused" in info.method
    with pytest.raises(ValueError, match=r"^second: .*NaN or Inf"):
        ck.svt_(weights, TAU, state=state, tol=TOL, names=names)
    infos = call(weights, fresh, state, names=names)
    wait(device)
    assert_right(weights, fresh, infos)


def check_no_wait(device, forbidden=nullcontext):
    """A warm call must not synchronize; ``forbidden``: a context in which synchronizing raises."""
    weights, state = warm(device)
    fresh = network(call=3, device=device)
    with forbidden():
        infos = call(weights, fresh, state)
    wait(device)
    assert_right(weights, fresh, infos)


def model():
    """Model with two large layers and a small one."""
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for layer, shape in ((net[0], (200, 64, 6)), (net[2], (64, 200, 6))):
            layer.weight.copy_(low_rank(*shape))
    return net


def check_proximal_step(device, forbidden=nullcontext):
    """ProximalStep, warm: the optimizer changes nothing, so singular values fall by the threshold in every step."""
    torch.manual_seed(0)
    net = model().to(device)
    prox = ck.ProximalStep(net, torch.optim.SGD(net.parameters(), lr=1.0), nuclear=0.1)
    for _ in range(5):
        prox.step()
        wait(device)
    before = [net[i].weight.detach().clone() for i in (0, 2, 4)]
    with forbidden():
        prox.step()
    wait(device)
    for i, X in zip((0, 2, 4), before, strict=True):
        exact = oracle.svt(X.double().cpu().numpy(), 0.1)
        error = net[i].weight.detach().double().cpu() - torch.from_numpy(exact)
        assert float(torch.linalg.matrix_norm(error, 2)) <= TOL * 0.1 + ROUNDING[torch.float32] * float(X.norm())


def check_soak(device, steps, settled, allocated=lambda: 0):
    """Many calls in a row; allocated memory stops growing after ``settled`` calls."""
    weights, state = warm(device)
    fresh, held = [network(call=i, device=device) for i in range(4)], []
    for i in range(steps):
        infos = call(weights, fresh[i % 4], state)
        if i >= settled:
            held.append(allocated())
    wait(device)
    assert_right(weights, fresh[(steps - 1) % 4], infos)
    assert len(set(held)) == 1, f"from {min(held)} to {max(held)} bytes"


if __name__ == "__main__":  # for compute-sanitizer
    check_values("cuda", torch.float32)
