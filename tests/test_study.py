"""A study: nothing is done twice and nothing is lost, sizes are counted right, curves say what the points say."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from study_case import CONFIG, STRENGTHS, key, some_digits
from torch import nn

import compaware_kernels as ck
from compaware_kernels.study import Stopped, curves, fit, plots, points
from compaware_kernels.study.arms import ARMS, Plan
from compaware_kernels.study.config import Config, Key
from compaware_kernels.study.curves import Choice
from compaware_kernels.study.points import LOW_RANK, SPARSE, Point
from compaware_kernels.study.runs import Record, Study

data = pytest.fixture(scope="module")(some_digits)
TINY = """
epochs = 2
seeds = 2
lr = 0.02
tune_epochs = 1
rules = ["energy:0.9", "energy:0.999"]
sparsities = [0.5]
[arms]
plain = [{}]
"nuclear+group" = [{ nuclear = 2, group = 0.1 }, { nuclear = 8, group = 0.4 }]
[map]
nuclear = [2, 8]
group = [0.1]
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def command(*args, **kwargs):
    words = [sys.executable, "-m", "compaware_kernels", "study", *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **kwargs)


def stamps(folder, pattern="runs/**/*.json"):
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


# --- a whole study --------------------------------------------------------------------------------------------------


def test_killed_and_run_again(config, tmp_path):
    """SIGKILL in the middle: its processes end, finished trainings stay; the next run does the rest, and a third one
    nothing."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "compaware_kernels", "study", str(config), "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, start_new_session=True, **quiet) as process:
        wait(lambda: stamps(out), 120)
        process.send_signal(signal.SIGKILL)
    wait(lambda: not alive(process.pid), 60)
    first = stamps(out)
    assert 0 < len(first) < 7

    second = command(config, "--out", out, "--processes", 2)
    assert second.returncode == 0, second.stderr
    assert f"7 trainings, {7 - len(first)} left" in second.stdout
    every = stamps(out)
    assert len(every) == 7 and first.items() <= every.items() and not list(out.glob("runs/**/*.running"))
    assert "nuclear+group" in second.stdout and "Written:" in second.stdout

    latency, before = (out / "latency.json").stat().st_mtime_ns, (out / "report.html").read_text()
    third = command(config, "--out", out)
    assert third.returncode == 0 and "7 trainings, 0 left" in third.stdout
    assert stamps(out) == every and (out / "latency.json").stat().st_mtime_ns == latency

    page, results = (out / "report.html").read_text(), json.loads((out / "results.json").read_text())
    assert page == before and "Trained on" in page and f"Timed on {results['timed']}" in page
    assert "nuclear=2,group=0.1; nuclear=8,group=0.4</td>" in page and "knobs" not in page and "``" not in page
    assert page.count("<svg") >= 8 and "Sensitivity" in page and "nan" not in page.lower()
    assert (out / "curves.svg").read_text().startswith("<svg")
    assert len(results["records"]) == 7 and results["config"]["epochs"] == 2
    assert all(r["points"][0]["milliseconds"] > 0 for r in results["records"])


def alive(group):
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait(until, seconds):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_more_arms_are_added_and_other_settings_refused(data, tmp_path):
    study = Study(replace(CONFIG, arms={"plain": [{}]}), "digits", tmp_path)
    study.train(key("plain"), data, lambda: None)
    more = Study(replace(CONFIG, arms={"plain": [{}], "l2": [{"l2": 1e-3}]}, seeds=2), "digits", tmp_path)
    assert [str(k) for k in more.left] == ["l2 l2=0.001 seed 0", "plain none seed 1", "l2 l2=0.001 seed 1"]
    with pytest.raises(ValueError, match=r"another study: epochs was 4, now 5"):
        Study(replace(CONFIG, epochs=5), "digits", tmp_path)
    with pytest.raises(ValueError, match=r"another study: data was 'digits', now 'letters'"):
        Study(CONFIG, "letters", tmp_path)


def test_damaged_record_is_named(data, tmp_path):
    study = Study(replace(CONFIG, arms={"plain": [{}]}), "digits", tmp_path)
    study.train(key("plain"), data, lambda: None)
    path = study.path(key("plain"))
    for text, words in (("{", "damaged"), ('{"key": {}}', "another version")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            study.records()


def test_records_are_read_as_written(data, tmp_path):
    study, seen = Study(replace(CONFIG, arms={"group": [{"group": 0.8}], "plain": [{}]}), "digits", tmp_path), []
    record = study.train(key("group"), data, lambda: seen.append(1))
    assert study.records() == [record] and len(seen) == study.units
    assert [p.kind for p in record.points] == [LOW_RANK, LOW_RANK, SPARSE] and record.key == key("group")
    for point in record.points[:2]:
        model = ck.checkpoint.restructured(fit.build("dec", (1, 8, 8), 10, 1), point.structure, "")
        assert sum(p.numel() for p in model.parameters()) == point.params


def test_validation_and_test_are_not_mixed_up(tmp_path):
    """All validation labels are wrong."""
    data = some_digits()
    data.held_y = (data.held_y + 1) % 10
    record = Study(replace(CONFIG, arms={"plain": [{}]}), "digits", tmp_path).train(key("plain"), data, lambda: None)
    assert record.validation < 15 and record.test > 30
    for point in record.points[1:]:
        assert max(point.validation, point.tuned_validation) < 15 < 20 < min(point.test, point.tuned_test)


def test_diverged_trainings_are_kept(data, tmp_path):
    study = Study(replace(CONFIG, lr=1e4, arms={"plain": [{}]}), "digits", tmp_path)
    assert "nan" in study.train(key("plain"), data, lambda: None).diverged
    assert study.left == [] and study.records()[0].diverged


def test_failures_do_not_stop_the_others(tmp_path, monkeypatch):
    config = replace(CONFIG, epochs=1, arms={"plain": [{}], "l2": [{"l2": 1e-3}]})
    study = Study(config, "digits", tmp_path)
    study.path(key("plain")).with_suffix(".running").mkdir(parents=True)
    (study.path(key("plain")).with_suffix(".running") / "state.pt").write_bytes(b"garbage")
    with pytest.raises(Stopped, match=r"plain none seed 0: \w+Error"):
        study.run(1, lambda key: None)
    assert study.left == [key("plain")]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch = 3", "unknown settings: epoch"),
        ("epochs = 0", "epochs: wanted a number >= 1; got 0"),
        ('network = "lenet"', "network: wanted one of mlp, dec"),
        ('rules = ["magic:1"]', "a rank rule is written"),
        ("rules = []", "rules: wanted at least one rank rule; got ()"),
        ('weights = "timm"', "weights: wanted timm, for a network of timm's"),
        ('weights = "nowhere.safetensors"', "weights: wanted timm, for a network of timm's, or a safetensors file"),
        ('device = "tpu"', "device: wanted auto, cuda or cpu"),
        ("workers = 0", "workers: wanted a number >= 1"),
        ("sparsities = [1.5]", "sparsities: wanted shares"),
        ("[arms]\nfancy = [{}]", "arms: wanted plain and any of"),
        ("[arms]\nplain = [{}]\nl1 = [{ l2 = 1 }]", "arms.l1: wanted strengths of l1"),
        ("[arms]\nplain = [{}]\nl2 = [{}]", "arms.l2: wanted strengths of l2; got {}"),
        ("[arms]\nplain = []", "arms: wanted plain and any of"),
        ("[arms]\nplain = [{}]\n[map]\nl1 = [1]", "map: wanted lists named nuclear and group"),
        ("a = ", "not TOML"),
    ],
)
def test_wrong_settings(text, words, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(text if "[arms]" in text else f"{text}\n[arms]\nplain = [{{}}]\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: {words}")):
        Config.read(path)


def test_errors_are_one_line(tmp_path):
    """Before anything is written."""
    path = tmp_path / "wrong.toml"
    path.write_text("epoch = 3")
    done = command(path, "--out", tmp_path / "out")
    assert done.returncode == 1 and "unknown settings: epoch" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_such_study(tmp_path):
    with pytest.raises(FileNotFoundError, match="no study of that name"):
        Config.read("nowhere")


# --- points ---------------------------------------------------------------------------------------------------------


def made(model, arm="plain"):
    """The network as if it had been trained."""
    made = ARMS[arm]({}, Plan(1, 1, 1, 0, ("4",), torch.zeros(1, 1, 4, 4)))
    made.attach(model, None, 0)
    return fit.Trained(model, made, None)


def test_zeros_are_not_counted(data):
    """Two layers of known zeros; a dead neuron's outgoing weights do not count either."""
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


