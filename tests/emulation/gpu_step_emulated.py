"""The whole proximal step of a GPU: Triton kernels in Triton's interpreter, CUDA kernels in the emulator.

Run with TRITON_INTERPRET=1, on its own. Workspace is filled with NaN beforehand; the truth is fp64.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import compaware_kernels as ck
from compaware_kernels.ops import cuda_launcher
from compaware_kernels.proximal.cuda import backend, plan
from compaware_kernels.proximal.error_feedback import widened
from tests.emulation import emulator, triton_sim
from tests.helpers import oracle
from tests.helpers.cases import low_rank, with_spectrum

pytestmark = pytest.mark.emulation

TOL, TAU = 1e-3, 1.0
LAUNCHES = ["ck_begin", "ck_small", "program", "ck_orth", "program", "ck_orth", "program", "ck_ritz", "program",
            "ck_judge", "program", "program", "ck_finish"]  # fmt: skip
counted = []


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Send launches to the emulator and the interpreter, and count them."""
    counted.clear()

    def launch(kernel, grid, block, shared, device, stream, numbers):
        counted.append(kernel)
        emulator.launch(kernel, grid, block, shared, numbers)

    def program(self, counters, run=plan.Program.run):
        counted.append("program")
        with triton_sim.register(*self.tensors):
            run(self, counters)

    monkeypatch.setattr(plan.Program, "run", program)
    with cuda_launcher.registered(launch):
        yield


def network(call=0, dtype=torch.float32):
    """Ragged weights: a tall and a wide one of low rank, and small ones; they drift from call to call."""
    weights = [low_rank(200, 64, 6), low_rank(64, 170, 4), low_rank(20, 12, 3, largest=20),
               with_spectrum(40, 48, torch.linspace(3.1, 0, 40))]  # fmt: skip
    generator = torch.Generator().manual_seed(call)
    return [(W + 1e-4 * call * torch.randn(W.shape, generator=generator)).to(dtype) for W in weights]


def check(weights, before, tau, infos, storage=2e-7, gamma=None):
    """The result is within the reported error bound of the fp64 truth, and within the tolerance."""
    for W, X, info in zip(weights, before, infos, strict=True):
        X64 = X.double().numpy()
        truth = oracle.svt(X64, tau) if gamma is None else oracle.firm_svt(X64, tau, gamma)
        error = W.double() - torch.from_numpy(truth)
        assert float(error.norm()) <= float(info.error_bound), info.method
        allowed = TOL * tau + storage * float(torch.linalg.matrix_norm(X.double(), 2))
        assert float(torch.linalg.matrix_norm(error, 2)) <= allowed, info.method
        assert int(info.rank) == int((torch.linalg.svdvals(X.double()) > tau).sum()), info.method


def step(weights, fresh, state, tau=TAU, gamma=None, **options):
    for W, X in zip(weights, fresh, strict=True):
        W.copy_(X)
    kwargs = {"state": state, "tol": TOL}
    infos = ck.svt_(weights, tau, **kwargs) if gamma is None else ck.firm_svt_(weights, tau, gamma, **kwargs)
    check(weights, fresh, tau, infos, gamma=gamma, **options)
    return [info.method for info in infos]


@pytest.mark.parametrize("seed", [0, 1])
def test_cold_then_warm(seed, monkeypatch):
    monkeypatch.setattr(triton_sim, "seed", seed)
    state, weights = ck.WarmState(), network()
    methods = [step(weights, network(call), state) for call in range(4)]
    assert methods[0][:2] == ["products"] * 2 and methods[-1][:2] == ["subspace"] * 2
    assert all("jacobi" in method for call in methods for method in call[2:])
    assert counted == 4 * LAUNCHES


@pytest.mark.parametrize("gamma", [1.2, 4.0])
def test_firm_cold_then_warm(gamma):
    """As many launches; and a soft step in between finds its plan, and the subspaces, as they are."""
    state, weights = ck.WarmState(), network()
    methods = [step(weights, network(call), state, gamma=gamma) for call in range(3)]
    (engine,) = backend.engines(state).values()
    methods += [step(weights, network(3), state), step(weights, network(4), state, gamma=gamma)]
    assert methods[0][:2] == ["products"] * 2 and methods[-1][:2] == methods[-2][:2] == ["subspace"] * 2
    assert list(backend.engines(state).values()) == [engine] and counted == 5 * LAUNCHES


