"""Which layers can become low-rank: ProximalStep, compress, allocate and export_lora agree, and say why not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import compaware_kernels as ck
from compaware_kernels.nn.discovery import foldable_layers, why_no_matrix
from compaware_kernels.nn.holders import why_dense

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


class Standardized(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.norm(), bias)


class Repr(nn.Linear):
    def extra_repr(self):
        return "only another text"


class Named(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.abs(), self.bias)


Named.__name__ = "Linear"


class Merging(nn.Linear):
    def merge(self):
        return self.weight


class Bottleneck(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.head, self.layer = nn.Linear(16, 16), layer

    def forward(self, x):
        y = self.layer(self.head(x)[:, None] if isinstance(self.layer, nn.Conv1d) else self.head(x))
        return y.flatten(1)


CLASSES = {
    "forward": (lambda: Scaled(16, 16), f"{__name__}.Scaled, a subclass of nn.Linear with its own forward"),
    "_conv_forward": (
        lambda: Standardized(1, 1, 3),
        "subclass of nn.Conv1d with its own _conv_forward",
    ),
    "alike": (lambda: Named(16, 16), f"{__name__}.Linear, a subclass of nn.Linear with its own forward"),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_subclass_with_a_forward_of_its_own_is_neither_shrunk_nor_factorized(kind):
    make, reason = CLASSES[kind]
    model = Bottleneck(make())
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), nuclear=0.1)
    assert [layer.name for layer in prox.layers] == ["head"] and reason in prox.skipped["layer"]
    _, report = ck.compress(model, ck.ranks.fixed(2), (X,), goal="size")
    assert {r.name: r.rank for r in report.layers} == {"head": 2, "layer": None}
    assert reason in report.layers[1].reason and set(ck.allocate(model, 0.9, (X,))) == {"head"}


def test_a_subclass_that_only_prints_otherwise_is_factorized(tmp_path):
    model = nn.Sequential(Repr(16, 16), nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16))
    for goal in ("size", "speed"):
        small, report = ck.compress(model, ck.ranks.fixed(2), (X,), goal=goal, measure=goal == "speed")
        assert goal == "speed" or [r.rank for r in report.layers] == [2, 2]
    small, _ = ck.compress(model, ck.ranks.fixed(2), (X,), goal="size", calibration=[(X,)])
    ck.save(small, tmp_path / "m.safetensors")
    assert torch.equal(ck.load(tmp_path / "m.safetensors", model)(X), small(X))
    assert ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), nuclear=0.1).skipped == {}


def test_a_subclass_with_methods_that_others_may_call_stays_dense():
    _, report = ck.compress(nn.Sequential(Merging(16, 16)), ck.ranks.fixed(2), (X,), goal="size")
    assert report.layers[0].rank is None and "with its own merge" in report.layers[0].reason


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return x @ self.weight


Foreign.__name__ = "Linear"


def test_a_class_that_only_has_the_name_of_torchs_is_named_with_its_module(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), Foreign())
    reason = f"{__name__}.Linear: only Linear and (transposed) convolutions fold to matrices"
    assert ck.compress(model, ck.ranks.fixed(2), (X,), goal="size")[1].skipped == {"1": reason}
    base = copy.deepcopy(model)
    with torch.no_grad():
        model[1].weight += 1
    row = ck.export_lora(model, base, tmp_path / "adapter").layers[-1]
    assert row.name == "1" and f"a {__name__}.Linear has no low-rank update" in row.note


@pytest.mark.parametrize("wrapped", [False, True])
def test_parts_that_a_parent_reads_are_neither_shrunk_nor_factorized(wrapped):
    """Also behind the wrapper of activation checkpointing, and under whichever name comes first."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.ModuleDict({"shared": encoder.self_attn.out_proj, "encoder": encoder, "head": nn.Linear(16, 16)}), X
    if wrapped:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

        encoder.linear1 = CheckpointWrapper(encoder.linear1, checkpoint_fn=checkpoint)
    model.forward = lambda x: model["head"](model["encoder"](x[None])[0])
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), nuclear=0.1)
    assert [layer.name for layer in prox.layers] == ["head"]
    wanted = {"shared": "nn.MultiheadAttention", "encoder.linear1": "nn.TransformerEncoderLayer",
              "encoder.linear2": "nn.TransformerEncoderLayer"}  # fmt: skip
    for name, parent in wanted.items():
        assert prox.skipped[name] == f"{parent} reads its weight directly"
    if not wrapped:
        names = [layer.name for layer in foldable_layers(model)[0]]
        assert why_dense(model, names) == {name: prox.skipped[name] for name in wanted} and "head" in names
        assert model(x).shape == (3, 16)