def test_pruning_takes_the_least(data):
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


def test_validation_chooses_and_test_counts():
    few = [point(10, 90, 70), point(20, 80, 99), point(30, 95, 94), point(30, 94, 98), point(50, 97, 96)]
    choice = Choice(tuned=False)
    assert curves.front(few, choice) == [few[0], few[2], few[4]]
    values = curves.curve([record("l2", 0, *few)], [5, 10, 29, 30, 100], choice, "macs", chance=10)
    assert values == [10, 70, 70, 94, 96]
    assert curves.need(few, choice, 94.5) is few[2] and curves.need(few, choice, 99) is None


def test_choices_read_their_points():
    few = [point(10, 1, 2, tuned=(3, 4)), point(20, 5, 6, SPARSE), point(30, 7, 8)]
    r = record("l2", 0, *few)
    assert Choice(True).of([r]) == few[:1] and Choice(True).accuracies(few[0]) == (3, 4)
    assert Choice(False).of([r]) == [few[0], few[2]] and Choice(False, (LOW_RANK, SPARSE)).of([r]) == few


def test_needs():
    """At each seed's own plain accuracy less a point; what is not reached is told."""
    plain = [record("plain", s, point(100, 98, 97), validation=98 + s, test=97) for s in (0, 1)]
    low = [record("l2", 0, point(50, 97, 96), point(20, 96.9, 99)), record("l2", 1, point(10, 97.9, 99))]
    arms = curves.by_arm([*plain, *low], CONFIG)
    found = {n.arm: n for n in curves.needs(arms, Choice(False))}
    assert found["l2"].values == [50] and found["l2"].tests == [-1] and found["l2"].missing == 1
    assert found["plain"].values == [100, 100] and str(found["plain"]) == "100 ± 0"
    assert "1 seed(s) do not reach it" in str(found["l2"])
    assert curves.needs(arms, Choice(False), "milliseconds")[0].values == []  # nothing was timed


