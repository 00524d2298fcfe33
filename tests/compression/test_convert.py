"""Conversion of low-rank models: to torch.nn, torch.export, torch.jit.trace, ONNX."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.folds import FOLDS
from compaware_kernels.nn.lowrank import LowRank
from compaware_kernels.nn.module_surgery import replace
from compaware_kernels.nn.registry import low_rank_type

folds = pytest.mark.parametrize("fold", FOLDS)


class Network(nn.Module):
    """Model with a layer of each kind, nested, one under two names; one output is a dictionary."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU())
        self.body = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, (3, 5), padding="same")])
        self.body.append(self.body[0])
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.body:
            x = x + torch.tanh(layer(x))
        return {"classes": self.head(self.up(x).mean((2, 3)))}


def network(fold="paper"):
    torch.manual_seed(0)
    model = Network()
    for name in ("stem.0", "body.0", "body.1", "up", "head"):
        dense = model.get_submodule(name)
        small = low_rank_type(dense).from_dense(dense, 2, fold)
        model = replace(model, name, small)
    return model.eval(), torch.randn(2, 3, 9, 8)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def ours(model):
    return [name for name, m in model.named_modules() if type(m).__module__.startswith("compaware_kernels")]


# --- plain layers -----------------------------------------------------------------------------------------------------


@folds
@pytest.mark.parametrize("leave", (ck.to_plain, ck.to_dense))
def test_plain_model_has_no_compaware_modules_and_the_same_outputs(leave, fold):
    model, x = network(fold)
    before = copy.deepcopy(model.state_dict())
    plain = leave(model)
    assert len(ours(model)) == 5 and ours(plain) == [] and plain.body[0] is plain.body[2]
    for training in (False, True):
        close(plain.train(training)(x), model.train(training)(x))
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "it is a copy"


def test_keys_of_the_state_dicts():
    model, _ = network()
    names = {"first.weight": "0.weight", "second.weight": "1.weight", "second.bias": "1.bias"}
    wanted = list(model.state_dict())
    for ours_, theirs in names.items():
        wanted = [key.replace(ours_, theirs) for key in wanted]
    assert list(ck.to_plain(model).state_dict()) == wanted
    assert list(ck.to_dense(model).state_dict()) == list(Network().state_dict())


@folds
@pytest.mark.parametrize("leave", (ck.to_plain, ck.to_dense))
def test_plain_checkpoints_load_into_low_rank_models(leave, fold):
    model, x = network(fold)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        assert not other(x)["classes"].any()
        other.load_state_dict(leave(model).state_dict(), strict=True)
        close(other(x), model(x))
        assert torch.isfinite(other(x)["classes"]).all() and other(x)["classes"].any()


def test_a_model_that_is_itself_a_low_rank_layer():
    layer, x = ck.LowRankLinear(9, 7, 2), torch.randn(3, 9)
    assert type(ck.to_plain(layer)) is nn.Sequential and type(ck.to_dense(layer)) is nn.Linear
    close(ck.to_plain(layer)(x), layer(x))
    close(ck.to_dense(layer)(x), layer(x))


def test_fused_layers():
    model, x = network()
    model.head.activation = "gelu"
    plain = ck.to_plain(model)
    assert isinstance(plain.head[2], nn.GELU)
    close(plain(x), model(x))
    with pytest.raises(ValueError, match="head: gelu was fused into it; convert the model first"):
        ck.to_dense(model)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ck.LowRankLinear(8, 8, 2)

        def forward(self, x):
            return self.layer(x) + x

    fused = ck.fuse(Residual(), (torch.randn(2, 8),))
    for leave in (ck.to_plain, ck.to_dense):
        with pytest.raises(ValueError, match="layer: a sum was fused into it; convert the model first"):
            leave(fused)


def test_frozen_weights_dtypes_and_modes_are_kept():
    model, _ = network()
    model.up.requires_grad_(False)
    model.head.double()
    model.stem.train()
    for plain in (ck.to_plain(model), ck.to_dense(model)):
        assert {p.requires_grad for p in plain.up.parameters()} == {False}
        assert {p.dtype for p in plain.head.parameters()} == {torch.float64}
        assert all(m.training for m in plain.stem.modules()) and not any(m.training for m in plain.up.modules())


# --- exporters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", (False, True))
@folds
def test_exported_model_holds_standard_ops_only(fold, strict):
    model, x = network(fold)
    model.stem[0].activation = "silu"
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert called and all(name.startswith("aten.") for name in called)
        for rows in (x, torch.cat([x, x])):
            close(program.module()(rows), model(rows))


def test_traced_model():
    model, x = network()
    with torch.no_grad():
        traced = torch.jit.trace(model, x, strict=False)
        assert "compaware::" not in str(traced.inlined_graph)
        close(traced(torch.cat([x, x])), model(torch.cat([x, x])))
        symbolic = torch.fx.symbolic_trace(model)
        assert "compaware" not in symbolic.code and not any(isinstance(m, LowRank) for m in symbolic.modules())
        close(symbolic(x), model(x))


def run_as_onnx(model, inputs, path):
    """Export to a file, check that it holds only ops of the ONNX standard, and run it there."""
    names = [f"input{i}" for i in range(len(inputs))]
    program = torch.onnx.export(model, inputs, dynamo=True, input_names=names, verbose=False)
    domains = {node.domain for node in program.model.graph}
    assert domains <= {"", "ai.onnx"} and not program.model.functions, domains
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(y) for y in outputs]


@folds
def test_onnx_model(fold, tmp_path):
    model, x = network(fold)
    (got,) = run_as_onnx(model, (x,), tmp_path / "m.onnx")
    with torch.no_grad():
        close(got, model(x)["classes"])


@pytest.mark.parametrize("kind", ("linear", "conv2d"))
def test_onnx_of_fused_layers(kind, tmp_path):
    """Activations and residual sums of fused layers become standard ops, too."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList()
            for activation in ("relu", "relu6", "silu", "gelu"):
                layer = ck.LowRankLinear(8, 8, 3) if kind == "linear" else ck.LowRankConv2d(8, 8, 3, 3, padding=1)
                layer.activation = activation
                self.layers.append(layer)

        def forward(self, x, residual):
            for layer in self.layers:
                x = layer(x, residual=residual)
            return x

    torch.manual_seed(0)
    model, shape = Fused().eval(), (2, 8) if kind == "linear" else (2, 8, 6, 5)
    inputs = torch.randn(shape), torch.randn(shape)
    (got,) = run_as_onnx(model, inputs, tmp_path / "m.onnx")
    with torch.no_grad():
        close(got, model(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_ask_for_the_dtype_of_a_weight(dtype):
    """As ViT, CLIP and T5 do; a weight that is used as a matrix cannot be had of two layers, and fails on its shape."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = ck.LowRankLinear(8, 6, 2)

        def forward(self, x):
            weight = self.layer.weight
            return self.layer(x.to(weight.dtype).to(weight.device)) / weight.shape[0]

    class Computes(Asks):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.layer.weight)

    model, x = Asks().to(dtype).eval(), torch.randn(3, 8)
    plain = ck.to_plain(model)
    torch.testing.assert_close(plain(x), model(x))
    assert plain.state_dict().keys() == {"layer.0.weight", "layer.1.weight", "layer.1.bias"}
    assert plain.double().layer.weight.dtype == torch.float64 and plain(x).dtype == torch.float64
    with pytest.raises(RuntimeError, match="shape"):
        ck.to_plain(Computes())(x)
