"""What counts as the same outputs: of dead-neuron removal, of channels_last weights and of fuse."""

import collections
import random
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compaware_kernels as ck
from compaware_kernels.compression.arguments import Inputs
from compaware_kernels.compression.comparison import difference
from compaware_kernels.compression.dead_neurons import remove_dead_neurons

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
NOISE = "the model itself gives other outputs in every call: it draws random numbers, or keeps a state"
LOWER = torch.ones(5, 5).tril().bool()


class Net(nn.Module):
    """Two layers, the first with a dead neuron, and anything after them: ``after(y)``."""

    def __init__(self, after=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.after = nn.Linear(6, 8), nn.Linear(8, 5), after
        with torch.no_grad():
            self.a.weight[3] = 0

    def forward(self, x):
        return self.after(self.b(torch.relu(self.a(x))))


@dataclass
class Output:
    logits: Tensor
    more: dict = field(default_factory=dict)


@dataclass(slots=True)
class Slotted:
    logits: Tensor


class Cache:
    def __init__(self, keys):
        self.keys, self.me = keys, self


Named = collections.namedtuple("Named", "logits loss")

SAME = {
    "masked scores": lambda y: y.masked_fill(~LOWER, -torch.inf),
    "masked log_softmax": lambda y: y.masked_fill(~LOWER, -torch.inf).log_softmax(-1),
    "all masked: NaN": lambda y: y.masked_fill(~LOWER.roll(-1, 0), -torch.inf).tril(-1).log(),
    "softmax of nothing": lambda y: y.masked_fill(torch.ones(5, 5).bool(), -torch.inf).softmax(-1),
    "masked by the smallest number": lambda y: y.masked_fill(~LOWER, torch.finfo(torch.float32).min),
    "dataclass": Output,
    "slots": Slotted,
    "dataclass in a list": lambda y: [Output(y, {"x": 2 * y})],
    "named tuple": lambda y: Named(y, y.sum()),
    "complex": lambda y: torch.complex(y, -y),
    "sparse": lambda y: y.to_sparse(),
    "mask": lambda y: (y > 0, y),
    "seeded noise": lambda y: y + torch.rand_like(y),
    "dropout": lambda y: F.dropout(y, 0.5, training=True),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_outputs_of_any_kind(name):
    """Dead neurons go, and difference() sees a change of a hundredth."""
    model = Net(SAME[name]).eval()
    small, removed, kept = remove_dead_neurons(model, (X,))
    assert removed == {"a": 1} and not kept
    assert difference(model, small, Inputs((X,))) == ""
    with torch.no_grad():
        small.b.weight.mul_(1.01)
    reasons = {"softmax of nothing": "", "seeded noise": NOISE, "dropout": NOISE}
    assert difference(model, small, Inputs((X,))) == reasons.get(name, "the outputs change")


@pytest.mark.parametrize("name", ["masked scores", "masked log_softmax", "masked by the smallest number", "dataclass"])
def test_fuse_compares_likewise(name):
    model = nn.Sequential(ck.LowRankLinear(6, 5, 2), nn.ReLU(), Call(SAME[name])).eval()
    fused = ck.fuse(model, (X,))
    assert fused.get_submodule("0").activation == "relu"
    assert difference(model, fused, Inputs((X,))) == ""


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


def test_masks_give_no_tolerance():
    """Entries of 3e38 that agree do not excuse errors of others."""
    mask = torch.tensor([torch.finfo(torch.float32).min, 0.0])
    model, other = Call(lambda x: x + mask), Call(lambda x: 1.01 * x + mask)
    assert difference(model, other, Inputs((torch.ones(2),))) == "the outputs change"


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_value_that_is_finite_in_one_model_only(bad):
    for wanted, got in ((1.0, bad), (bad, 1.0), (torch.inf, bad if bad != torch.inf else -bad)):
        models = (Call(lambda x, value=value: torch.stack([x, x * 0 + value])) for value in (wanted, got))
        assert difference(*models, Inputs((torch.ones(2),))) == "the outputs change"


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        (lambda x: x, lambda x: x.double()),
        (lambda x: x, lambda x: x[:1]),
        (lambda x: (x, 3), lambda x: (x, 4)),
        (lambda x: [x], lambda x: [x, x]),
        (lambda x: x.argmax(1), lambda x: x.argmin(1)),
        (lambda x: x, lambda x: x.to_sparse()),
        (lambda x: x > 0, lambda x: x < 0),
    ],
)
def test_other_outputs(wanted, got):
    assert difference(Call(wanted), Call(got), Inputs((X,))) == "the outputs change"


def test_computed_in_bf16_and_returned_in_fp32():
    """The precision is that of the coarsest parameter."""
    W = nn.Parameter(torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).bfloat16())
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    model = Call(lambda x: (x @ W.mT).float())
    other = Call(lambda x: (x[:, :150] @ W[:, :150].mT + x[:, 150:] @ W[:, 150:].mT).float())
    model.W = other.W = W
    error = float((model(x) - other(x)).detach().abs().max())
    assert error > 1e-3 * float(model(x).detach().abs().max()) and difference(model, other, Inputs((x,))) == ""


class Counting(Net):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x) + Counting.calls


def test_models_that_differ_from_themselves_are_named():
    """Noise of other sources than torch, a count of calls; and noise that tracing has made a constant."""
    noisy = Net(lambda y: y + random.random()).eval()
    _, removed, kept = remove_dead_neurons(noisy, (X,))
    assert not removed and kept["a"] == f"dead neurons kept: after their removal, {NOISE}"
    _, removed, kept = remove_dead_neurons(Counting().eval(), (X,))
    assert not removed and kept["a"].endswith(NOISE)
    for make in (lambda y: y + torch.rand(()), lambda y: y + random.random()):
        with pytest.raises(ValueError, match="does not give the outputs of the model on the example inputs: " + NOISE):
            ck.fuse(nn.Sequential(ck.LowRankLinear(6, 5, 2), Traced(make)), (X,))


class Traced(Call):
    """Not a leaf: what its function draws becomes a constant of the graph."""


def test_objects_of_any_class_are_searched():
    """Also one that refers to itself."""
    assert difference(Call(Cache), Call(Cache), Inputs((X,))) == ""
    assert difference(Call(Cache), Call(lambda x: Cache(x + 1)), Inputs((X,))) == "the outputs change"


def test_failure_of_the_changed_model_is_told():
    def fails(y):
        raise RuntimeError("of 5\nonly")

    assert difference(Call(lambda y: y), Call(fails), Inputs((X,))) == "the changed model fails: of 5 only"
    assert difference(Call(lambda y: None), Call(lambda y: None), Inputs((X,))) == "the outputs hold no tensor"


def test_the_random_state_and_the_inputs_are_left_alone():
    model, x = Net(lambda y: F.dropout(y.relu_(), 0.5, True)), X.clone()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    difference(model, model, Inputs((x,)))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, X)
