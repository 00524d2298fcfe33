"""Removal of dead neurons: exact, or refused with a reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compaware_kernels.compression.dead_neurons import remove_dead_neurons

IMAGE = (2, 3, 9, 9)


class Net(nn.Module):
    """Two convolutions with anything in between: ``between(self, x)``."""

    def __init__(self, between=lambda self, x: x, padding=0, bias=True, groups=1, norm=False):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.b = nn.Conv2d(6, 4, 3, padding=padding, groups=groups)
        self.c = nn.Conv2d(3, 6, 3)
        self.between = between

    def forward(self, x):
        return self.b(self.between(self, self.norm(self.a(x))))


def flat(reader):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6 * 49, 5)

        def forward(self, x):
            return self.fc(reader(F.relu(self.a(x))))

    return Flat()


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(torch.tanh(self.a(x)).mean((2, 3)))


def prepared(model, constant=True):
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "weight") and module.weight is not None:
            nn.init.normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            (
                nn.init.normal_(module.running_mean),
                nn.init.uniform_(module.running_var, 0.5, 2),
                nn.init.normal_(module.bias),
            )
    model = model.double().eval()
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
        if model.a.bias is not None:
            model.a.bias[[1, 4]] = torch.tensor([0.7, -0.3], dtype=torch.float64) if constant else 0.0
    return model


REMOVED = {
    "plain": Net(),
    "no bias": Net(bias=False),
    "batch norm": Net(norm=True),
    "batch norm, relu": Net(lambda s, x: F.relu(x), norm=True),
    "gelu": Net(lambda s, x: F.gelu(x)),
    "method": Net(lambda s, x: x.relu().tanh()),
    "max pool": Net(lambda s, x: F.max_pool2d(x, 2)),
    "padded max pool": Net(lambda s, x: F.max_pool2d(x, 3, 1, 1)),
    "adaptive pool": Net(lambda s, x: F.adaptive_avg_pool2d(x, 5)),
    "flatten": flat(lambda x: torch.flatten(x, 1)),
    "flatten method": flat(lambda x: x.flatten(1)),
    "view": flat(lambda x: x.view(x.size(0), -1)),
    "mean": Pooled(),
    "keyword": Net(lambda s, x: F.relu(input=x)),
}

KEPT = {
    "residual": Net(lambda s, x: x + 1),
    "concatenation": Net(lambda s, x: torch.cat([x[:, :3], x[:, 3:]], 1)),
    "groups": Net(groups=2),
    "control flow": Net(lambda s, x: x if x.sum() > 0 else 2 * x),
    "used twice": Net(lambda s, x: x + s.c(torch.zeros(2, 3, 9, 9, dtype=x.dtype))),
    "random": Net(lambda s, x: F.dropout(x, 0.5)),
    "scaled by position": Net(lambda s, x: x * torch.arange(7, dtype=x.dtype)),
    "padded average pool": Net(lambda s, x: F.avg_pool2d(x, 3, 1, 1)),
    "transposed": Net(lambda s, x: x.transpose(2, 3)),
    "softmax over channels": Net(lambda s, x: x.softmax(1)),
}


def remove(model):
    x = torch.randn(IMAGE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(model.state_dict())
    small, removed, kept = remove_dead_neurons(model, (x,))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the model itself was changed"
    other = torch.randn(IMAGE, dtype=torch.float64)
    return small, removed, kept, other


@pytest.mark.parametrize("name", REMOVED)
def test_exact_removal(name):
    model = prepared(REMOVED[name])
    small, removed, kept, x = remove(model)
    assert removed == {"a": 2} and not kept
    torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-11)
    assert small.a.out_channels == 4


@pytest.mark.parametrize("name", KEPT)
def test_refused_with_a_reason(name):
    _, removed, kept, _ = remove(prepared(KEPT[name]))
    assert not removed and kept["a"].startswith("dead neurons kept: ")


def hooked(model):
    model.b.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def with_its_own_forward(model):
    model.a.forward = lambda x: F.conv2d(x, model.a.weight, model.a.bias) + 1
    return model


def with_more_state(model):
    model.a.register_buffer("scale", torch.ones(6))
    return model


@pytest.mark.parametrize(
    "change, why", [(hooked, "hooks"), (with_its_own_forward, "hooks"), (with_more_state, "state")]
)
def test_layers_with_hooks_or_extra_state_keep_their_size(change, why):
    _, removed, kept, _ = remove(change(prepared(Net())))
    assert not removed and why in kept["a"], kept


def test_a_value_changed_in_place_with_several_readers_is_refused():
    _, removed, kept, _ = remove(prepared(Net(lambda self, x: F.relu(x, inplace=True) + 0 * self.norm(x).sum())))
    assert not removed and "in place" in kept["a"], kept


def test_an_example_without_a_batch_axis_is_refused():
    _, removed, kept = remove_dead_neurons(prepared(Net()), (torch.randn(IMAGE[1:], dtype=torch.float64),))
    assert not removed and "no batch axis" in kept["a"], kept


def test_zero_padding_reads_a_constant_only_where_it_is_zero():
    small, removed, kept, x = remove(model := prepared(Net(padding=1)))
    assert not removed and "zero-padded" in kept["a"]
    small, removed, kept, x = remove(model := prepared(Net(lambda s, x: F.relu(x), padding=1)))
    assert removed == {"a": 1}, "relu makes the negative constant zero"
    torch.testing.assert_close(small(x), model(x), rtol=1e-11, atol=1e-11)
    _, removed, _, _ = remove(prepared(Net(padding=1), constant=False))
    assert removed == {"a": 2}


def test_output_layers_and_shared_layers_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    with torch.no_grad():
        model[2].weight[0] = 0
    _, removed, kept = remove_dead_neurons(model, (torch.randn(3, 4).double(),))
    assert not removed and "output" in kept["2"]
    shared = nn.Linear(4, 4).double()
    with torch.no_grad():
        shared.weight[1] = 0
    _, removed, kept = remove_dead_neurons(nn.Sequential(shared, nn.ReLU(), shared), (torch.randn(3, 4).double(),))
    assert not removed and "more than once" in kept["0"]


def test_linear_on_sequences_followed_by_a_norm_over_another_axis():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double().eval()
    with torch.no_grad():
        model[0].weight[2] = 0
    small, removed, kept = remove_dead_neurons(model, (torch.randn(3, 6, 4).double(),))
    assert not removed and kept
    flat, removed, kept = remove_dead_neurons(model, (torch.randn(3, 4).double(),))
    assert removed == {"0": 1}


def test_one_dead_neuron_is_kept_if_all_are_dead_and_modes_are_kept():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2)).double()
    model[2].eval()
    model[2].weight.requires_grad_(False)
    with torch.no_grad():
        model[0].weight.zero_()
    small, removed, _ = remove_dead_neurons(model, (torch.randn(3, 4).double(),))
    assert removed == {"0": 5} and small[0].out_features == 1
    assert [m.training for m in small] == [True, True, False] and not small[2].weight.requires_grad
