"""Models with parts that are no plain modules: what is not touched stops nothing, and stays of its type."""

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import quantize_dynamic

import compaware_kernels as ck
from compaware_kernels._utils.copied import copied

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
rank = ck.ranks.fixed(2)
pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.jit|torch.ao.quantization|isinstance.treespec)")


def lin():
    return nn.Linear(16, 16)


class Dual(fx.GraphModule):
    """A subclass of GraphModule with state and modes of its own, as torchvision's feature extractors have."""

    def __init__(self, root, graph):
        super().__init__(root, graph, "Dual")
        self.modes = []

    def train(self, mode=True):
        self.modes.append(mode)
        return super().train(mode)


def dual():
    root = nn.Sequential(lin(), nn.ReLU())
    return Dual(root, fx.Tracer().trace(root))


PARTS = {
    "scripted": lambda: torch.jit.script(lin()),
    "traced": lambda: torch.jit.trace(lin(), X),
    "exported": lambda: torch.export.export(lin(), (X,)).module(),
    "dynamically quantized": lambda: quantize_dynamic(nn.Sequential(lin())),
    "data parallel": lambda: nn.DataParallel(lin()),
    "compiled": lambda: torch.compile(lin(), backend="eager"),
    "graph module": lambda: fx.symbolic_trace(nn.Sequential(lin(), nn.ReLU())),
    "subclass of graph module": dual,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(lin()),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_foreign_part_beside_a_layer(kind):
    torch.manual_seed(0)
    model = nn.Sequential(lin(), lin(), PARTS[kind]())
    with torch.no_grad():
        for t in (model[0].weight, model[0].bias):
            t[3:6] = 0
    small, report = ck.compress(model, rank, (X,), goal="size")
    rows = {row.name: row for row in report.layers}
    assert rows["0"].neurons_removed == 3 and rows["0"].rank == rows["1"].rank == 2
    dense, plain, fused = ck.to_dense(small), ck.to_plain(small), ck.fuse(small, (X,))
    with torch.no_grad():
        for other in (dense, plain, fused):
            torch.testing.assert_close(other(X), small(X), rtol=1e-5, atol=1e-5)
    assert {"0", "1"} <= set(ck.allocate(model, 0.9, (X,)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    prox = ck.ProximalStep(model, torch.optim.SGD(parameters, lr=0.1), nuclear=0.1)
    prox.step()
    assert {"0", "1"} <= {layer.name for layer in prox.layers} and prox.applied == 1
    if kind in ("scripted", "traced"):
        assert "compress the model first" in report.skipped["2"] == prox.skipped["2"]


@pytest.mark.parametrize("goal", ["size", "speed"])
@pytest.mark.parametrize("make", [lambda: fx.symbolic_trace(nn.Sequential(lin(), nn.ReLU())), dual])
def test_the_type_of_a_graph_module_stays(make, goal):
    model = make()
    model.note, model.training = {"a": 1}, False
    model.register_forward_hook(lambda module, args, y: 2 * y)
    with torch.no_grad():
        wanted = model(X)
    small, _ = ck.compress(model, rank, (X,), goal=goal)
    for other in (small, ck.to_dense(small), ck.to_plain(small), copied(model)):
        assert type(other).__mro__[1] is type(model).__mro__[1] and type(other).__name__ == type(model).__name__
        assert other.note == {"a": 1} and other.note is not model.note and not other.training
    torch.testing.assert_close(copied(model)(X), wanted)
    torch.testing.assert_close(small(X), ck.to_dense(small)(X))
    assert not hasattr(model, "modes") or copied(model).train().modes[-1]


NOTHING = {
    "LSTM": (lambda: nn.Sequential(nn.LSTM(16, 16)), "only Linear and (transposed) convolutions fold"),
    "scripted": (lambda: torch.jit.script(nn.Sequential(lin())), "scripted or traced"),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(lin())), "parametrized (weight)"),
}


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("ranks", [rank, {"*": rank}])
def test_a_model_with_nothing_to_compress_comes_back_with_the_reasons(kind, ranks):
    make, reason = NOTHING[kind]
    model = make().eval()
    small, report = ck.compress(model, ranks, (X,))
    wanted, got = (m(X)[0] for m in (model, small))
    assert torch.equal(wanted, got) and report.layers == [] and reason in report.skipped["0"]
    assert report.params == report.params_before == sum(p.numel() for p in model.parameters())
    assert ck.allocate(model, 0.5, (X,)) == {}


def test_a_model_without_layers_and_one_of_which_all_are_skipped():
    assert ck.compress(nn.LayerNorm(16), rank, (X,))[1].skipped == {}
    assert ck.compress(nn.Sequential(lin()), rank, (X,), skip=["*"])[1].skipped == {"0": "skipped by name"}
    with pytest.raises(ValueError, match="'head' matches no layer; layers: 0"):
        ck.compress(nn.Sequential(lin()), {"head": rank}, (X,))


def test_computed_tensors_as_attributes():
    """deepcopy refuses them: a cache of the last output, in containers, a buffer; their copies are detached."""
    model = nn.Sequential(lin(), lin())
    model.cache, model.inside = 2 * model[0].weight, [{"a": 3 * model[1].weight}]
    model.many = [i * model[1].bias for i in range(50)]
    model.register_buffer("scale", model[0].weight.sum())
    small, report = ck.compress(model, rank, (X,), goal="size")
    assert [r.rank for r in report.layers] == [2, 2]
    for other in (small, ck.to_dense(small), ck.to_plain(small), copied(model)):
        assert torch.equal(other.cache, model.cache) and other.cache.is_leaf and model.cache.grad_fn is not None
        assert torch.equal(other.inside[0]["a"], model.inside[0]["a"])
        assert all(map(torch.equal, other.many, model.many))
    torch.testing.assert_close(ck.fuse(small, (X,))(X), small(X))
    assert set(ck.allocate(model, 0.9, (X,))) == {"0", "1"}


class Masked(nn.Module):
    """An encoder with a padding mask, which gives its layers nested tensors in eval mode."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.before, self.encoder, self.after = lin(), nn.TransformerEncoder(layer, 2), lin()

    def forward(self, x, mask):
        return self.after(self.encoder(self.before(x), src_key_padding_mask=mask))


@pytest.mark.parametrize("goal", ["size", "speed"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_a_padding_mask(goal, calibrated):
    inputs = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    model = Masked().eval()
    small, report = ck.compress(model, rank, inputs, goal=goal, calibration=[inputs] if calibrated else None)
    reasons = {row.name: row.reason for row in report.layers}
    assert reasons["encoder.layers.1.linear1"] == "nn.TransformerEncoderLayer reads its weight directly"
    assert reasons["encoder.layers.0.self_attn.out_proj"] == "nn.MultiheadAttention reads its weight directly"
    with torch.no_grad():
        assert small(*inputs).shape == model(*inputs).shape


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_fuse_of_a_model_that_is_one_layer_or_in_data_parallel(wrap):
    layer = ck.LowRankLinear(16, 8, 2).eval()
    net = nn.Sequential(layer, nn.ReLU()).eval()
    with torch.no_grad():
        for inputs in ((X,), {"input": X}):
            torch.testing.assert_close(ck.fuse(wrap(layer), inputs)(X), layer(X))
        fused = ck.fuse(wrap(net), (X,))
        torch.testing.assert_close(fused(X), net(X))
    assert fused.get_submodule("0").activation == "relu" and layer.activation == "none"


def test_sequentials_of_to_plain_have_the_geometry_of_the_layer():
    for layer in (ck.LowRankConv1d(4, 6, 3, 2, stride=2), ck.LowRankConvTranspose2d(4, 6, (3, 5), 2, padding=1)):
        plain = ck.to_plain(layer)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(plain, name) == getattr(layer, name)
        assert not {"_packed", "rank"} & vars(plain).keys()
    assert ck.to_plain(ck.LowRankLinear(4, 6, 2)).out_features == 6
