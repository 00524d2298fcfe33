"""compress, dead neurons, and saved models."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compaware_kernels as ck
from compaware_kernels.demo.networks import small_convnet

by_size = partial(ck.compress, goal="size")  # all layers, however small

X = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    model = small_convnet().double().eval()
    with torch.no_grad():
        for i in (0, 2, 5, 9):
            ck.svt_([model[i].weight], 0.3)
            model[i].weight[3:7] = 0
            model[i].bias[3:7] = 0
    return model


def test_removal_and_factorization_keep_the_function():
    model = network()
    small, report = by_size(model, ck.ranks.threshold(1e-9), (X,))
    torch.testing.assert_close(small(X), model(X), rtol=0, atol=1e-12)
    assert [r.neurons_removed for r in report.layers] == [4, 4, 4, 4, 0]
    assert report.params == sum(p.numel() for p in small.parameters()) < report.params_before


def test_constant_behind_zero_padding_is_kept():
    model = network()
    with torch.no_grad():
        model[0].bias[3:7] = 1.0
    small, report = by_size(model, ck.ranks.energy(1.0), (X,))
    assert report.layers[0].neurons_removed == 0 and "zero-padded" in report.layers[0].reason
    torch.testing.assert_close(small(X), model(X), rtol=0, atol=1e-12)


def test_break_even():
    model = nn.Sequential(nn.Linear(10, 10))
    _, report = by_size(model, ck.ranks.fixed(5), (torch.randn(1, 10),))
    assert report.layers[0].rank is None and "break-even: 4" in report.layers[0].reason
    _, report = by_size(model, ck.ranks.fixed(4), (torch.randn(1, 10),))
    assert (report.layers[0].rank, report.macs_before, report.macs, report.params) == (4, 100, 80, 90)
    assert (report.layers[0].macs_before, report.layers[0].macs) == (100, 80)


def test_saved_model_round_trip(tmp_path):
    small, _ = by_size(network(), ck.ranks.energy(0.9), (X,))
    ck.save(small, tmp_path / "small.safetensors")
    loaded = ck.load(tmp_path / "small.safetensors", small_convnet().double()).eval()
    assert torch.equal(loaded(X), small(X))
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_or_missing_file(tmp_path, content):
    path = tmp_path / "m.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ck.CheckpointError, match=r"m\.safetensors: (no such file|not a safetensors)"):
        ck.load(path, small_convnet())


def test_other_architecture_names_the_layer(tmp_path):
    ck.save(small_convnet(), tmp_path / "m.safetensors")
    with pytest.raises(ck.CheckpointError, match="layer 0 does not fit"):
        ck.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(3, 3)))


def test_compressed_twice(tmp_path):
    """Factors are not factorized again; from the dense model smaller ranks are possible."""
    small, _ = by_size(network(), ck.ranks.fixed(20), (X,))
    again, report = by_size(small, ck.ranks.fixed(1), (X,))
    notes = {row.name: row.reason for row in report.layers}
    assert notes["5.first"] == notes["5.second"] and "ck.to_dense(model) first" in notes["5.first"]
    ck.save(again, tmp_path / "again.safetensors")
    torch.testing.assert_close(ck.load(tmp_path / "again.safetensors", network())(X), again(X))
    less, further = by_size(ck.to_dense(small), ck.ranks.fixed(1), (X,))
    assert further.params < report.params and less[5].rank == 1


def test_rules_by_pattern_and_skip():
    model = network()
    rules = {"9": ck.ranks.fixed(2), "[25]": ck.ranks.fixed(3)}
    small, report = by_size(model, rules, (X,), skip=["5"], remove_dead=False)
    assert {r.name: r.rank for r in report.layers} == {"0": None, "2": 3, "9": 2, "11": None}
    assert report.layers[0].reason == "no rank rule matches its name" and report.skipped == {"5": "skipped by name"}
    assert json.loads(json.dumps(report.to_dict()))["macs"] == report.macs and "total" in str(report)


def test_a_fold_that_saves_parameters_but_no_multiply_adds_is_refused():
    """1 x 1 then a strided 3 x 3: the first factor runs at the input's resolution, which the dense layer does not."""
    model = nn.Sequential(nn.Conv2d(16, 4, 3, stride=4, padding=1))
    _, report = by_size(model, ck.ranks.fixed(10), (torch.randn(1, 16, 16, 16),), fold="input")
    assert "break-even" not in report.layers[0].reason
    _, report = by_size(model, ck.ranks.fixed(8), (torch.randn(1, 16, 16, 16),), fold="input")
    assert report.layers[0].rank is None and "multiply-adds" in report.layers[0].reason
    assert report.params == report.params_before and report.macs == report.macs_before == 16 * 4 * 9 * 16