def test_the_plot_says_who_wins():
    def said(**macs):
        found = {arm.replace("_", "-"): record(arm.replace("_", "-"), 0, point(m, 98, 97)) for arm, m in macs.items()}
        return plots.least({arm: {0: [r]} for arm, r in found.items()}, Choice(False), "macs")

    assert (
        said(plain=100, nuclear=27, l2=70) == "least at that accuracy: nuclear norm, per epoch (paper): 0.27 of plain"
    )
    assert said(plain=100, nuclear_steps=41, fixed_rank=26) == (
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


def test_layers_that_became_two_factors_count_once():
    """The first by its rank, the second by its rows; from the epoch on in which the layer itself is no longer there."""
    ranks = {"0": [3, 3, 2], "2": [8], "2.first": [4, 3], "2.second": [4, 4]}
    rows = {"0": [9, 9, 9], "2": [7], "2.first": [4, 4], "2.second": [7, 6]}
    changed = replace(record("l2", 0), losses=[1.0, 1.0, 1.0], ranks=ranks, rows=rows)
    assert plots.totals(changed, "ranks") == [11, 7, 5] and plots.totals(changed, "rows") == [16, 16, 15]


def test_arms_leave_out_the_map_and_what_diverged():
    other = replace(CONFIG, map={"nuclear": [1.0], "group": [2.0]})
    grid = Record(Key("nuclear+group", (("nuclear", 1.0), ("group", 2.0)), 0))
    assert grid.key in other.keys and len(other.keys) == len(CONFIG.keys) + 1
    broken = record("l1", 0)
    broken.diverged = "NaN"
    assert curves.by_arm([grid, broken, record("plain", 0)], other) == {"plain": {0: [record("plain", 0)]}}


def test_without_a_plain_network_nothing_is_compared():
    broken = record("plain", 1)
    broken.diverged = "NaN"
    with pytest.raises(ValueError, match="plain none seed 1: diverged, so there is nothing to compare with"):
        curves.by_arm([record("plain", 0), broken], CONFIG)


def test_sizes_and_spread():
    few = [point(10, 90, 10), point(100, 90, 60), point(10000, 98, 97)]
    at = curves.sizes({"plain": {0: [record("plain", 0, *few)]}}, Choice(False), "macs", 3)
    assert at == pytest.approx([100, 1000, 10000])
    assert curves.spread([1, 3], "{:+.1f}") == "+2.0 ± 1.4" and curves.spread([], "{}") == "-"
