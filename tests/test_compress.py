"""compress, dead neurons, and saved models."""

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.demo.networks import small_convnet

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


def test_removal_and_factorisation_keep_the_function():
    model = network()
    small, report = ck.compress(model, ck.ranks.threshold(1e-9), (X,))
    torch.testing.assert_close(small(X), model(X), rtol=0, atol=1e-12)
    assert [r.neurons_removed for r in report.layers] == [4, 4, 4, 4, 0]
    assert report.params == sum(p.numel() for p in small.parameters()) < report.params_before


def test_constant_behind_zero_padding_is_kept():
    model = network()
    with torch.no_grad():
        model[0].bias[3:7] = 1.0
    small, report = ck.compress(model, ck.ranks.energy(1.0), (X,))
    assert report.layers[0].neurons_removed == 0 and "zero-padded" in report.layers[0].reason
    torch.testing.assert_close(small(X), model(X), rtol=0, atol=1e-12)


def test_break_even():
    model = nn.Sequential(nn.Linear(10, 10))
    _, report = ck.compress(model, ck.ranks.fixed(5), (torch.randn(1, 10),))
    assert report.layers[0].rank is None and "break-even: 4" in report.layers[0].reason
    _, report = ck.compress(model, ck.ranks.fixed(4), (torch.randn(1, 10),))
    assert (report.layers[0].rank, report.macs_before, report.macs, report.params) == (4, 100, 80, 90)


def test_saved_model_comes_back(tmp_path):
    small, _ = ck.compress(network(), ck.ranks.energy(0.9), (X,))
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
