"""Points and curves of a study: sizes are counted right, and curves follow from the points."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from compaware_kernels.study import curves, fit, plots, points
from compaware_kernels.study.arms import ARMS, Plan
from compaware_kernels.study.config import Key
from compaware_kernels.study.curves import Choice
from compaware_kernels.study.points import LOW_RANK, SPARSE, Point
from compaware_kernels.study.runs import Record
from tests.helpers.study_case import CONFIG, STRENGTHS, some_digits

data = pytest.fixture(scope="module")(some_digits)


def made(model, arm="plain"):
    """The network as the result of a training."""
    made = ARMS[arm]({}, Plan(1, 1, 1, 0, ("4",), torch.zeros(1, 1, 4, 4)))
    made.attach(model, None, 0)
    return fit.Trained(model, made, None)


def test_zeros_are_not_counted(data):
    """Two layers with known zeros; outgoing weights of a dead neuron do not count either."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(4 * 36, 10))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1, 0, 0] = 0
        model[4].weight[:5, 36:] = 0
        model[0].bias[0] = -1
    params, macs, size = points._sparse_sizes(model, (torch.zeros(1, 1, 8, 8),))
    conv, linear = 3 * 9 - 3, 10 * 3 * 36 - 5 * 3 * 36
    assert macs == 36 * conv + linear and params == conv + 3 + linear + 10
    assert size == 4 * params + math.ceil(27 / 8) + math.ceil(1080 / 8)


def test_pruning_removes_the_smallest(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.Linear(20, 10))
    run = made(model)
    pruned, masks = points.prune(run, 0.75)
    both = torch.cat([pruned[i].weight.flatten() for i in (0, 3)])
    before = torch.cat([model[i].weight.flatten() for i in (0, 3)])
    assert (both == 0).sum() == round(0.75 * len(both)) and before[both == 0].abs().max() < both[both != 0].abs().min()
    assert torch.equal(pruned[4].weight, model[4].weight) and set(masks) == {"0", "3"}


def test_fine_tuning_keeps_zeros(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.Linear(20, 10))
    pruned, masks = points.prune(made(model), 0.75)
    before = [p.clone() for p in pruned.parameters()]
    fit.tune(pruned, data, CONFIG, 0, masks)
    assert not any(torch.equal(p, old) for p, old in zip(pruned.parameters(), before, strict=True))
    assert all(torch.equal(pruned[int(name)].weight != 0, mask) for name, mask in masks.items())


# --- curves ---------------------------------------------------------------------------------------------------------


