"""The race of SVTs: its truth, its peers, its verdict, and what the profile sees."""

import pytest
import torch

pytest.importorskip("pyproximal")
pytest.importorskip("sklearn")

from bench.common import workloads
from bench.common.racing import Race
from bench.proximal import cases, goals, peers, profile_step

SHAPES = [(48, 90), (90, 48), (64, 64)]


@pytest.fixture(scope="module")
def drifted():
    with torch.no_grad():
        return cases.drifted(SHAPES, 6)


def test_truth_by_subspace_iteration_is_that_of_an_svd(drifted, monkeypatch):
    wanted = [cases.truth(W) for W in drifted.weights]
    monkeypatch.setattr(cases, "WIDE", 4 * 40)
    for W, rank, P in zip(drifted.weights, drifted.ranks, wanted, strict=True):
        assert float((cases.truth(W, rank) - P).norm()) < 1e-7 and rank == 6


def test_peers_are_right_where_fp32_is_accurate_enough(drifted):
    last = peers.last_vectors(drifted.previous, drifted.ranks)
    for W, rank, V in zip(drifted.weights, drifted.ranks, last, strict=True):
        exact = cases.truth(W)
        found = {peer.__name__: peer(W, rank) for peer in peers.COLD}
        found["warm_subspace_4"] = peers.warm_subspace(W, V, 4)
        off = {name: workloads.spectral_norm(P.double() - exact) for name, P in found.items()}
        inaccurate = {"gram_eigh", "newton_schulz_clip"}
        assert all(error < 1e-3 for name, error in off.items() if name not in inaccurate), off


def test_a_wrong_answer_reaches_no_goal(drifted):
    wanted = [cases.truth(W) for W in drifted.weights]

    def wrong(Ws):
        infos = drifted.calls["warm"](Ws)
        Ws[1][0, 0] += 0.01
        return infos

    work = {"svd": goals.loop(peers.svd), "warm": drifted.calls["warm"], "cold": wrong}
    contest = Race(drifted.weights, wanted, work)
    contest.round(1)
    rows = goals.table_rows("case", goals.Rows([goals.Goal("warm", 0.0), goals.Goal("cold", 0.0)]), contest)
    assert [row[-1] for row in rows] == ["yes", "WRONG"]
    assert contest.rows["warm"].bound > 0 and contest.rows["svd"].bound is None


def test_profile_counts_the_columns_of_each_weight():
    W, wide = torch.randn(40, 30), torch.randn(20, 50)
    with profile_step.Recorder([W, wide]) as recorder:
        Y = W @ torch.randn(30, 7)
        W.mT @ Y
        torch.stack([wide, wide]) @ torch.randn(2, 50, 3)  # a batch of copies
        wide.double() @ torch.randn(50, 2, dtype=torch.float64)  # a copy, known by its shape only: not counted
        torch.randn(9, 9) @ torch.randn(9, 9)
        torch.linalg.eigh(torch.eye(3))
    calls = recorder.finish()
    seen = [(call.shape, call.weights * call.columns, call.flops) for call in calls if call.shape]
    once = 2.0 * 40 * 30 * 7
    assert seen == [((40, 30), 7, once), ((40, 30), 7, once), ((50, 20), 6, 2.0 * 2 * 20 * 50 * 3)]
    assert [call.name for call in calls if call.kind == "factorizations"] == ["_linalg_eigh"]


def test_profile_of_a_step(monkeypatch, capsys):
    monkeypatch.setitem(profile_step.CASES, "some", ([(96, 64)] * 2, 8))
    profile_step.main(["some, warm"])
    shown = capsys.readouterr().out
    assert "2 of 96 x 64" in shown and "the step" in shown
