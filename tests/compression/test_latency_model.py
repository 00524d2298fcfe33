"""Latency model: which layers are factorized for speed, by prediction or measurement, and what compress does with
it."""

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression import latency_model
from compaware_kernels.ops import library

DEVICE = latency_model.Device(rate=1e11, bandwidth=1e10, dense=1e-5, low_rank=2e-5)
X = torch.randn(2, 64, 28, 28)


@pytest.fixture(autouse=True)
def known_device(monkeypatch):
    monkeypatch.setattr(latency_model, "measure_device", lambda *_: DEVICE)
    monkeypatch.setattr(latency_model, "_measured", {})


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 4)).eval()


def seconds(layer, x=X):
    return latency_model.predict(layer.eval(), x, layer(x))


def test_predictions_match_hand_calculation():
    dense = nn.Conv2d(64, 100, 3, padding=1, stride=2)
    pixels = 2 * 14 * 14
    assert seconds(dense) == pytest.approx(1e-5 + pixels * 112 * 576 / 1e11)  # 100 columns are padded to 112
    moved = 4 * (X.numel() + pixels * 100 + 64 * 100)
    assert seconds(nn.Conv2d(64, 100, 1, stride=2)) == pytest.approx(1e-5 + moved / 1e10)
    grouped = nn.Conv2d(64, 64, 3, groups=16)
    # 4 columns per group, padded to 16
    assert seconds(grouped) == pytest.approx(1e-5 + 2 * 26 * 26 * 16 * 16 * 36 / 1e11)


@pytest.mark.skipif(bool(library.missing), reason="no CPU kernel")
def test_one_kernel_and_two_steps():
    low = ck.LowRankConv2d(64, 100, 3, 24, padding=1).requires_grad_(False)
    pixels = 2 * 28 * 28
    assert seconds(low) == pytest.approx(2e-5 + pixels * (32 * (576 + latency_model.TAP * 9) + 112 * 24) / 1e11)
    separable = ck.LowRankConv2d(64, 100, 3, 24, padding=1, fold="spatial").requires_grad_(False)
    steps = pixels * 32 * 192 / 1e11, pixels * 112 * 72 / 1e11
    assert seconds(separable) == pytest.approx(2e-5 + sum(steps))  # two dense overheads


def test_a_layer_must_gain_enough():
    dense = nn.Linear(512, 512)
    x, y = torch.randn(64, 512), torch.randn(64, 512)
    choice, gain, reason = latency_model.choose(dense, [("paper", 32)], x, y, measured=False)
    assert choice == ("paper", 32) and gain > 1.25 and reason.endswith("x predicted")
    choice, gain, reason = latency_model.choose(dense, [("paper", 240)], x, y, measured=False)
    assert choice is None and gain < 1.25 and "rank 240" in reason and "1.25x is wanted" in reason


def test_measuring_takes_the_fastest_and_is_cached(monkeypatch):
    calls = []

    def timed(functions, device):
        calls.append([f().shape for f in functions])
        return [1.0, 0.9, 0.5, 0.7]

    monkeypatch.setattr(latency_model, "seconds", timed)
    dense, folds = nn.Conv2d(64, 32, 3, padding=1), [(fold, 8) for fold in ("paper", "spatial", "input")]
    for _ in range(2):
        choice, gain, reason = latency_model.choose(dense, folds, X, dense(X), measured=True)
        assert choice == ("spatial", 8) and gain == 2.0 and reason == "2x measured"
    assert calls == [[(2, 32, 28, 28)] * 4]
    latency_model.choose(dense, folds, X[:1], dense(X[:1]), measured=True)  # another input is measured again
    assert len(calls) == 2


def test_the_fastest_probe_counts(monkeypatch):
    """Whatever else ran on the machine during all rounds but one."""
    monkeypatch.undo()
    probes = []

    def times(calls, device):
        probes.append(calls)
        return [[2e-3, 1e-3 if len(probes) == 3 else 2e-3, 2e-3] for _ in calls]

    monkeypatch.setattr(latency_model, "times", times)
    device = latency_model.measure_device.__wrapped__(torch.device("cpu"), torch.float32, 1)
    assert device == latency_model.Device(128 * 128 * 9 * 400 / 1e-3, 2 * 4 * 2**21 / 1e-3, 2e-3, 2e-3)


def test_interleaved_calls():
    order = []
    times = latency_model.seconds([lambda: order.append(0), lambda: order.append(1)], torch.device("cpu"))
    assert order[:4] == [0, 1, 0, 1] and len(order) >= 2 * latency_model.ROUNDS and all(0 < t < 1 for t in times)


def test_the_device_is_measured(monkeypatch):
    monkeypatch.undo()
    device = latency_model.measure_device(torch.device("cpu"), torch.float32, torch.get_num_threads())
    assert 1e8 < device.rate < 1e14 and 1e8 < device.bandwidth < 1e13
    assert 1e-7 < device.dense < 1e-2 and 1e-7 < device.low_rank < 1e-2