def test_a_model_of_which_nothing_can_be_shrunk_says_why():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ValueError, match=r"nothing to shrink; .*linear1: nn\.TransformerEncoderLayer reads its weight"):
        ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), nuclear=0.1)


# --- weights that are no real dense matrix ----------------------------------------------------------------------------


class Cast(nn.Module):
    """Runs a layer on inputs of its own kind, so that a layer of any dtype or layout can be part of a model."""

    def __init__(self, layer, run=lambda layer, x: x):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x):
        return self.run(self.layer, x)


def _with(weight):
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(weight(layer.weight.detach()), requires_grad=False)
    return layer


def _complex(layer, x):
    return layer(x.to(torch.complex64)).real


WEIGHTS = {
    "complex64": (lambda: Cast(nn.Linear(16, 16, dtype=torch.complex64), _complex), "its weight is complex64"),
    "complex conv": (lambda: Cast(nn.Conv1d(3, 3, 3, padding=1, dtype=torch.complex64), _complex), "complex64"),
    "sparse_coo": (lambda: Cast(_with(torch.Tensor.to_sparse)), "its weight is sparse_coo, not dense"),
    "sparse_csr": (lambda: Cast(_with(torch.Tensor.to_sparse_csr)), "its weight is sparse_csr, not dense"),
    "mkldnn": (lambda: Cast(_with(torch.Tensor.to_mkldnn)), "its weight is _mkldnn, not dense"),
    "int8": (lambda: Cast(_with(lambda W: W.to(torch.int8))), "its weight is int8"),
    "float8": (lambda: Cast(_with(lambda W: W.to(torch.float8_e4m3fn))), "its weight is float8_e4m3fn"),
    "meta": (lambda: Cast(nn.Linear(16, 16, device="meta")), "its weight is on the meta device"),
    "empty": (lambda: nn.Sequential(nn.Linear(16, 0), nn.Linear(0, 16)), "its weight [0, 16] is empty"),
    "parametrized complex": (lambda: Cast(nn.utils.parametrizations.orthogonal(
        nn.Linear(16, 16, dtype=torch.complex64)), _complex), "ParametrizedLinear: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_weights_are_skipped_with_the_reason_and_what_is_beside_them_is_treated(kind):
    make, reason = WEIGHTS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), make())
    small, report = ck.compress(model, ck.ranks.fixed(2), (X,), goal="size")
    name = "1.0" if kind == "empty" else "1.layer"
    assert [(r.name, r.rank) for r in report.layers] == [("0", 2)] and reason in report.skipped[name]
    assert small(X).shape == (3, 16) and set(ck.allocate(model, 0.9, (X,))) == {"0"}
    prox = ck.ProximalStep(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
                           nuclear=0.5)  # fmt: skip
    before = model[0].weight.detach().clone()
    prox.step()
    assert [layer.name for layer in prox.layers] == ["0"] and reason in prox.skipped[name]
    assert len(prox.report()) == 1 and not torch.equal(model[0].weight, before)


def test_a_nested_weight_and_a_tensor_of_a_class_of_its_own():
    assert "nested" in why_no_matrix(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    twice = TwoTensor(torch.ones(3, 2), torch.ones(3, 2))
    assert "TwoTensor, not a plain tensor" in why_no_matrix(twice)
    assert why_no_matrix(torch.ones(3, 2)) == ""


def test_export_lora_stores_a_complex_layer_whole(tmp_path):
    base = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8, dtype=torch.complex64)})
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8, dtype=torch.complex64)})
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        model["b"].weight += 1j
        model["a"].weight += torch.ones(8, 1) @ torch.ones(1, 8)
    report = ck.export_lora(model, base, tmp_path / "adapter")
    rows = {row.name: row for row in report.layers}
    assert rows["a"].rank == 1 and rows["b"].rank is None and "its weight is complex64" in rows["b"].note
