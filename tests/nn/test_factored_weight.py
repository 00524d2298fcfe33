"""``weight`` of a low-rank layer: that of the dense layer, read-only; metadata costs no product."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compaware_kernels as ck
from compaware_kernels.folds import FOLDS
from compaware_kernels.nn.lowrank import LowRank
from compaware_kernels.nn.registry import low_rank_type

DENSE = {
    "Linear": lambda: nn.Linear(7, 5),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=1, bias=False),
    "Conv3d": lambda: nn.Conv3d(2, 4, 3, dilation=2, padding_mode="circular"),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
}


def pair(name, fold="paper"):
    """A dense layer and its low-rank layer of full rank."""
    torch.manual_seed(0)
    dense = DENSE[name]().double()
    rank = min(ck.folds.to_matrix(ck.folds.oriented(dense.weight, type(dense), getattr(dense, "groups", 1)), fold,
                                  getattr(dense, "groups", 1)).shape[-2:])  # fmt: skip
    return dense, low_rank_type(dense).from_dense(dense, rank, fold)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("fold", FOLDS)
def test_it_is_the_dense_weight(name, fold):
    dense, layer = pair(name, fold)
    W = layer.weight
    assert isinstance(W, torch.Tensor) and not isinstance(W, nn.Parameter)
    torch.testing.assert_close(W + 0, dense.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(W.data + 0, layer.to_dense().weight.data, rtol=0, atol=0)
    for attribute in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "itemsize"):
        assert getattr(W, attribute) == getattr(dense.weight, attribute), attribute
    for method in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__"):
        assert getattr(W, method)() == getattr(dense.weight, method)(), method


@pytest.mark.parametrize("name", DENSE)
def test_all_attributes_of_the_dense_layer_are_there(name):
    """Also in a layer made by its constructor, not from a dense one; values as of torch's own."""
    dense, layer = pair(name)
    arguments = {key: getattr(dense, key) for key in ("in_features", "out_features", "in_channels", "out_channels",
                 "kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
                 if hasattr(dense, key) and (key != "output_padding" or "Transpose" in name)}  # fmt: skip
    made = type(layer)(**arguments, rank=1, bias=dense.bias is not None)
    for low_rank in (layer, made):
        for attribute, value in vars(dense).items():
            if attribute not in vars(nn.Module()):
                assert getattr(low_rank, attribute) == value, attribute
        assert low_rank.weight.shape == dense.weight.shape and (low_rank.bias is None) == (dense.bias is None)


def test_metadata_forms_no_product(monkeypatch):
    layer = ck.LowRankLinear(7, 5, 2)
    monkeypatch.setattr(LowRank, "product", None)
    monkeypatch.setattr(ck.LowRankLinear, "product", None)
    W = layer.weight
    assert (W.dtype, W.device, tuple(W.shape), W.requires_grad) == (torch.float32, torch.device("cpu"), (5, 7), True)
    assert not W.data.requires_grad and W.data.dtype == W.dtype and W.numel() == 35 and torch.is_floating_point(W)
    assert not ck.LowRankLinear(7, 5, 2).requires_grad_(False).weight.requires_grad
    with pytest.raises(TypeError):
        W + 1


class Reads(nn.Module):
    """Reads the weights, in ways of models of transformers and timm, and calls no layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv, self.up = nn.Linear(16, 12), nn.Conv1d(8, 6, 3, groups=2), nn.ConvTranspose1d(6, 8, 3)

    def forward(self, x, z):
        x = x.to(self.linear.weight.dtype)
        y = F.linear(x, self.linear.weight, self.linear.bias)
        z = F.conv1d(z, self.conv.weight, self.conv.bias, self.conv.stride, groups=self.conv.groups)
        z = F.conv_transpose1d(z, self.up.weight.view(self.up.weight.shape), self.up.bias)
        return (y * (self.linear.weight @ x.mT).mT).sum() + z.square().sum() + (2 * self.conv.weight[0]).sum()


INPUTS = torch.randn(3, 16), torch.randn(2, 8, 9)


def reading():
    """The model with low-rank layers, and the same with dense ones of the same weights."""
    ranks = {"linear": ck.ranks.fixed(3), "conv": ck.ranks.fixed(1), "up": ck.ranks.fixed(2)}
    small, _ = ck.compress(Reads().eval(), ranks, INPUTS, goal="size")
    assert len(small.state_dict()) == 9
    return small, ck.to_dense(small)


def test_a_model_that_reads_weights_and_its_gradients():
    small, dense = reading()
    for model in (small, dense):
        model(*INPUTS).backward()
    torch.testing.assert_close(small(*INPUTS), dense(*INPUTS))
    for name in ("linear", "conv", "up"):
        layer, W = small.get_submodule(name), dense.get_submodule(name).weight
        first, second = torch.autograd.grad(layer.product(), [layer.first.weight, layer.second.weight], W.grad)
        torch.testing.assert_close(layer.first.weight.grad, first)
        torch.testing.assert_close(layer.second.weight.grad, second)


def test_a_model_that_reads_weights_is_compiled_exported_traced_and_copied():
    small, dense = reading()
    wanted = dense(*INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(small, backend="aot_eager", fullgraph=True)(*INPUTS), wanted)
        torch.testing.assert_close(torch.export.export(small, INPUTS).module()(*INPUTS), wanted)
        torch.testing.assert_close(torch.jit.trace(small, INPUTS)(*INPUTS), wanted)
        torch.testing.assert_close(torch.fx.symbolic_trace(small)(*INPUTS), wanted)
        torch.testing.assert_close(ck.fuse(small, INPUTS)(*INPUTS), wanted)
    assert torch.compile(small, backend="aot_eager", fullgraph=True)(*INPUTS).requires_grad
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(*INPUTS), small(*INPUTS))


def test_transforms_of_torch_func():
    small, _ = reading()
    parameters = {name: p.detach() for name, p in small.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(small, parameters, INPUTS)

    grads = torch.func.grad(loss)(parameters)
    small(*INPUTS).backward()
    for name, p in small.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    wanted = torch.stack([loss(parameters), loss({name: 2 * p for name, p in parameters.items()})])
    torch.testing.assert_close(torch.func.vmap(loss)(stacked), wanted, rtol=1e-5, atol=1e-3)


WRITES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "data": lambda layer: layer.weight.data.clamp_(0, 1),
    "new data": lambda layer: setattr(layer.weight, "data", torch.zeros(5, 7)),
    "requires_grad": lambda layer: layer.weight.requires_grad_(False),
    "gradient": lambda layer: setattr(layer.weight, "grad", torch.zeros(5, 7)),
    "out": lambda layer: torch.mul(torch.ones(5, 7), 2, out=layer.weight),
    "list": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(5, 7))),
    "normal_": lambda layer: nn.init.normal_(layer.weight),
    "xavier_uniform_": lambda layer: nn.init.xavier_uniform_(layer.weight),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused_and_nothing_changes(write):
    layer = ck.LowRankLinear(7, 5, 2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match=r"weight of a low-rank layer: wanted reads only"):
        WRITES[write](layer)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_it_is_no_parameter():
    layer = ck.LowRankLinear(7, 5, 2)
    assert "weight" not in layer.state_dict() | dict(layer.named_parameters())
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([layer.weight], lr=0.1)
    assert torch.zeros(5, 7).copy_(layer.weight).equal(layer.product())
    assert type(copy.deepcopy(layer.weight)) is type(layer.weight)


def test_the_dtype_under_autocast_is_that_of_the_factors():
    layer = ck.LowRankLinear(7, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == (layer.weight + 0).dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_input(layout):
    layer, rows = ck.LowRankLinear(7, 5, 2).eval(), [torch.randn(2, 7), torch.randn(4, 7)]
    with torch.no_grad():
        y = layer(torch.nested.nested_tensor(rows, layout=layout))
    for got, x in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(got, layer(x))