def test_recording_inputs_changes_nothing():
    model = network()
    wanted = model(X)
    seen = latency_model.record(model, ["0", "5"], (X,))
    assert torch.equal(seen["0"][0], X) and torch.equal(seen["5"][1], wanted) and torch.equal(model(X), wanted)
    assert not any(module._forward_hooks for module in model.modules())


# --- compress -------------------------------------------------------------------------------------------------------


def test_compress_for_speed_explains_every_layer():
    model = network()
    small, report = ck.compress(model, ck.ranks.share(0.2), (X,))
    first, second, last = report.layers
    assert (first.rank, second.rank, last.rank) == (32, None, None)  # 26, rounded up to a multiple of 8
    assert first.gain > 1.25 and "predicted" in first.reason and "1.25x is wanted" in second.reason
    assert isinstance(small[0], ck.LowRankConv2d) and isinstance(model[0], nn.Conv2d)
    assert small[0].second.weight.is_contiguous(memory_format=torch.channels_last)
    exact, _ = ck.compress(model, ck.ranks.share(1.0), (X,))
    assert [type(a) for a in exact] == [type(a) for a in model]


def test_compress_by_size_times_nothing(monkeypatch):
    monkeypatch.setattr(latency_model, "choose", None)
    small, report = ck.compress(network(), ck.ranks.share(0.2), (X,), goal="size")
    assert [layer.rank for layer in report.layers] == [26, 2, 1] and all(layer.gain is None for layer in report.layers)
    assert torch.equal(small(X), small.eval()(X))


def test_fold_auto_takes_the_best(monkeypatch):
    _, report = ck.compress(network(), ck.ranks.fixed(4), (X,), fold="auto", goal="size")
    small, _ = ck.compress(network(), ck.ranks.fixed(4), (X,), fold="auto", goal="size")
    sizes = {
        fold: ck.compress(network(), ck.ranks.fixed(4), (X,), fold=fold, goal="size")[1].layers[0].params
        for fold in ("paper", "spatial", "input")
    }
    assert report.layers[0].params == min(sizes.values()) == sizes[small[0].fold] and len(set(sizes.values())) == 3


def test_a_whole_model_that_is_no_faster_stays_dense(monkeypatch):
    monkeypatch.setattr(latency_model, "seconds", lambda calls, device: [1.0, *[0.5] * (len(calls) - 1)])
    small, report = ck.compress(network(), ck.ranks.share(0.2), (X,), measure=True)
    assert [layer.rank for layer in report.layers] == [32, 2, 1] and report.layers[0].gain == 2.0
    monkeypatch.setattr(latency_model, "fastest", lambda models, inputs: 0)
    small, report = ck.compress(network(), ck.ranks.share(0.2), (X,), measure=True)
    assert not any(isinstance(module, ck.LowRankConv2d) for module in small.modules())
    assert "whole model was measured" in report.layers[0].reason and report.layers[0].rank is None


@pytest.mark.parametrize(("times", "best"), [([1.0, 0.9], 1), ([1.0, 0.97], 0), ([1.0, 1.1], 0)])
def test_fastest_is_beyond_noise(monkeypatch, times, best):
    monkeypatch.setattr(latency_model, "seconds", lambda calls, device: times)
    assert latency_model.fastest([network(), network()], (X,)) == best


class Views(nn.Module):
    """Network whose forward calls view, which fails in channels_last."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(64, 128, 3, padding=1), nn.Linear(128 * 28 * 28, 3)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


def test_a_model_that_cannot_run_in_channels_last_stays_in_nchw():
    model = Views().eval()
    small, report = ck.compress(model, {"conv": ck.ranks.fixed(16)}, (X,))
    assert report.layers[0].rank == 16 and small.conv.first.weight.is_contiguous()
    assert small(X).shape == (2, 3)


def test_a_model_with_3d_convolutions_too():
    layers = [nn.Conv2d(64, 128, 3, padding=1), nn.Unflatten(1, (8, 16)), nn.Conv3d(8, 4, 1), nn.Flatten(1, 2)]
    model = nn.Sequential(*layers, nn.Conv2d(64, 4, 1)).eval()
    small, _ = ck.compress(model, {"0": ck.ranks.fixed(16)}, (X,))
    assert isinstance(small[0], ck.LowRankConv2d) and small(X).shape == model(X).shape
    assert small[4].weight.stride() == model[4].to(memory_format=torch.channels_last).weight.stride()


def test_training_mode_is_kept_and_layers_not_reached_stay():
    model = network().train()
    model[1].eval()
    model[1].unused = nn.Linear(512, 512)
    small, report = ck.compress(model, ck.ranks.share(0.2), (X,))
    assert small.training and small[0].training and small[0].first.training and not small[1].training
    assert {layer.name: layer.reason for layer in report.layers}["1.unused"] == "the example inputs do not reach it"


@pytest.mark.parametrize("wrong", [{"goal": "fame"}, {"goal": "size", "measure": True}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match="goal must be speed or size"):
        ck.compress(network(), ck.ranks.fixed(1), (X,), **wrong)