def point(macs, validation, test, kind=LOW_RANK, tuned=None):
    tuned = tuned or (None, None)
    return Point(kind, "", macs // 2, macs, macs * 2, validation, test, *tuned)


def record(arm, seed, *found, validation=98.0, test=97.0):
    strength = tuple((name, float(value)) for name, value in STRENGTHS[arm].items())
    return Record(Key(arm, strength, seed), validation=validation, test=test, points=list(found), seconds=1.0)


def test_points_are_chosen_by_validation_and_judged_by_test_accuracy():
    few = [point(10, 90, 70), point(20, 80, 99), point(30, 95, 94), point(30, 94, 98), point(50, 97, 96)]
    choice = Choice(tuned=False)
    assert curves.front(few, choice) == [few[0], few[2], few[4]]
    values = curves.curve([record("l2", 0, *few)], [5, 10, 29, 30, 100], choice, "macs", chance=10)
    assert values == [10, 70, 70, 94, 96]
    assert curves.need(few, choice, 94.5) is few[2] and curves.need(few, choice, 99) is None


def test_choices_filter_points():
    few = [point(10, 1, 2, tuned=(3, 4)), point(20, 5, 6, SPARSE), point(30, 7, 8)]
    r = record("l2", 0, *few)
    assert Choice(True).of([r]) == few[:1] and Choice(True).accuracies(few[0]) == (3, 4)
    assert Choice(False).of([r]) == [few[0], few[2]] and Choice(False, (LOW_RANK, SPARSE)).of([r]) == few


def test_multiply_adds_needed():
    """To reach each seed's own plain accuracy minus one point; a seed that never does is reported."""
    plain = [record("plain", s, point(100, 98, 97), validation=98 + s, test=97) for s in (0, 1)]
    low = [record("l2", 0, point(50, 97, 96), point(20, 96.9, 99)), record("l2", 1, point(10, 97.9, 99))]
    arms = curves.by_arm([*plain, *low], CONFIG)
    found = {n.arm: n for n in curves.needs(arms, Choice(False))}
    assert found["l2"].values == [50] and found["l2"].tests == [-1] and found["l2"].missing == 1
    assert found["plain"].values == [100, 100] and str(found["plain"]) == "100 ± 0"
    assert "1 seed(s) do not reach it" in str(found["l2"])
    assert curves.needs(arms, Choice(False), "milliseconds")[0].values == []  # nothing was timed


def test_the_plot_names_the_best_arm():
    def caption(**macs):
        found = {arm.replace("_", "-"): record(arm.replace("_", "-"), 0, point(m, 98, 97)) for arm, m in macs.items()}
        return plots.least({arm: {0: [r]} for arm, r in found.items()}, Choice(False), "macs")

    assert (
        caption(plain=100, nuclear=27, l2=70)
        == "least at that accuracy: nuclear norm, per epoch (paper): 0.27 of plain"
    )
    assert caption(plain=100, nuclear_steps=41, fixed_rank=26) == (
        "least at that accuracy: low rank from scratch: 0.26 of plain\n"
        "this project's: nuclear norm, per step: 0.41 of plain"
    )
    some = {arm: {s: [record(arm, s, point(m - s, 98, 97))] for s in (0, 1)} for arm, m in (("plain", 99), ("l2", 9))}
    some["l2"][1] = []
    assert plots.least(some, Choice(False), "macs") == "least at that accuracy: plain: 1.00 of plain"
    missed = {"plain": {0: [record("plain", 0, point(9, 96.9, 97))]}}
    assert plots.least(missed, Choice(False), "macs") == "no arm keeps that accuracy in all seeds"
    missed["l2"] = {0: [record("l2", 0, point(9, 97, 97))]}
    assert plots.least(missed, Choice(False), "macs") == "least at that accuracy: L2"


def test_ranks_of_factorized_layers():
    """A layer replaced by two factors counts once: the first factor by its rank, the second by its rows, from that
    epoch on."""
    ranks = {"0": [3, 3, 2], "2": [8], "2.first": [4, 3], "2.second": [4, 4]}
    rows = {"0": [9, 9, 9], "2": [7], "2.first": [4, 4], "2.second": [7, 6]}
    changed = replace(record("l2", 0), losses=[1.0, 1.0, 1.0], ranks=ranks, rows=rows)
    assert plots.totals(changed, "ranks") == [11, 7, 5] and plots.totals(changed, "rows") == [16, 16, 15]


def test_arms_exclude_the_sensitivity_map_and_diverged_trainings():
    other = replace(CONFIG, map={"nuclear": [1.0], "group": [2.0]})
    grid = Record(Key("nuclear+group", (("nuclear", 1.0), ("group", 2.0)), 0))
    assert grid.key in other.keys and len(other.keys) == len(CONFIG.keys) + 1
    broken = record("l1", 0)
    broken.diverged = "NaN"
    assert curves.by_arm([grid, broken, record("plain", 0)], other) == {"plain": {0: [record("plain", 0)]}}


def test_no_comparison_without_a_plain_network():
    broken = record("plain", 1)
    broken.diverged = "NaN"
    with pytest.raises(ValueError, match="plain none seed 1: diverged, so there is nothing to compare with"):
        curves.by_arm([record("plain", 0), broken], CONFIG)


def test_sizes_and_spread():
    few = [point(10, 90, 10), point(100, 90, 60), point(10000, 98, 97)]
    at = curves.sizes({"plain": {0: [record("plain", 0, *few)]}}, Choice(False), "macs", 3)
    assert at == pytest.approx([100, 1000, 10000])
    assert curves.spread([1, 3], "{:+.1f}") == "+2.0 ± 1.4" and curves.spread([], "{}") == "-"
