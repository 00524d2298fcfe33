"""Low-rank layers in each way that a measurement may choose: values, epilogues, changed weights, compiled graphs."""

import copy
import math
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import compaware_kernels as ck
from compaware_kernels.compression import latency_model
from compaware_kernels.folds import FOLDS
from compaware_kernels.ops import library, lowrank_ways, prepacked, tuner
from compaware_kernels.ops.lowrank_ways import DENSE, ONE_KERNEL, PREPACKED, TWO_STEPS
from tests.helpers.lowrank_checks import assert_as_good
from tests.nn import test_lowrank
from tests.nn.test_lowrank import LAYERS, low_rank, network, ops_of

WAYS = (ONE_KERNEL, TWO_STEPS, PREPACKED, DENSE)
LAST = torch.channels_last
DTYPES = [torch.float32] + [torch.bfloat16] * prepacked._has(torch.bfloat16)
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def measuring(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPAWARE_TUNE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuner.forget()
    yield
    tuner.forget()


@pytest.fixture
def winner(monkeypatch):
    """winner(way): that way is measured to be the fastest, where it is possible; returns the keys asked for."""

    def win(way):
        keys = []

        def times(key, candidates):
            calls = candidates()
            for call in calls.values():
                call()  # what is timed must run
            keys.append(key)
            return {name: 1.0 if name == way else 2.0 for name in calls}

        monkeypatch.setattr(tuner, "times", times)
        return keys

    return win


def taken(layer, x):
    """The way that the layer takes: by the ops that run."""
    layer(x)  # measures
    with torch.profiler.profile() as profile:
        layer(x)
    count = {event.key: event.count for event in profile.key_averages()}
    if any(name.startswith("compaware::lowrank") for name in count):
        return ONE_KERNEL
    packed = sum(times for name, times in count.items() if name.startswith("mkldnn::_"))
    return {0: TWO_STEPS, 1: DENSE, 2: PREPACKED}[packed]


@ways
@pytest.mark.parametrize("name", LAYERS)
def test_values(name, way, winner):
    winner(way)
    for fold, dtype, form in product(FOLDS, DTYPES, (torch.contiguous_format, LAST)):
        layer, x = low_rank(name, fold)
        layer, x = layer.eval().to(dtype), x.to(dtype)
        if x.ndim == 4:
            layer, x = layer.to(memory_format=form), x.contiguous(memory_format=form)
        plain, dense = layer.to_sequential(), copy.deepcopy(layer).double().to_dense()
        with torch.inference_mode():
            reference, truth = plain(x), dense(x.double())
            residual = torch.randn_like(reference)
            for activation, add in product(("none", "relu", "silu", "gelu", "relu6"), (None, residual)):
                layer.activation = activation
                act = getattr(torch.nn.functional, activation) if activation != "none" else lambda y: y
                sums = [y if add is None else y + add.to(y.dtype) for y in (reference, truth)]
                got = layer(x, add)
                assert_as_good(got, act(sums[1]), act(sums[0]), f"{name}, {fold}, {dtype}, {activation}")
                assert x.ndim != 4 or got.is_contiguous(memory_format=form)
            over = residual.clone(memory_format=torch.preserve_format)
            if name != "linear":
                got = layer(x, over, in_place=True)
                assert_as_good(got, act(sums[1]), act(sums[0]), f"{name}, {fold}, {dtype}, in place")


@ways
@pytest.mark.parametrize("name", ("linear", "conv2d", "grouped", "same"))
def test_the_winner_runs(name, way, winner):
    winner(way)
    layer, x = low_rank(name)
    layer.eval()
    with torch.inference_mode():
        assert taken(layer, x) == (TWO_STEPS if way == ONE_KERNEL and library.missing else way)
        why = layer.why_two_step(x)
        assert why == "" if taken(layer, x) == ONE_KERNEL else why == f"{way}: measured to be faster"
        assert f"measured fastest: {way}" in repr(layer)


CHANGES = (
    "_step",
    "_load",
    "_load_assign",
    "_edit_data",
    "_new_parameter",
    "_new_factor",
    "_train_and_back",
    "_dtypes",
)


@ways
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_packing(change, way, winner, monkeypatch):
    winner(way)
    monkeypatch.setattr(test_lowrank, "close", lambda got, wanted: assert_as_good(got, wanted.double(), wanted))
    test_lowrank.test_weights_that_change_after_packing(getattr(test_lowrank, change))


@pytest.mark.parametrize(("way", "value"), [*((way, math.nan) for way in WAYS), (PREPACKED, math.inf)])
def test_nan_and_inf_propagate(way, value, winner):
    """Inf also in two layers, whichever they are: in one, inf times the product of the factors may be another inf."""
    winner(way)
    for name, activation in product(("linear", "conv2d"), ("none", "relu", "relu6", "silu", "gelu")):
        layer, x = low_rank(name)
        layer.eval().activation = activation
        x[0, 1, 2] = value
        with torch.no_grad():
            got, wanted = layer(x), layer.to_sequential()(x)
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf()), (name, activation)


@pytest.mark.parametrize("way", (PREPACKED, DENSE))
def test_what_is_prepacked_is_made_once_and_never_copied(way, winner):
    winner(way)
    layer, x = low_rank("conv2d")
    layer.eval()
    with torch.no_grad():
        wanted, (packed, _) = layer(x), layer._prepacked[way]
        layer(x)
        assert layer._prepacked[way][0] is packed
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not other._prepacked and not other._choices
            layer.first.weight.mul_(2)
            assert torch.equal(other(x), wanted) and not torch.equal(layer(x), wanted)
            layer.first.weight.div_(2)
    assert not layer.train()._prepacked or layer.eval()._prepacked == {}