def test_attention_still_runs_and_the_model_is_left_alone():
    model = nn.Sequential(
        nn.Embedding(9, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 8)
    )
    before = copy.deepcopy(model.state_dict())
    ids = torch.arange(8).reshape(2, 4)
    small, report = by_size(model, ck.ranks.fixed(2), (ids,))
    assert small.eval()(ids).shape == (2, 4, 8) and model.training
    assert {r.name for r in report.layers if r.rank} == {"2"}
    assert all(r.reason for r in report.layers if not r.rank) and set(report.skipped) == {"0", "1.self_attn"}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fold", ck.folds.FOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_type_is_saved_and_loaded(tmp_path, fold, dtype):
    def dense():
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, dilation=2, bias=False), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(48, 9),
        ).to(dtype)  # fmt: skip

    model = dense().to(memory_format=torch.channels_last).eval()
    with torch.no_grad():
        model[3].weight[2:5] = 0
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    small, report = by_size(model, ck.ranks.fixed(1), (x,), fold=fold)
    assert [r.rank for r in report.layers] == [1, 1, 1] and report.layers[1].neurons_removed == 3
    ck.save(small, tmp_path / "m.safetensors")
    assert torch.equal(ck.load(tmp_path / "m.safetensors", dense()).eval()(x), small(x))


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    ck.save(small_convnet(), path)
    before = path.read_bytes()

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr("compaware_kernels.compression.tensor_file.save_file", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        ck.save(small_convnet(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_complete(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")

    def fail(source, target):
        raise OSError("killed here")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="killed here"):
        ck.save(small_convnet(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "not a compressed model"),
        ({"format": "other"}, "format: other"),
        ({"format": "compaware_kernels/1"}, "damaged"),
        ({"format": "compaware_kernels/1", "layers": "{"}, "damaged"),
        ({"format": "compaware_kernels/1", "layers": '{"0": 3}'}, "layer 0 does not fit"),
        ({"format": "compaware_kernels/1", "layers": '{"0": {"class": "Conv2d"}}'}, "layer 0 does not fit"),
        ({"format": "compaware_kernels/1", "layers": "{}"}, "weights do not fit"),
    ],
)
def test_foreign_and_damaged_metadata(tmp_path, metadata, words):
    save_file({"x": torch.zeros(2)}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(ck.CheckpointError, match=words):
        ck.load(tmp_path / "m.safetensors", small_convnet())


def test_truncated_file(tmp_path):
    path = tmp_path / "m.safetensors"
    ck.save(small_convnet(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ck.CheckpointError, match="damaged"):
        ck.load(path, small_convnet())


def test_saving_into_a_missing_folder(tmp_path):
    with pytest.raises(OSError, match="absent"):
        ck.save(small_convnet(), tmp_path / "absent" / "m.safetensors")


class Twice(nn.Module):
    """Model in which one layer has three names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(32, 32)
        self.body = nn.ModuleList([nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.ReLU())])
        self.tail = layer

    def forward(self, x):
        return self.tail(self.body[1](self.body[0](x)))


def test_a_layer_with_several_names_is_one(tmp_path):
    model, x = Twice(), torch.randn(3, 32)
    small, report = by_size(model, ck.ranks.fixed(4), (x,))
    assert small.tail is small.body[0][0] is small.body[1][0] and isinstance(small.tail, ck.LowRankLinear)
    assert report.params == 4 * 64 + 32 and (report.layers[0].macs_before, report.layers[0].macs) == (9216, 2304)
    torch.testing.assert_close(small(x), ck.to_dense(small)(x))
    ck.save(small, tmp_path / "twice.safetensors")
    torch.testing.assert_close(ck.load(tmp_path / "twice.safetensors", Twice())(x), small(x), rtol=0, atol=0)
    put_back, report = by_size(model, ck.ranks.fixed(17), (x,))
    assert report.params == 32 * 33 and put_back.tail is put_back.body[0][0]


def test_a_layer_that_stays_dense_still_shares_its_weight():
    model = nn.Sequential(*(nn.Conv2d(32, 32, 1, 2, bias=False) for _ in range(2)))
    model[1].weight, x = model[0].weight, torch.randn(1, 32, 8, 8)
    small, report = by_size(model, ck.ranks.fixed(12), (x,), fold="input")
    assert "shares its weight with 1.weight" in report.layers[0].reason and small[0].weight is small[1].weight


def test_a_model_that_is_one_layer(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(32, 32), torch.randn(3, 32)
    small, report = by_size(model, ck.ranks.fixed(4), (x,))
    assert isinstance(small, ck.LowRankLinear) and report.params == 4 * 64 + 32
    ck.save(small, tmp_path / "one.safetensors")
    assert torch.equal(ck.load(tmp_path / "one.safetensors", nn.Linear(32, 32))(x), small(x))


@pytest.mark.parametrize("goal", ["size", "speed"])
def test_a_layer_that_is_called_by_keyword(goal):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(512, 512)

        def forward(self, x):
            return self.layer(input=x)

    x = torch.randn(64, 512)
    small, _ = ck.compress(Model(), ck.ranks.fixed(8), (x,), goal=goal, calibration=[(x,)])
    assert isinstance(small.layer, ck.LowRankLinear) and small(x).shape == x.shape


def test_bad_arguments():
    model = network()
    with pytest.raises(TypeError, match="wanted a tuple"):
        by_size(model, ck.ranks.fixed(1), X)
    with pytest.raises(ValueError, match="got 'crane'"):
        by_size(model, ck.ranks.fixed(1), (X,), fold="crane")
    with pytest.raises(ValueError, match="'head' matches no layer"):
        by_size(model, {"head": ck.ranks.fixed(1)}, (X,))
    with pytest.raises(ValueError, match=r"0: the rank rule must return a whole number >= 0; got 1\.5"):
        by_size(model, lambda s: 1.5, (X,))
    with torch.no_grad():
        model[5].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="5: its weight contains NaN"):
        by_size(model, ck.ranks.fixed(1), (X,))


@pytest.mark.parametrize(("fold", "matrices"), [("paper", 2), ("auto", 1 + 3)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_each_matrix_is_decomposed_once(fold, matrices, calibrated, monkeypatch):
    """For its rank and its factors; with calibration also the best matrix of the chosen rank, to balance its factors.

    The folds of a linear layer are one matrix.
    """
    calls = []
    for name in ("svd", "svdvals", "eigh"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, name=name, real=real, **k: (calls.append(name), real(*a, **k))[1]
        )
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 10))
    x, batches = torch.randn(2, 4, 4, 4), [(torch.randn(8, 4, 4, 4),)]
    _, report = by_size(model, ck.ranks.fixed(2), (x,), fold=fold, calibration=batches if calibrated else None)
    assert [r.rank for r in report.layers] == [2, 2]
    assert len(calls) == matrices + 2 * calibrated


@pytest.mark.parametrize("fold", ["paper", "auto"])
def test_no_svd_of_layers_that_no_rank_makes_faster(fold, monkeypatch):
    """Nor of those that the example inputs do not reach."""
    calls, real = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 10))
    _, report = ck.compress(model, ck.ranks.fixed(2), (torch.randn(2, 4, 4, 4),), fold=fold)
    assert not calls and all(row.reason.startswith("even rank ") for row in report.layers)
    aside = Aside()
    _, report = ck.compress(aside, ck.ranks.fixed(2), (torch.randn(2, 8),), measure=True)
    assert report.layers[1].reason == "the example inputs do not reach it" and len(calls) == 1


class Aside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize("call", [
    lambda model, x: ck.compress(model, ck.ranks.fixed(2), (x,)),
    lambda model, x: ck.allocate(model, 0.5, (x,)),
], ids=["compress", "allocate"])  # fmt: skip
def test_weights_on_the_meta_device_are_named(call):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    with pytest.raises(ValueError, match=r"\b1\.weight: wanted a weight with values; got one on the meta device"):
        call(model, torch.zeros(2, 8))
