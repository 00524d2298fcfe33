"""ProximalStep with parametrized, shared and frozen weights, and parameters added later."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import compaware_kernels as ck
from compaware_kernels.nn.discovery import Layer


def attached(model, **more):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return ck.ProximalStep(model, optimizer, **{"nuclear": 0.2, "group": 0.1, "l1": 0.01} | more)


class Symmetric(nn.Module):
    def forward(self, X):
        return X.triu() + X.triu(1).mT


class Upper(Symmetric):
    def right_inverse(self, A):
        return A.triu()


class Twice(nn.Module):
    def forward(self, X):
        return 2 * X

    def right_inverse(self, A):
        return A / 2


def by(*modules, name="weight"):
    def change(layer):
        for part in modules:
            parametrize.register_parametrization(layer, name, part)
        return layer

    return change


def weight_norm(dim=0):
    return lambda layer: parametrizations.weight_norm(layer, dim=dim)


def each_of(*changes):
    def change_all(layer):
        for change in changes:
            layer = change(layer)
        return layer

    return change_all


WRITABLE = {
    "weight_norm": (lambda: nn.Linear(6, 9), weight_norm()),
    "weight_norm, dim 1": (lambda: nn.Linear(6, 9), weight_norm(1)),
    "weight_norm of all": (lambda: nn.Conv1d(6, 9, 3), weight_norm(None)),
    "weight_norm, transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), weight_norm()),
    "right inverse": (lambda: nn.Linear(6, 9), by(Twice())),
    "two": (lambda: nn.Linear(6, 9), by(Twice(), Twice())),
    "weight_norm, two": (lambda: nn.Linear(6, 9), each_of(weight_norm(), by(Twice()))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WRITABLE)
def test_a_parametrized_weight_is_shrunk_like_a_plain_one(name, dtype):
    """Also with zero rows, which have no direction for weight norm, and must not become NaN."""
    make, change = WRITABLE[name]
    torch.manual_seed(0)
    plain = make().to(dtype)
    rows = Layer("", plain).rows.detach()
    rows *= torch.linspace(0.02, 2, len(rows)).view(-1, *[1] * (rows.ndim - 1))
    Layer("", plain).set_rows(rows)
    layer = change(copy.deepcopy(plain))
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    before, eps = list(layer.parameters()), torch.finfo(dtype).eps
    for module in (layer, plain):
        prox = attached(nn.Sequential(module))
        for _ in range(2):
            prox.step()
        assert not prox.skipped and 0 < prox.report()[0].rows_alive < 1
    W = plain.weight.detach()
    torch.testing.assert_close(layer.weight.detach(), W, rtol=0, atol=8 * eps * float(W.abs().max()))
    torch.testing.assert_close(layer.bias, plain.bias, rtol=8 * eps, atol=eps)
    assert all(p is q for p, q in zip(layer.parameters(), before, strict=True)), (
        "the parameters in the optimizer must stay the same objects"
    )
    layer.weight.sum().backward()
    assert all(p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize("size", [6, 64, 300])
def test_a_symmetric_weight_stays_symmetric_and_is_shrunk_within_the_tolerance(size):
    torch.manual_seed(0)
    layer = nn.Linear(size, size)
    with torch.no_grad():
        layer.weight.copy_(layer.weight + layer.weight.mT)
    by(Upper())(layer)
    wanted = ck.svt(layer.weight.detach().double(), 0.1)
    attached(nn.Sequential(layer), group=0.0, l1=0.0).step()
    assert torch.equal(layer.weight, layer.weight.mT)
    assert torch.linalg.matrix_norm(layer.weight.double() - wanted, 2) < 1e-3 * 0.1


def quietly(hook):
    def change(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return hook(layer)

    return change


UNSUPPORTED = {
    "spectral_norm": (parametrizations.spectral_norm, r"\(_SpectralNorm\) cannot hold a shrunk weight: another"),
    "orthogonal": (parametrizations.orthogonal, r"\(_Orthogonal\) cannot hold a shrunk weight: another"),
    "no right inverse": (by(Symmetric()), "no attribute 'right_inverse'"),
    "two, one without": (by(Symmetric(), Twice()), r"\(Symmetric, Twice\)"),
    "bias": (by(Twice(), name="bias"), r"parametrized \(bias\)"),
    "weight and bias": (each_of(by(Twice(), name="bias"), by(Twice())), r"parametrized \(bias, weight\)"),
    "weight_norm by a hook": (quietly(nn.utils.weight_norm), "made by a hook"),
    "spectral_norm by a hook": (quietly(nn.utils.spectral_norm), "made by a hook"),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "made by a hook"),
    "lazy": (lambda layer: nn.LazyLinear(6), "not initialized yet"),
    "recurrent": (lambda layer: nn.LSTM(6, 6), "only Linear and"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layers_are_skipped_with_a_reason_and_not_changed_by_a_bit(name):
    change, reason = UNSUPPORTED[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), change(nn.Linear(6, 6)))
    model(torch.randn(2, 6)) if name == "orthogonal" else None
    before = {key: t.clone() for key, t in model.state_dict().items() if not nn.parameter.is_lazy(t)}
    prox = attached(model)
    prox.step()
    prox.report()
    assert [layer.name for layer in prox.layers] == ["0"] and list(prox.skipped) == ["1"]
    assert re.search(reason, prox.skipped["1"]), prox.skipped
    changed = {key for key, t in before.items() if not torch.equal(model.state_dict()[key], t)}
    assert changed == {"0.weight", "0.bias"}


class Picky(nn.Module):
    """Right inverse that fails once ``refuses`` is set: raises, or returns another weight; has a buffer of its own."""

    def __init__(self, raises):
        super().__init__()
        self.raises, self.refuses = raises, False
        self.register_buffer("last", torch.zeros(6, 6))

    def forward(self, X):
        return X + 0

    def right_inverse(self, A):
        self.last.copy_(A)
        if self.refuses and self.raises:
            raise RuntimeError("not this one")
        return A * (1 + self.refuses)


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failing_right_inverse_raises_with_the_layers_name_and_changes_no_layer(place, raises):
    torch.manual_seed(0)
    picky = Picky(raises)
    layers = [nn.Linear(6, 6), by(Twice())(nn.Linear(6, 6)), parametrizations.weight_norm(nn.Linear(6, 6))]
    layers.insert(place, by(picky)(nn.Linear(6, 6)))
    model = nn.Sequential(*layers)
    prox = attached(model)
    prox.step()
    picky.refuses = True
    before, state = copy.deepcopy(model.state_dict()), prox.state_dict()
    why = "not this one" if raises else "another weight comes out of it"
    with pytest.raises(ValueError, match=rf"^{place}: its parametrization \(Picky\) cannot .*: {why}"):
        prox.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert prox.state_dict() == state
    picky.refuses = False
    prox.step()
    assert prox.applied == 2


# --- shared, frozen, added later ------------------------------------------------------------------------------------


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_that_an_embedding_and_a_head_share_is_shrunk_once(compiled):
    model = Language()
    wanted = ck.svt(model.head.weight.detach(), 0.1)
    prox = attached(torch.compile(model, backend="eager") if compiled else model, group=0.0, l1=0.0)
    prox.step()
    torch.testing.assert_close(model.embed.weight.detach(), wanted)
    assert model.head.weight is model.embed.weight and "Embedding" in prox.skipped["embed"]


def test_linear_layers_that_share_a_weight_or_its_original():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), by(Twice())(nn.Linear(6, 6)), by(Twice())(nn.Linear(6, 6)))
    model[1].weight = model[0].weight
    model[3].parametrizations.weight.original = model[2].parametrizations.weight.original
    before = [layer.weight.detach().clone() for layer in model]
    prox = attached(model, group=0.0, l1=0.0)
    prox.step()
    for layer, W in zip(model, before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), ck.svt(W, 0.1))
    assert prox.skipped == {"1": "shares its weight with 0", "3": "shares its weight with 2"}


@pytest.mark.parametrize("skip", ["embed", "head"])
def test_skipping_either_layer_skips_a_shared_weight(skip):
    model = Language()
    before = model.embed.weight.detach().clone()
    prox = attached(model, skip=[skip])
    prox.step()
    assert torch.equal(model.embed.weight, before) and [layer.name for layer in prox.layers] == ["body"]
    assert prox.skipped[skip] == "skipped by name"


def test_layers_that_are_frozen_and_unfrozen_later():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6)))
    model[0].requires_grad_(False)
    model[2].parametrizations.weight.original0.requires_grad_(False)  # one of the two originals
    prox = attached(model)
    before = copy.deepcopy(model.state_dict())

    def changed():
        return {key.partition(".")[0] for key, t in model.state_dict().items() if not torch.equal(t, before[key])}

    prox.step()
    assert changed() == {"1"} and list(prox.thresholds()) == ["1"]
    model.requires_grad_(True)
    prox.step()
    assert changed() == {"0", "1", "2"} and list(prox.thresholds()) == ["0", "1", "2"]


@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_a_bias_that_is_not_trained_is_not_in_the_group(how):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    if how == "frozen":
        layer.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(layer.parameters() if how == "frozen" else [layer.weight], lr=1.0)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    ck.ProximalStep(layer, optimizer, group=0.2).step()
    torch.testing.assert_close(layer.weight.detach(), ck.group_shrink(W, 0.2 * 6**0.5))
    assert torch.equal(layer.bias, b)


def test_parameter_groups_added_later_have_their_own_learning_rate():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.5)
    prox = ck.ProximalStep(model, optimizer, nuclear=1.0)
    before = [layer.weight.detach().clone() for layer in model]
    optimizer.add_param_group({"params": model[1].parameters(), "lr": torch.tensor(0.25)})
    prox.step()
    for layer, W, tau in zip(model, before, (0.5, 0.25), strict=True):
        torch.testing.assert_close(layer.weight.detach(), ck.svt(W, tau))
