"""Fused models give the outputs of the original: batch norms, activations, whole models; residual sums: test_fuse_sums.

Each case lists the ops that remain, so that no test passes because nothing was fused.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compaware_kernels as ck
from compaware_kernels.folds import FOLDS
from compaware_kernels.nn.registry import low_rank_type
from tests.helpers.fuse_checks import IMAGE, LAYERS, TOKENS, Net, Net2, check, conv, flags, prepared, same, steps
from tests.helpers.marks import slow_but

# --- batch norm -------------------------------------------------------------------------------------------------------

NORMED = {
    "Linear": (nn.Linear(8, 6), nn.BatchNorm1d, (5, 8)),
    "Conv1d": (nn.Conv1d(8, 6, 3, bias=False), nn.BatchNorm1d, (2, 8, 5)),
    "Conv2d": (nn.Conv2d(8, 6, 3, groups=2, padding=1), nn.BatchNorm2d, (2, 8, 5, 4)),
    "Conv3d": (nn.Conv3d(8, 6, 2), nn.BatchNorm3d, (2, 8, 3, 4, 5)),
    "ConvTranspose1d": (nn.ConvTranspose1d(8, 6, 3), nn.BatchNorm1d, (2, 8, 5)),
    "ConvTranspose2d": (nn.ConvTranspose2d(8, 6, 3, 2, groups=2, bias=False), nn.BatchNorm2d, (2, 8, 5, 4)),
    "ConvTranspose3d": (nn.ConvTranspose3d(8, 6, 2), nn.BatchNorm3d, (2, 8, 3, 4, 5)),
}


@pytest.mark.parametrize("fold", [None, *FOLDS])
@pytest.mark.parametrize("name", NORMED)
def test_batch_norm_is_folded_into_the_weights(name, fold):
    dense, norm, shape = NORMED[name]
    for affine in (True, False):
        layer = low_rank_type(dense).from_dense(dense, 2, fold) if fold else copy.deepcopy(dense)
        fused = check(nn.Sequential(layer, norm(6, affine=affine)), torch.randn(shape))
        assert steps(fused) == [type(layer).__name__] and type(fused.get_submodule("0")) is type(layer)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_batch_norm_in_other_dtypes(dtype):
    model = prepared(nn.Sequential(conv(3), nn.BatchNorm2d(16))).to(dtype)
    fused, x = ck.fuse(model, (IMAGE.to(dtype),)), IMAGE.to(dtype)
    assert steps(fused) == ["LowRankConv2d"] and fused(x).dtype == dtype


def shared():
    a, b = conv(), conv()
    b.second.weight = a.second.weight
    return nn.Sequential(a, nn.BatchNorm2d(16), b)


def hooked(part):
    layer = conv()
    dict(layer.named_modules())[part].register_forward_hook(lambda module, args, y: 2 * y)
    return nn.Sequential(layer, nn.BatchNorm2d(16))


def with_activation():
    layer = conv()
    layer.activation = "relu"
    return nn.Sequential(layer, nn.BatchNorm2d(16))


def normed(layer, norm=None, run=None):
    return Net(run or (lambda m, x: m.norm(m.layer(x))), layer=layer, norm=norm or nn.BatchNorm2d(16))


NOT_FOLDED = {
    "no running statistics": (lambda: normed(conv(), nn.BatchNorm2d(16, track_running_stats=False)), IMAGE),
    "another norm": (lambda: normed(conv(), nn.GroupNorm(2, 16)), IMAGE),
    "along the tokens": (lambda: normed(nn.Linear(16, 6), nn.BatchNorm1d(3)), TOKENS),
    "along as many tokens as features": (lambda: normed(nn.Linear(16, 3), nn.BatchNorm1d(3)), TOKENS),
    "no batch axis": (lambda: normed(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(8)), torch.randn(3, 8)),
    "layer read twice": (lambda: normed(conv(), run=lambda m, x: m.norm(y := m.layer(x)) * y), IMAGE),
    "layer called twice": (lambda: normed(conv(), run=lambda m, x: m.layer(m.norm(m.layer(x)))), IMAGE),
    "norm called twice": (lambda: normed(conv(), run=lambda m, x: m.norm(m.norm(m.layer(x)))), IMAGE),
    "a factor called": (lambda: normed(conv(), run=lambda m, x: m.norm(m.layer(x)) + m.layer.second(x[:, :12])), IMAGE),
    "a weight read": (lambda: normed(nn.Conv2d(16, 16, 1), run=lambda m, x: m.norm(m.layer(x)) + m.layer.bias.sum()),
                      IMAGE),
    "a weight shared": (shared, IMAGE),
    "a hook": (lambda: hooked(""), IMAGE),
    "a hook on a factor": (lambda: hooked("first"), IMAGE),
    "an activation before it": (with_activation, IMAGE),
    "a sum before it": (lambda: normed(conv(), run=lambda m, x: m.norm(m.layer(x, residual=x))), IMAGE),
    "a parametrization": (lambda: normed(nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 1))), IMAGE),
    "a factor of another kind": (lambda: normed(replaced(conv())), IMAGE),
}  # fmt: skip


def replaced(layer):
    layer.second = nn.Sequential(layer.second, nn.Tanh())
    return layer


@pytest.mark.parametrize("why", NOT_FOLDED)
def test_batch_norm_that_cannot_be_fused(why):
    make, x = NOT_FOLDED[why]
    model = make()
    assert any(kind.endswith(("BatchNorm1d", "BatchNorm2d", "GroupNorm")) for kind in steps(check(model, x)))


# --- activations ------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, F.relu_, torch.relu_, lambda x: x.relu(),
             lambda x: x.relu_(), lambda x: F.relu(x, inplace=True), lambda x: F.relu(input=x)],
    "relu6": [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6],
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), F.silu, lambda x: F.silu(x, inplace=True)],
    "gelu": [nn.GELU(), F.gelu, lambda x: F.gelu(x, approximate="none")],
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, layer):
    make, x = LAYERS[layer]
    for f in ACTIVATIONS[name]:
        fused = check(Net(lambda m, x: m.f(m.layer(4 * x)), layer=make(), f=f), x)
        assert steps(fused) == ["mul", type(make()).__name__] and fused.layer.activation == name


@pytest.mark.parametrize(
    "f",
    [
        nn.GELU(approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        nn.Hardtanh(0, 5),
        nn.LeakyReLU(),
        lambda x: F.leaky_relu(x, 0.1),
        lambda x: x.relu() + x,
    ],
)
def test_unknown_activations_stay(f):
    fused = check(Net(lambda m, x: m.f(m.layer(x)), layer=conv(), f=f), IMAGE)
    assert fused.layer.activation == "none" and len(steps(fused)) > 1


def test_hooked_activation_stays():
    relu = nn.ReLU()
    relu.register_forward_hook(lambda module, args, y: y + 1)
    assert steps(check(nn.Sequential(conv(), relu), IMAGE)) == ["LowRankConv2d", "ReLU"]


@pytest.mark.parametrize("run", [lambda m, x: m.layer(m.layer(x).relu()), lambda m, x: m.layer(x).relu() + m.layer(x)])
def test_a_layer_called_twice_is_not_fused(run):
    assert check(Net(run, layer=conv()), IMAGE).layer.activation == "none"


def test_one_activation_module_for_many_layers():
    model = Net(lambda m, x: m.f(m.b(m.f(m.a(x)))), a=conv(), b=conv(3), f=nn.ReLU())
    assert steps(check(model, IMAGE)) == ["LowRankConv2d"] * 2


# --- whole models -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Block of a residual network: two convolutions with norms, and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(3, inputs, outputs, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(3, outputs, outputs, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.shortcut = nn.ReLU(inplace=True), nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(conv(1, inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class Inverted(nn.Module):
    """Block of MobileNetV2 with a depthwise convolution, which is not low-rank."""

    def __init__(self, channels):
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            conv(1, channels, wide), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True),
            conv(1, wide, channels), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class Encoder(nn.Module):
    """Encoder layer of BERT: attention, two linear layers, layer norms after the sums."""

    def __init__(self, width=16):
        super().__init__()
        self.query, self.key, self.value, self.out = (ck.LowRankLinear(width, width, 3) for _ in range(4))
        self.up, self.down = ck.LowRankLinear(width, 4 * width, 3), ck.LowRankLinear(4 * width, width, 3)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.act, self.dropout = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(self.dropout(self.out(y)) + x)
        return self.norm2(x + self.dropout(self.down(self.act(self.up(x)))))


MODELS = {
    "residual": (lambda: nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                       ck.LowRankLinear(32, 10, 3)), IMAGE,
                 ["LowRankConv2d"] * 5 + ["AdaptiveAvgPool2d", "Flatten", "LowRankLinear"], 1),
    "mobile": (lambda: nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), Inverted(16), Inverted(16)), IMAGE,
               ["Conv2d"] + ["LowRankConv2d", "Conv2d", "ReLU6", "LowRankConv2d"] * 2, 2),
    "encoder": (lambda: nn.Sequential(Encoder(), Encoder()), TOKENS,
                (["LowRankLinear", "unflatten", "transpose"] * 3
                 + ["scaled_dot_product_attention", "transpose", "flatten"]
                 + ["LowRankLinear", "LayerNorm", "LowRankLinear", "LowRankLinear", "LayerNorm"]) * 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    make, x, left, in_place = MODELS[name]
    fused = check(make(), x)
    assert sorted(steps(fused)) == sorted(left) and len(flags(fused)) == in_place
    same(copy.deepcopy(fused)(x), fused(x))
    assert fused.state_dict().keys() <= make().state_dict().keys() | {f"{k}.bias" for k, _ in fused.named_modules()}


@pytest.mark.parametrize("name", slow_but(["residual"], MODELS))
def test_compiled(name):
    make, x, *_ = MODELS[name]
    fused = check(make(), x)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for inputs in (x, torch.cat([x, x])):
            for _ in range(2):
                same(compiled(inputs), fused(inputs))


def test_other_outputs_and_inputs():
    def run(m, x, more):
        return {"y": [m.a(x) + more["z"]], "x": x}

    model = Net2(run, a=conv(3))
    fused = ck.fuse(model, [IMAGE, {"z": IMAGE.cos()}])
    same(fused(IMAGE, {"z": IMAGE.sin()}), model.eval()(IMAGE, {"z": IMAGE.sin()}))


def test_convolutions_get_channels_last_and_views_of_them_still_work():
    def run(m, x):
        return m.fc(m.b(m.a(x)).view(x.size(0), -1)).view(torch.int32).view(torch.float32)

    model = Net(run, a=conv(3), b=nn.Conv2d(16, 4, 3), c=nn.Conv3d(1, 2, 2), fc=nn.Linear(48, 3))
    fused = ck.fuse(model, (IMAGE,))
    last = [p.is_contiguous(memory_format=torch.channels_last) for p in fused.parameters() if p.ndim == 4]
    assert last == [True] * 3
    same(fused(IMAGE), model.eval()(IMAGE))
    check(nn.Sequential(nn.Conv3d(8, 4, 2), nn.ReLU()), torch.randn(2, 8, 3, 3, 3))


def test_example_inputs_that_the_model_overwrites():
    model = Net(lambda m, x: m.layer(x.add_(1)), layer=conv())
    x = IMAGE.clone()
    fused = ck.fuse(model, (x,))
    assert torch.equal(x, IMAGE)
    same(fused(x.clone()), model.eval()(x.clone()))


def test_refusals():
    with pytest.raises(TypeError, match=r"wanted a tuple of the model's inputs, \(x,\); got a tensor"):
        ck.fuse(nn.Sequential(conv()), IMAGE)
    branching = Net(lambda m, x: m.layer(x) if x.sum() > 0 else x, layer=conv())
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace the model: .*control flow"):
        ck.fuse(branching, (IMAGE,))
    with pytest.raises(ValueError, match=r"cannot trace the model: .*shape"):
        ck.fuse(nn.Sequential(nn.Linear(7, 3)), (TOKENS,))
    by_size = Net(lambda m, x: m.layer(x) * torch.rand(()), layer=conv())
    with pytest.raises(ValueError, match="does not give the outputs of the model"):
        ck.fuse(by_size, (IMAGE,))


class Options(nn.Module):
    """Branches on its arguments, which torch.fx can follow only if they are constants."""

    def __init__(self):
        super().__init__()
        self.layer = ck.LowRankLinear(16, 16, 5)

    def forward(self, x, mask=None, *, scale=1.0, relu: bool = False):
        y = self.layer(x)
        y = y if mask is None else y * mask
        return scale * (F.relu(y) if relu else y)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((TOKENS,), {}),
        ((TOKENS,), {"relu": True}),
        ({"x": TOKENS, "scale": 0.5}, None),
        ({"x": TOKENS, "relu": True}, {"scale": 0.5}),
        ((TOKENS, TOKENS.sign()), {"relu": True}),
        ((TOKENS,), {"mask": TOKENS.sign(), "scale": 2.0}),
    ],
)
def test_keywords_and_arguments_that_are_not_given(args, kwargs):
    model, given = Options().eval(), {**(args if isinstance(args, dict) else {}), **(kwargs or {})}
    fused = ck.fuse(model, args, kwargs)
    positional = () if isinstance(args, dict) else args
    same(fused(*positional, **given), model(*positional, **given))
    if given == {"relu": True} and len(positional) == 1:
        assert fused.get_submodule("layer").activation == "relu"
