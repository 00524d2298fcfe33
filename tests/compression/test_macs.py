"""Multiply-adds: counted without autograd state, by whatever way layers are called; unknown is an answer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression.macs import count_macs

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers of 64 multiply-adds per row, called by ``run(self, x)``."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.run = nn.Linear(8, 8), nn.Linear(8, 8), run

    def forward(self, x, **more):
        return self.run(self, x, **more)


class Inner(nn.Module):
    """A module whose inputs and parameters are differentiated inside of the forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        with torch.enable_grad():
            return torch.cat([self.layer(part.requires_grad_()) for part in x.detach().split(1)]).detach()


def checkpointed(net, x):
    with torch.enable_grad():
        return torch.utils.checkpoint.checkpoint(net.a, x, use_reentrant=False)


COUNTED = {
    "positional": (lambda m, x: m.b(m.a(x)), 3 * 64, 3 * 64),
    "keyword": (lambda m, x: m.b(input=m.a(input=x)), 3 * 64, 3 * 64),
    "gradients within": (lambda m, x: m.b(Inner().to(x)(m.a(x)) * 0 + m.a(x)), 2 * 3 * 64, 3 * 64),
    "checkpointed": (lambda m, x: m.b(checkpointed(m, x)), 3 * 64, 3 * 64),
    "twice": (lambda m, x: m.b(m.a(m.a(x))), 6 * 64, 3 * 64),
    "not reached": (lambda m, x: m.a(x), 3 * 64, 0),
    "in inference mode": (lambda m, x: torch.inference_mode()(lambda: m.b(m.a(x)))(), 3 * 64, 3 * 64),
}


@pytest.mark.parametrize("name", COUNTED)
def test_layers_are_counted(name):
    run, a, b = COUNTED[name]
    macs = count_macs(Net(run), (X,))
    assert (macs.get("a", 0), macs.get("b", 0)) == (a, b)
    assert macs[""] == a + b + (3 * 64 if name == "gradients within" else 0)


def test_parts_that_want_gradients():
    """A module called on tensors that require gradients, where autograd is off or on: torch's own tracker fails."""

    def run(m, x):
        x = x.clone().requires_grad_()
        return m.b(m.a(x))

    with torch.enable_grad():
        assert count_macs(Net(run), (X,)) == {"": 6 * 64, "a": 3 * 64, "b": 3 * 64}


def refuses_modes(m, x):
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        raise RuntimeError("no modes here")
    return m.b(F.relu(m.a(x)))


@pytest.mark.parametrize("goal", ["size", "speed"])
def test_a_count_that_fails_stops_no_compression(goal):
    model = Net(refuses_modes).eval()
    with torch.no_grad():
        model.b.weight.copy_(torch.outer(torch.arange(8.0), torch.ones(8)))
    small, report = ck.compress(model, {"b": ck.ranks.fixed(1)}, (X,), goal=goal)
    assert (report.macs_before, report.macs, report.layers[1].macs) == (None, None, None)
    assert "unknown" in str(report) and report.to_dict()["macs"] is None
    assert report.layers[1].rank == (1 if goal == "size" else None)
    torch.testing.assert_close(small(X), model(X))
    with pytest.raises(ValueError, match="multiply-adds of this model cannot be counted; wanted of='params'"):
        ck.allocate(model, 0.5, (X,))
    assert set(ck.allocate(model, 0.5, (X,), of="params")) == {"a", "b"}


def test_errors_of_the_model_itself_are_raised():
    def fails(m, x):
        raise ZeroDivisionError("of the model")

    for run, error in ((fails, ZeroDivisionError), (lambda m, x: m.a(x.T), RuntimeError)):
        with pytest.raises(error):
            ck.compress(Net(run), ck.ranks.fixed(1), (X,))


def test_hooks_are_removed_and_modes_restored():
    model = Net(COUNTED["positional"][0]).train()
    model.b.eval()
    before = len(torch.nn.modules.module._global_forward_hooks), torch.backends.mha.get_fastpath_enabled()
    count_macs(model, (X,))
    with pytest.raises(RuntimeError):
        count_macs(model, (X.T,))
    assert [m.training for m in model.modules()] == [True, True, False]
    assert before == (len(torch.nn.modules.module._global_forward_hooks), torch.backends.mha.get_fastpath_enabled())


def test_a_layer_that_fails_and_is_caught():
    """What runs after it is not its."""

    def run(m, x):
        try:
            m.a(x.T)
        except RuntimeError:
            return m.b(x)

    assert count_macs(Net(run), (X,)) == {"": 3 * 64, "b": 3 * 64}


def test_parts_of_encoders_are_counted():
    """Torch's fused kernels would hide them, with a padding mask in nested tensors."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    mask = torch.tensor([[False, False, True]])
    macs = count_macs(encoder, (X[None],), {"src_key_padding_mask": mask})
    assert macs["layers.0.linear1"] == macs["layers.0.linear2"] == 3 * 8 * 16 and macs[""] > 6 * 8 * 16