def test_training_and_modes_of_torch_go_by_rules(winner):
    keys = winner(DENSE)
    layer, x = low_rank("conv2d")
    dense = x.clone().requires_grad_()
    layer.train()(x).sum().backward()
    with torch.no_grad():
        layer(x)  # in training mode
    layer.eval()(dense).sum().backward()
    assert dense.grad is not None and layer.first.weight.grad is not None
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        torch.func.vmap(layer)(x[None])
        layer(x[0])  # no batch axis
        layer(x[:0])
        torch.jit.trace(layer, x, check_trace=False)
    assert not keys
    with torch.no_grad():
        layer(x)
    assert len(keys) == 1


def test_a_key_has_all_that_the_time_depends_on(winner):
    keys, threads = winner(TWO_STEPS), torch.get_num_threads()
    layer, x = low_rank("conv2d")
    layer.eval()
    with torch.no_grad():
        y = layer(x)
        layer(x)
        assert len(keys) == 1
        layer(x.contiguous(memory_format=LAST))
        layer(x[:1])
        layer(x, y)
        layer(x, y.clone(), in_place=True)
        layer.activation = "relu"
        layer(x)
        try:
            torch.set_num_threads(threads + 1)
            layer(x)
        finally:
            torch.set_num_threads(threads)
        layer.bfloat16()(x.bfloat16())
    assert len(set(keys)) == len(keys) == 8
    other, keys = low_rank("conv2d")[0].eval(), winner(TWO_STEPS)
    with torch.no_grad():
        other(x)
    assert len(keys) == 1 and keys[0] in keys


def test_inputs_without_end_are_not_all_measured(winner):
    keys = winner(PREPACKED)
    layer = low_rank("linear")[0].eval()
    with torch.no_grad():
        for tokens in range(1, 40):
            x = torch.randn(tokens, 19)
            torch.testing.assert_close(layer(x), layer.to_sequential()(x), rtol=1e-5, atol=1e-5)
    assert len(keys) == 16


def test_it_measures():
    """No winner is set: all ways are timed, and one of them runs."""
    layer, x = low_rank("conv2d")
    layer.eval()
    with torch.no_grad():
        layer(x)
        call = layer._call(x, None, False)
        times = lowrank_ways.times(call)
        assert set(times) == set(lowrank_ways.ways(call)) and min(times.values()) > 0
        assert taken(layer, x) == lowrank_ways.fastest(call) == min(times, key=times.get)
    assert tuner.file().exists()


# --- compilers --------------------------------------------------------------------------------------------------------


def targets(model, x, **options):
    """Names of the operations of the graph that torch.compile makes of the model, and its output."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(model, backend=backend, fullgraph=True, **options)(x)
    return [getattr(node.target, "__name__", str(node.target)) for node in graphs[0].graph.nodes], y


@pytest.mark.parametrize("freezing", (False, True))
@ways
def test_the_choice_is_in_the_graph(way, freezing, winner):
    keys = winner(way)
    model, x = network()
    with torch._inductor.config.patch(freezing=freezing):
        names, y = targets(model, x, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    convolutions, kernels = names.count("conv2d"), sum("lowrank_conv2d" in name for name in names)
    assert (keys and kernels + convolutions / 2 == 2) or (way == DENSE and freezing)
    if (way == TWO_STEPS and not freezing) or (way == PREPACKED and freezing):
        assert convolutions == 4 and not kernels
    if way == ONE_KERNEL and not library.missing:
        assert kernels == 2
    if way == DENSE and freezing:
        assert convolutions == 2 and not kernels


def test_graphs_for_any_shape_go_by_rules(winner):
    keys = winner(DENSE)
    model, x = network()
    targets(model, x, dynamic=True)
    assert not keys


def test_exported_graphs_stay_as_they_are(winner):
    keys = winner(DENSE)
    model, x = network()
    program = torch.export.export(model, (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert not keys and names.count("aten.conv2d.default") == 4 and not any("compaware" in name for name in names)


@pytest.mark.slow
@ways
def test_inductor(way, winner):
    winner(way)
    model, x = network()
    for module in model.modules():
        if isinstance(module, ck.LowRankConv2d):
            module.activation = "relu"
    with torch.no_grad():
        wanted = nn.Sequential(*(copy.deepcopy(m).to_sequential() if hasattr(m, "rank") else m for m in model))(x)
        for freezing in (False, True):
            torch._dynamo.reset()
            with torch._inductor.config.patch(freezing=freezing):
                y = torch.compile(model, dynamic=False)(x)
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_the_latency_model_counts_the_faster_way(monkeypatch):
    device = latency_model.Device(rate=1e11, bandwidth=1e12, dense=1e-5, low_rank=1.0)
    monkeypatch.setattr(latency_model, "measure_device", lambda *_: device)
    low, x = ck.LowRankConv2d(64, 100, 3, 24, padding=1).requires_grad_(False).eval(), torch.randn(2, 64, 28, 28)
    predicted = latency_model.predict(low, x, low.to_sequential()(x))
    monkeypatch.setenv("COMPAWARE_TUNE", "off")
    one = latency_model.predict(low, x, low.to_sequential()(x))
    assert predicted < 1e-2 and (one > 1.0 or library.missing)


def test_off(monkeypatch, winner):
    keys = winner(DENSE)
    monkeypatch.setenv("COMPAWARE_TUNE", "off")
    layer, x = low_rank("conv2d")
    layer.eval()
    with torch.no_grad():
        assert "compaware::lowrank_conv2d" in ops_of(lambda: layer(x)) or library.missing
    assert not keys
