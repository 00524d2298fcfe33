"""Group lasso over neurons with their biases: the op, the public function, and the proximal step on a GPU."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import compaware_kernels as ck
from compaware_kernels.ops import cuda_launcher, shrinkage
from tests.helpers import shrink_checks as checks
from tests.helpers.shrink_checks import weight

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_values(device):
    checks.neuron_values(device)


@pytest.mark.parametrize("device", DEVICES)
def test_refusals(device):
    checks.neuron_refusals(device)


def test_reference(monkeypatch):
    monkeypatch.setattr(torch.ops.compaware, "neuron_shrink_", shrinkage.neuron_shrink_._init_fn)
    checks.neuron_values("cpu")


def test_opcheck():
    W, b = weight((5, 8), torch.float32, "cpu"), torch.ones(5)
    torch.library.opcheck(torch.ops.compaware.neuron_shrink_.default, ([W], [b], torch.ones(1)))


@pytest.mark.parametrize("shape", [(6, 27), (6, 3, 3, 3)])
def test_public(shape):
    """With a bias, and without."""
    weights, bias = [weight((6, 27), torch.float64, "cpu", i).view(shape) for i in range(2)], torch.linspace(-2, 2, 6)
    bias = bias.double()
    wanted = [ck.group_shrink(torch.cat([weights[0].flatten(1), bias[:, None]], 1), 0.5),
              ck.group_shrink(weights[1].flatten(1), 0.7)]  # fmt: skip
    ck.group_shrink_(weights, [0.5, 0.7], biases=[bias, None])
    got = [torch.cat([weights[0].flatten(1), bias[:, None]], 1), weights[1].flatten(1)]
    for P, Q in zip(got, wanted, strict=True):
        torch.testing.assert_close(P, Q, rtol=1e-14, atol=0)


@pytest.mark.parametrize("biases, message", [
    ([None], "^biases: wanted 2, one per weight; got 1"),
    ([None, torch.ones(5)], r"^b: wanted a bias torch.float32 \[4\] on cpu; got torch.float32 \[5\] on cpu"),
    ([torch.ones(4).double(), None], "^a: wanted a bias torch.float32"),
    ([torch.full((4,), torch.inf), None], "^a: contains Inf"),
])  # fmt: skip
def test_public_refusals(biases, message):
    weights = [weight((4, 6), torch.float32, "cpu") for _ in "ab"]
    before = [W.clone() for W in weights]
    with pytest.raises(ValueError, match=message):
        ck.group_shrink_(weights, 0.1, biases=biases, names=["a", "b"])
    assert all(map(torch.equal, weights, before))


@pytest.fixture(params=DEVICES)
def device(request):
    """The GPU path on the CPU, except for what only a GPU can compute; and on a GPU, if there is one."""
    with cuda_launcher.registered(lambda *launch: None) if request.param == "cpu" else nullcontext():
        yield request.param


def network(device):
    torch.manual_seed(0)
    half = torch.nn.Linear(20, 30).bfloat16()
    half.bias = torch.nn.Parameter(torch.randn(30))  # a dtype other than its weight's
    return torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3), half, torch.nn.Linear(30, 5, bias=False)).to(device)


def numbers(model):
    return [p.detach().clone() for p in model.parameters()]


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def test_step_equals_the_cpu_path(device):
    """In place and without a copy on the host, bit for bit equal to the path with copies."""
    models, steps = [network(device), network("cpu")], []
    at = [p.data_ptr() for p in models[0].parameters()]
    for model in models:
        step = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), group=0.05, l1=0.01)
        steps.append(step)
    steps[0].step()
    with cuda_launcher.registered(None):
        steps[1].step()
    wait(device)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    for got, wanted in zip(numbers(models[0]), numbers(models[1]), strict=True):
        (close if device == "cuda" else partial(torch.testing.assert_close, rtol=0, atol=0))(got.cpu(), wanted)
    assert at == [p.data_ptr() for p in models[0].parameters()]


@pytest.mark.parametrize("broken", ["0.weight", "1.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_weights_stop_all_penalties(device, broken, value):
    """At once; the host raises at the next step, and after the weights are repaired training goes on."""
    model = network(device)
    step = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), group=0.05, l1=0.01)
    parameter = model.get_parameter(broken).detach().view(-1)
    good = parameter[3].clone()
    parameter[3] = value
    before = numbers(model)
    step.step()
    wait(device)
    for got, wanted in zip(numbers(model), before, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=f"^{broken[0]}: contained NaN or Inf at an earlier call; nothing was changed"):
        step.step()
    parameter[3] = good
    step.step()
    assert not torch.equal(numbers(model)[0], before[0]) and all(x.isfinite().all() for x in numbers(model))


def test_number_of_launches_does_not_grow_with_layers(device):
    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found.append(str(function))
            return function(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 9):
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(layers))).to(device)
        step = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), group=0.05, l1=0.01)
        step.step()
        found = []
        with Counted():
            step.step()
        counts.append(
            [name for name in found if not any(word in name for word in ("detach", "view", "empty", "promote_types"))]
        )
    assert counts[0] == counts[1], counts
