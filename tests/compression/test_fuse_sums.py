"""Residual sums in fused models: every form of them; in place only where no other op reads the memory."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compaware_kernels as ck
from tests.helpers.fuse_checks import IMAGE, LAYERS, Net, Net2, check, conv, flags, same, steps

# --- residual sums ----------------------------------------------------------------------------------------------------

SUMS = {
    "x + f(x)": lambda m, x: x + m.layer(x),
    "f(x) + x": lambda m, x: m.layer(x) + x,
    "torch.add": lambda m, x: torch.add(x, m.layer(x)),
    "add": lambda m, x: x.add(m.layer(x)),
    "iadd": lambda m, x: operator.iadd(m.layer(x), x),
    "add_": lambda m, x: m.layer(x).add_(x),
    "then relu": lambda m, x: F.relu(m.layer(x) + x),
    "in place, then relu": lambda m, x: m.layer(x).add_(x).relu_(),
    "dropout": lambda m, x: nn.functional.relu(m.dropout(m.layer(x)) + x),
}
NO_SUMS = {
    "alpha": lambda m, x: torch.add(m.layer(x), x, alpha=2),
    "broadcast": lambda m, x: m.layer(x) + x[:1],
    "to a larger one": lambda m, x: m.layer(x[:1]) + x,
    "a number": lambda m, x: m.layer(x) + 1,
    "itself": lambda m, x: (y := m.layer(x)) + y,
    "of another dtype": lambda m, x: m.layer(x) + x.bfloat16(),
    "minus": lambda m, x: m.layer(x) - x,
    "into the other term": lambda m, x: (2 * x).add_(m.layer(x)),
    "after the activation": lambda m, x: F.gelu(m.layer(x)) + x,
    "read twice": lambda m, x: ((y := m.layer(x)) + x) * y,
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", SUMS)
def test_residual_sums(form, layer):
    make, x = LAYERS[layer]
    fused = check(Net(SUMS[form], layer=make(), dropout=nn.Dropout()), x)
    assert steps(fused) == [type(make()).__name__] and len(flags(fused, "residual")) == 1
    assert fused.layer.activation == ("relu" if "relu" in form or form == "dropout" else "none")


@pytest.mark.parametrize("form", NO_SUMS)
def test_sums_that_are_not_residual_stay(form):
    fused = check(Net(NO_SUMS[form], layer=conv(3)), IMAGE)
    assert flags(fused, "residual") == [] and len(steps(fused)) > 1


def test_one_residual_per_layer():
    """A second sum, and one after an activation, stay outside of the layer."""

    def given(m, x):
        return (m.layer(x, 2 * x) + x).relu()

    assert steps(check(Net(given, layer=conv()), IMAGE)) == ["mul", "LowRankConv2d", "add", "relu"]
    fused = check(Net(lambda m, x: m.layer(x, residual=2 * x).relu(), layer=conv()), IMAGE)
    assert steps(fused) == ["mul", "LowRankConv2d"]
    layer = conv()
    layer.activation = "gelu"
    assert steps(check(Net(lambda m, x: m.layer(x) + x, layer=layer), IMAGE)) == ["LowRankConv2d", "add"]
    assert steps(check(Net(lambda m, x: m.layer(x).relu(), layer=layer), IMAGE)) == ["LowRankConv2d", "relu"]


def test_fusing_twice():
    model = Net(lambda m, x: m.b(m.norm(F.relu(m.a(x)))) + x, a=conv(), b=conv(3), norm=nn.BatchNorm2d(16))
    once = check(model, IMAGE)
    assert steps(check(once.train(), IMAGE)) == steps(once) == ["LowRankConv2d", "BatchNorm2d", "LowRankConv2d"]


def test_output_size_is_passed_on():
    layer = ck.LowRankConvTranspose2d(16, 16, 3, 5, stride=2, padding=1)

    def run(m, x, y):
        return F.relu(m.layer(x, output_size=y.shape[-2:]) + y)

    for size in (11, 12):
        fused = check(Net2(run, layer=layer), IMAGE, torch.randn(2, 16, size, 9))
        assert steps(fused)[-1] == "LowRankConvTranspose2d" and len(flags(fused, "output_size")) == 1


def test_a_layer_does_not_move_past_a_write():
    """Fused it would run where the sum was, when its input or the other term has been overwritten."""

    def input_changes(m, x):
        x = 2 * x
        y = m.layer(x)
        return y + x.relu_()

    def input_changes_in_a_module(m, x):
        x = 2 * x
        y = m.layer(x)
        return y + m.relu(x)

    def term_changes(m, x):
        r = 2 * x
        y = m.layer(x) + r
        r.mul_(2)
        return F.relu(y) * r

    for run in (input_changes, input_changes_in_a_module, term_changes):
        check(Net(run, layer=conv(), relu=nn.ReLU(inplace=True)), IMAGE)


# --- in place ---------------------------------------------------------------------------------------------------------

IN_PLACE = {
    "a convolution's": lambda m, x: m.a(x) + m.b(x),
    "a low-rank layer's": lambda m, x: F.relu(m.a(x) + m.c(x)),
    "read by layers before": lambda m, x: m.a(m.c(r := m.b(x))) + r,
    "the shortcut is Identity": lambda m, x: m.a(m.c(r := m.b(x))) + m.identity(r),
    "normed": lambda m, x: m.norm(m.a(x)) + m.norm2(m.b(x)),
    "of two sums": lambda m, x: F.relu(m.c(x) + (r := m.b(x))).tanh() + F.relu(m.a(x) + r),
}
NOT_IN_PLACE = {
    "read later": lambda m, x: (m.a(x) + (r := m.b(x))) * r,
    "read later by a layer": lambda m, x: (m.a(x) + (r := m.b(x))) + m.d(r),
    "the model's input": lambda m, x: m.a(x) + x,
    "returned, too": lambda m, x: (m.a(x) + (r := m.b(x)), r),
    "its own input": lambda m, x: m.a(r := m.b(x)) + r,
    "a view of something": lambda m, x: (m.a(x) + (y := 2 * x).view(2, 16, 6, 5)) * y,
    "flattened, and read later": lambda m, x: (m.a(x) + (y := m.b(x)).flatten(2).view(2, 16, 6, 5)) * y,
    "rectified in place, and read later": lambda m, x: ((y := m.b(x)).relu_() + m.a(x)) * y,
    "viewed, and the view is read later": lambda m, x: ((v := (r := m.b(x)).flatten(1)), m.a(x) + r, v * 1)[1:],
    "read by a module that returns a view": lambda m, x: ((v := m.flatten(r := m.b(x))), m.a(x) + r, v * 1)[1:],
    "read by Identity with a hook": lambda m, x: ((v := m.hooked(r := m.b(x))), m.a(x) + r, v * 1)[1:],
    "seen by a hook": lambda m, x: m.a(x) + m.seen(x),
    "a parameter": lambda m, x: m.a(x) + m.parameter,
    "an activation's": lambda m, x: m.a(x) + F.relu(m.b(x)),
}


def branches(run):
    torch.manual_seed(0)
    model = Net(run, a=conv(3), b=nn.Conv2d(16, 16, 3, padding=1), c=conv(), d=nn.Conv2d(16, 16, 1),
                norm=nn.BatchNorm2d(16), norm2=nn.BatchNorm2d(16), identity=nn.Identity(), hooked=nn.Identity(),
                flatten=nn.Flatten(), seen=nn.Conv2d(16, 16, 1))  # fmt: skip
    model.parameter = nn.Parameter(torch.randn(2, 16, 6, 5))
    model.hooked.register_forward_hook(lambda module, args, y: y)
    model.seen.register_forward_hook(lambda module, args, y: y)
    return model


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_where_nothing_else_reads(case):
    fused = check(branches(IN_PLACE[case]), IMAGE)
    assert flags(fused) == [True] and len(flags(fused, "residual")) == (2 if case == "of two sums" else 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_in_place_only_for_layers_that_support_it(layer):
    make, x = LAYERS[layer]
    fused = check(Net(lambda m, x: m.layer(x) + m.other(x), layer=make(), other=make()), x)
    assert flags(fused) == ([True] if layer in ("conv2d", "spatial") else []) and len(flags(fused, "residual")) == 1


@pytest.mark.parametrize("case", NOT_IN_PLACE)
def test_not_in_place(case):
    fused = check(branches(NOT_IN_PLACE[case]), IMAGE)
    assert flags(fused) == [] and flags(fused, "residual")


def test_a_layer_does_not_move_past_a_sum_in_place():
    def run(m, x):
        r = m.b(x)
        y, z = m.a(x), m.c(r)
        return z + (y + r)

    fused = check(branches(run), IMAGE)
    assert flags(fused) == [True] and steps(fused)[-1] == "add"


def test_nothing_is_overwritten_with_gradients():
    model = branches(lambda m, x: F.silu(m.a(x) + m.b(x)))
    model.a.requires_grad_(False)
    fused, other = ck.fuse(model, (IMAGE,)), copy.deepcopy(model).eval()
    assert flags(fused) == [True] and fused.a.why_two_step(IMAGE) in ("", "C++ library: not built")
    for m in (fused, other):
        m(IMAGE).square().sum().backward()
    same(fused.b.weight.grad, other.b.weight.grad)
