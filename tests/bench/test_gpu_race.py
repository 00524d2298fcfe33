"""GPU benchmark (bench/proximal/gpu_race.py): run on the CPU with small matrices."""

import pytest
import torch

pytest.importorskip("triton")

from bench.common import workloads
from bench.proximal import gpu_race

SHAPES = [(24, 40), (48, 30), (24, 40)]


@pytest.fixture
def regime():
    torch.manual_seed(0)
    bases = workloads.low_rank(SHAPES, 4)
    start = workloads.shrunk(bases)
    weights = workloads.drifted(start, bases)
    return gpu_race.Ours(start, lambda: workloads.drifted(start, bases)), weights, truths(weights)


def truths(weights):
    return [gpu_race.svd(W.double(), 0) for W in weights]


def test_every_method_is_correct(regime):
    ours, weights, exact = regime
    found = gpu_race.race(ours, weights, exact, "cpu", rounds=2)
    assert set(found) == {"compaware", *gpu_race.peers("cpu")}
    for name, row in gpu_race.table(found, 1.0).items():
        assert row["ms"] > 0 and row["error"] < 1, name
        assert row["ok"] or name in ("newton-schulz", "gram, eigh"), name  # fp32 is not accurate enough for these
        assert (row["predicted ms"] is not None) is (name == "compaware")


def test_a_wrong_result_has_no_ratio(regime, monkeypatch):
    ours, weights, exact = regime
    wrong = gpu_race.peers("cpu") | {"wrong": gpu_race.one_by_one(lambda W, rank: W)}
    monkeypatch.setattr(gpu_race, "peers", lambda device: wrong)
    table = gpu_race.table(gpu_race.race(ours, weights, exact, "cpu", rounds=1), None)
    assert not table["wrong"]["ok"] and table["wrong"]["x svd"] is None
    assert table["svd"]["x svd"] == 1


def test_every_round_starts_from_the_same_state(regime):
    ours, weights, _ = regime
    results = []
    for _ in range(2):
        ours.reset(weights)
        before = [V.clone() for V in ours.state.bases.values()]
        ours()
        results.append((before, [W.clone() for W in ours.weights]))
    for first, second in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_matrices_of_one_shape_are_batched():
    weights = [torch.randn(shape) for shape in SHAPES]
    batches, exact = [], truths(weights)
    gpu_race.by_shape(lambda X: batches.append(X.shape) or gpu_race.svd(X, 0))(weights)
    assert sorted(map(tuple, batches)) == [(1, 48, 30), (2, 24, 40)]
    for W, P in zip(weights, exact, strict=True):
        assert torch.allclose(W.double(), P, atol=1e-4)


def test_nearest_chip():
    assert gpu_race.chip_of("NVIDIA H200", (9, 0)) == ("H200 SXM", "")
    assert gpu_race.chip_of("NVIDIA A100-SXM4-80GB", (8, 0)) == ("A100 80 GB SXM", "")
    chip, remark = gpu_race.chip_of("NVIDIA L40S", (8, 9))
    assert chip in gpu_race.step_model.GPUS and "L40S" in remark and "sm_89" in remark
    assert gpu_race.prediction("H200 SXM", [torch.randn(96, 512)], 12) > 0
