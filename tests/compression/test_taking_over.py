"""What users have put on a layer, and who else holds it: taken over by the low-rank layer, or the layer stays dense."""

import copy
import functools
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, prune

import compaware_kernels as ck
from compaware_kernels.compression import latency_model
from compaware_kernels.nn.lowrank import LowRank

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
RANK = 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()


def compressed(model, *inputs, **options):
    return ck.compress(model, ck.ranks.fixed(RANK), inputs or (X,), goal="size", **options)


def same_function(small, model, *inputs):
    """Whether ``small`` is ``model`` with the products of its factors as weights."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in small.named_modules():
            if isinstance(layer, LowRank):
                dense.get_submodule(name).weight.copy_(layer.weight)
        torch.testing.assert_close(small(*inputs or (X,)), dense(*inputs or (X,)))


# --- taken over -------------------------------------------------------------------------------------------------------


def _replaced_keyword(module, args, kwargs):
    return (), {"input": 3 * args[0]}


def _buffer(layer):
    layer.register_buffer("scale", torch.full((1,), 2.0))
    layer.register_buffer("step", torch.ones(1), persistent=False)
    layer.register_forward_hook(lambda module, args, y: y * module.scale * module.step)


def _parameter(layer):
    layer.gain = nn.Parameter(torch.full((16,), 2.0))
    layer.register_forward_hook(lambda module, args, y: y * module.gain)


def _reads_the_layer(module, args, y):
    return y + module.weight.sum() + module.in_features + module.bias[0]


TAKEN_OVER = {
    "hook": lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
    "hook with keywords, always called": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, y: 2 * y, with_kwargs=True, always_call=True
    ),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "pre-hook with keywords": lambda layer: layer.register_forward_pre_hook(_replaced_keyword, with_kwargs=True),
    "two hooks in order": lambda layer: [layer.register_forward_hook(lambda module, args, y, k=k: k * (y + k))
                                         for k in (2, 3)],
    "hook that reads the layer": lambda layer: layer.register_forward_hook(_reads_the_layer),
    "buffers": _buffer,
    "parameter": _parameter,
    "load pre-hook": lambda layer: layer.register_load_state_dict_pre_hook(lambda module, *_: None),
    "removed weight norm": lambda layer: nn.utils.parametrize.remove_parametrizations(
        parametrizations.weight_norm(layer), "weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TAKEN_OVER)
def test_taken_over(what, tmp_path):
    """By compress, load, to_plain and to_dense: the outputs are those of the product of the factors."""
    model = network()
    TAKEN_OVER[what](model[0])
    small, report = compressed(model)
    assert [r.rank for r in report.layers] == [RANK, RANK]
    same_function(small, model)
    plain = [] if "reads" in what else [ck.to_plain(small)]  # nn.Sequential has no weight
    for other in (ck.to_dense(small), copy.deepcopy(small), *plain):
        torch.testing.assert_close(other(X), small(X))
    ck.save(small, tmp_path / "small.safetensors")
    assert torch.equal(ck.load(tmp_path / "small.safetensors", model)(X), small(X))
    extra = {key: t for key, t in model.state_dict().items() if key in ("0.scale", "0.gain")}
    assert all(torch.equal(small.state_dict()[key], t) for key, t in extra.items())
    assert "0.step" not in small.state_dict()


def test_backward_hooks_attributes_and_frozen_parts_are_taken_over():
    model, seen = network().train(), []
    model[0].register_full_backward_hook(lambda module, dx, dy: seen.append(("after", dy[0].shape)))
    model[0].register_full_backward_pre_hook(lambda module, dy: seen.append(("before", dy[0].shape)))
    model[0].role, model[1].bias.requires_grad = "query", False
    model[0].eval()
    small, _ = compressed(model)
    small(X.clone().requires_grad_()).sum().backward()
    assert seen == [("before", (3, 16)), ("after", (3, 16))] and small[0].role == "query"
    for other in (small, ck.to_dense(small)):
        assert not other[1].bias.requires_grad and other[1].weight.requires_grad and other[0].bias.requires_grad
        assert not other[0].training and other[1].training


def test_frozen_layers_are_frozen_after_load(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    ck.save(compressed(model)[0], tmp_path / "small.safetensors")
    loaded = ck.load(tmp_path / "small.safetensors", model)
    assert [p.requires_grad for p in loaded.parameters()] == [False] * 3 + [True] * 3


def test_a_handle_kept_by_the_model_still_removes_the_hook():
    model = network()
    model.handle = model[0].register_forward_hook(lambda module, args, y: 2 * y)
    small, _ = compressed(model)
    model.handle.remove()
    before = small(X)
    small.handle.remove()
    assert (small(X) - before).abs().max() > 0.1
    same_function(small, model)


def test_a_load_hook_of_the_dense_layer_still_converts_checkpoints():
    """It renames a key, and gets the low-rank module, which then factorizes the weight."""
    model, modules = network(), []

    def rename(module, state, prefix, *_):
        modules.append(module)
        if prefix + "kernel" in state:
            state[prefix + "weight"] = state.pop(prefix + "kernel")

    model[0].register_load_state_dict_pre_hook(rename)
    small, _ = compressed(model)
    state = {key.replace("0.weight", "0.kernel"): t for key, t in ck.to_dense(small).state_dict().items()}
    wanted = small(X)
    with torch.no_grad():
        small[0].first.weight.zero_()
    small.load_state_dict(state)
    torch.testing.assert_close(small(X), wanted)
    assert modules == [small[0]]


# --- left dense -------------------------------------------------------------------------------------------------------


class Doubled(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def _own_forward(layer, _):
    original = layer.forward
    layer.forward = lambda x: original(x) + 5


def _in_a_closure(layer, model):
    model.register_forward_hook(lambda module, args, y: y + layer.weight.sum())


def _child(layer, _):
    layer.extra = nn.Linear(3, 2)


def _state_dict_hook(layer, _):
    layer.register_state_dict_post_hook(lambda module, state, prefix, _: state.pop(prefix + "bias"))


def _buffer_as_bias(layer, _):
    bias = layer._parameters.pop("bias").detach()
    layer.register_buffer("bias", bias)


def _wider(layer, _):
    layer.in_features = 17  # nn.Linear does not read it


LEFT_DENSE = {
    "forward": (_own_forward, "a forward set on the object"),
    "accelerate": (lambda layer, _: add_hook_to_module(layer, Doubled()), "accelerate.hooks.remove_hook_from_module"),
    "child": (_child, "submodules of its own: extra"),
    "state-dict hook": (_state_dict_hook, "a hook that changes its state dict"),
    "list": (lambda layer, model: setattr(model, "held", [layer]), "the attribute held holds it"),
    "dict in a tuple": (lambda layer, model: setattr(model, "held", ({"a": layer},)), "the attribute held holds it"),
    "list of another layer": (lambda layer, model: setattr(model[1], "tied", [layer.weight]), "the attribute 1.tied"),
    "partial": (lambda layer, model: setattr(model, "call", functools.partial(layer)), "the attribute call holds it"),
    "method": (lambda layer, model: setattr(model, "call", layer.forward), "the attribute call holds it"),
    "closure of a hook": (_in_a_closure, "the attribute _forward_hooks holds it"),
    "attribute": (lambda layer, _: setattr(layer, "rank", 3), "an attribute called rank"),
    "pruned bias": (lambda layer, _: prune.l1_unstructured(layer, "bias", 0.5), "a bias that is no parameter"),
    "buffer as bias": (_buffer_as_bias, "a bias that is no parameter"),
    "another shape": (_wider, "a weight [16, 16] torch.float32, where its attributes say [16, 17]"),
    "buffer": (lambda layer, _: layer.register_buffer("fold", torch.ones(1)), "an attribute called fold"),
}


@pytest.mark.parametrize("what", LEFT_DENSE)
def test_left_dense_with_the_reason(what):
    change, reason = LEFT_DENSE[what]
    model = network()
    change(model[0], model)
    small, report = compressed(model)
    row = {r.name: r for r in report.layers}
    assert row["0"].rank is None and reason in row["0"].reason and row["1"].rank == RANK
    assert type(small[0]) is nn.Linear and torch.equal(small[0].weight, model[0].weight)
    assert set(ck.allocate(model, 0.9, (X,))) == {"1"}
    same_function(small, model)


def test_a_convolution_whose_attributes_were_changed():
    """torch reads another attribute for padding modes than for zeros, which keeps its old value."""
    x, model = torch.randn(1, 8, 9, 9), nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    model[0].padding, model[0].padding_mode, model[1].stride = (1, 1), "circular", (2, 2)
    small, report = compressed(model, x)
    assert [row.rank for row in report.layers] == [None, RANK] and small[1].stride == (2, 2)
    assert "_reversed_padding_repeated_twice = (0, 0, 0, 0), where its other" in report.layers[0].reason
    same_function(small, model, x)


def test_a_bias_that_layers_share_stays_shared(tmp_path):
    model = network()
    model[1].bias = model[0].bias
    small, report = compressed(model)
    ck.save(small, tmp_path / "small.safetensors")
    for other in (small, ck.to_dense(small), ck.to_plain(small), ck.load(tmp_path / "small.safetensors", model)):
        biases = [p for name, p in other.named_parameters(remove_duplicate=False) if name.endswith("bias")]
        assert len(biases) == 2 and biases[0] is biases[1]
        torch.testing.assert_close(other(X), small(X))
    assert report.params == sum(p.numel() for p in small.parameters()) == 4 * 16 * RANK + 16


def test_a_weak_reference_holds_nothing():
    model = network()
    model.held = weakref.ref(model[0])
    assert [r.rank for r in compressed(model)[1].layers] == [RANK, RANK]


def test_what_a_converted_layer_would_lose_is_an_error():
    small, _ = compressed(network())
    _own_forward(small[0], None)
    for leave in (ck.to_plain, ck.to_dense):
        with pytest.raises(ValueError, match="0: wanted a layer that can be replaced; it has a forward set"):
            leave(small)


# --- tied weights -----------------------------------------------------------------------------------------------------


class Language(nn.Module):
    def __init__(self, tie):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(100, 64), nn.Linear(64, 64), nn.Linear(64, 100, bias=False)
        tie(self)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


class Upper(Language):
    def forward(self, hidden):
        return self.head(self.body(hidden))


TIES = {
    "parameter": lambda model: setattr(model.head, "weight", model.embed.weight),
    "data": lambda model: setattr(model.head.weight, "data", model.embed.weight.data),
    "part of a larger one": lambda model: setattr(
        model, "all", nn.Parameter(torch.cat([model.embed.weight, model.head.weight]).detach())
    ) or setattr(model.head, "weight", nn.Parameter(model.all.data[100:])),
    "parameter of the model": lambda model: setattr(model, "alias", model.head.weight),
    "buffer": lambda model: model.register_buffer("alias", model.head.weight.data[10:20]),
}  # fmt: skip


@pytest.mark.parametrize("tie", TIES)
def test_a_tied_weight_stays_dense_for_size(tie):
    """Its factors would come on top of the weight, which the other keeps: 100 x 64 at rank 8 is 1,312 more."""
    tokens, model = torch.arange(6)[None], Language(TIES[tie])
    small, report = ck.compress(model, ck.ranks.fixed(8), (tokens,), goal="size")
    row = {r.name: r for r in report.layers}
    assert row["head"].rank is None and "shares its weight with" in row["head"].reason and row["body"].rank == 8
    assert report.params == report.params_before - 64 * 64 + 2 * 8 * 64
    for of in ("params", "macs"):
        rules = ck.allocate(model, 0.5, (tokens,), of=of)
        assert set(rules) == {"body"}
        _, report = ck.compress(model, rules, (tokens,), goal="size")
        assert report.params < report.params_before
    assert type(small.head) is nn.Linear


@pytest.mark.parametrize("tie", TIES)
def test_a_tied_weight_stays_tied_for_speed(tie, monkeypatch):
    """Also where the example inputs do not reach the other layer that uses it."""
    monkeypatch.setattr(latency_model, "choose", lambda dense, candidates, *_, **__: (candidates[0], 2.0, ""))
    model = Upper(TIES[tie])
    small, report = ck.compress(model, ck.ranks.fixed(8), (torch.randn(1, 6, 64),))
    row = {r.name: r for r in report.layers}
    assert row["body"].rank == 8 and "shares its weight with" in row["head"].reason
    assert type(small.head) is nn.Linear
    small.head.weight = small.embed.weight  # as transformers' tie_weights does


def test_shared_memory_counts_once():
    tokens = (torch.arange(6)[None],)
    sizes = {ck.compress(Language(TIES[tie]), {"body": ck.ranks.fixed(8)}, tokens, goal="size")[1].params_before
             for tie in ("parameter", "data")}  # fmt: skip
    assert sizes == {64 * 100 + 64 * 65}