def test_firm_spectra():
    """s of the subspace route, and of small matrices; and a plan for soft thresholds is not taken for one for firm."""
    state, weights = ck.WarmState(), network(dtype=torch.bfloat16)
    for call, gamma in enumerate((None, None, None, 2.0, 2.0)):
        step(weights, network(call, torch.bfloat16), state, gamma=gamma, storage=2**-7)
        assert next(iter(backend.engines(state).values())).plan.firm == (gamma is not None)
    before = network(5, torch.bfloat16)
    for W, X in zip(weights, before, strict=True):
        W.copy_(X)
    for X, info in zip(before, ck.firm_svt_(weights, TAU, 2.0, state=state), strict=True):
        s = torch.linalg.svdvals(X.double())
        exact = torch.minimum(2 * (s - TAU), s).clamp_min(0)
        torch.testing.assert_close(info.s[0], exact, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("dtype, storage", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
def test_half_types(dtype, storage):
    state, weights = ck.WarmState(), network(dtype=dtype)
    methods = [step(weights, network(call, dtype), state, storage=2 * storage) for call in range(4)]
    assert methods[-1][:2] == ["subspace"] * 2


def test_spectra():
    """Singular values reported by the subspace route and for small matrices; products of the whole matrix report
    none."""
    state, weights = ck.WarmState(), network()
    for call in range(3):
        step(weights, network(call), state)
    before = network(3)
    for W, X in zip(weights, before, strict=True):
        W.copy_(X)
    for X, info in zip(before, ck.svt_(weights, TAU, state=state), strict=True):
        exact = (torch.linalg.svdvals(X.double()) - TAU).clamp_min(0)
        torch.testing.assert_close(info.s[0], exact, rtol=1e-5, atol=1e-3)


def test_rank_larger_than_the_basis():
    state, weights = ck.WarmState(), [low_rank(200, 64, 4).float()]
    methods = [step(weights, [low_rank(200, 64, 4, seed=9).float()], state) for _ in range(4)]
    methods.append(step(weights, [low_rank(200, 64, 30).float()], state))
    assert [method for (method,) in methods[3:]] == ["subspace", "products"]


@pytest.mark.parametrize("tau", [1e-4, 1e-2])
def test_singular_values_far_above_tau(tau):
    weights = [with_spectrum(200, 64, torch.logspace(1, -6, 64)).float()]
    step(weights, [weights[0].clone()], None, tau)


@pytest.mark.parametrize("rank", [1, 64])
def test_equal_singular_values(rank):
    """All nonzero eigenvalues of W^T W are equal: the largest value that the iterations can meet."""
    weights = [with_spectrum(200, 64, torch.full((rank,), 50.0)).float()]
    step(weights, [weights[0].clone()], None, 0.3)


def test_tau_zero_and_everything_below_tau():
    weights = network()
    before = [W.clone() for W in weights]
    infos = ck.svt_(weights, [0.0, 1e4, 1e4, 0.0])
    torch.testing.assert_close(weights[0], before[0], rtol=0, atol=0)
    assert not weights[1].any() and not weights[2].any()
    assert infos[0].method == "none" and infos[1].method == infos[2].method == "zero"


@pytest.mark.parametrize("broken", [1, 3], ids=["large", "small"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused(broken, value):
    state, weights, names = ck.WarmState(), network(), ["a", "b", "c", "d"]
    weights[broken][3, 4] = value
    before = [W.clone() for W in weights]
    infos = ck.svt_(weights, TAU, state=state, names=names)
    for W, X, info in zip(weights, before, infos, strict=True):
        torch.testing.assert_close(W, X, rtol=0, atol=0, equal_nan=True)
        assert "refused" in info.method
    with pytest.raises(ValueError, match=f"^{names[broken]}: .*NaN or Inf"):
        ck.svt_(weights, TAU, state=state, names=names)


WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal"}


class NoSync(TorchFunctionMode):
    """Raises on a function that would synchronize with a GPU: one that reads a value of its tensors on the host."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {x.untyped_storage().data_ptr() for x in tensors}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        ours = [x for x in args if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.storages]
        if ours and (name in WAITS or (name in ("copy_", "to") and not kwargs.get("non_blocking"))):
            raise RuntimeError(f"{name} waits for the GPU")
        return function(*args, **kwargs)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.work += not function.is_view and not any(word in str(function) for word in ("detach", "empty"))
        return function(*args, **(kwargs or {}))


def test_no_synchronization_with_the_host():
    state, weights = ck.WarmState(), network()
    for call in range(3):
        step(weights, network(call), state)
    (engine,) = backend.engines(state).values()
    on_gpu = [*weights, *(x for p in engine.plan.programs for x in p.tensors), engine.plan.out, engine.plan.inputs]
    with NoSync(on_gpu):
        ck.svt_(weights, TAU, state=state)
        with pytest.raises(RuntimeError, match="waits"):
            weights[0].cpu()
    assert list(backend.engines(state).values()) == [engine]


def test_number_of_torch_calls_does_not_grow_with_layers(monkeypatch):
    monkeypatch.setattr(plan.Program, "run", lambda self, counters: None)
    counts = []
    for copies in (1, 3):
        state, weights = ck.WarmState(), [W for _ in range(copies) for W in network()]
        ck.svt_(weights, TAU, state=state)
        with Counted() as counter:
            ck.svt_(weights, TAU, state=state)
        counts.append(counter.work)
    assert counts[0] == counts[1] <= 20  # most of them on the host: the thresholds


def test_a_saved_state_resumes():
    state, weights = ck.WarmState(), network()
    for call in range(3):
        step(weights, network(call), state)
    other, copies = ck.WarmState(), network()
    other.load_state_dict(state.state_dict())
    assert step(copies, network(3), other)[:2] == ["subspace"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_proximal_step(dtype):
    """In bf16 the weights with their residuals, which are shrunk in fp32 by the same plan."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 200), torch.nn.Tanh(), torch.nn.Linear(200, 10, bias=False))
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.3)
    at = [p.data_ptr() for p in model.parameters()]

    def held(i):
        W, E = model[i].weight.detach(), prox.residuals.get(f"{i}.weight")
        return W.clone() if E is None else widened(W, E)

    for _ in range(3):
        before = [held(i) for i in (0, 2)]
        prox.step()
        for i, X in zip((0, 2), before, strict=True):
            exact = torch.from_numpy(oracle.svt(X.double().numpy(), 0.3))
            assert float(torch.linalg.matrix_norm(held(i) - exact, 2)) <= TOL * 0.3
    if dtype == torch.bfloat16:
        planned = {x.W.data_ptr() for engine in backend.engines(prox.warm).values() for x in engine.plan.matrices}
        assert planned == {X.data_ptr() for X in prox.residuals._copies.values()}, "a plan for every step"
    assert at == [p.data_ptr() for p in model.parameters()]
    assert counted == 3 * LAUNCHES


@pytest.mark.parametrize(
    ("broken", "dtype"),
    [("0.weight", torch.float32), ("0.bias", torch.float32), ("2.weight", torch.float32), ("2.weight", torch.bfloat16)],
)
def test_all_penalties_or_none(broken, dtype):
    """Also if only group lasso sees the NaN; the host learns of it at the next step and raises once."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 200), torch.nn.Tanh(), torch.nn.Linear(200, 10, bias=False))
    model.to(dtype)
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), nuclear=0.3, group=0.01, l1=0.001)
    prox.step()
    parameter = model.get_parameter(broken).detach().view(-1)
    good, parameter[3] = parameter[3].clone(), torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    prox.step()
    for p, X in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), X, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=f"^{broken[0]}: contained NaN or Inf"):
        prox.step()
    parameter[3] = good
    exact = torch.from_numpy(oracle.svt(model[2].weight.detach().double().numpy(), 0.3))
    exact = ck.soft_threshold(ck.group_shrink(exact, 0.01 * 200**0.5), 0.001)
    prox.step()
    lost = torch.finfo(dtype).eps * float(exact.norm()) * (dtype != torch.float32)
    assert float(torch.linalg.matrix_norm(model[2].weight.detach() - exact, 2)) <= 2 * TOL * 0.3 + lost
