"""Study runs: interrupted at any moment, nothing is trained twice and nothing is lost."""

import glob
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

from compaware_kernels.compression.checkpoint import restructured
from compaware_kernels.study import Stopped, fit
from compaware_kernels.study.arms import ARMS
from compaware_kernels.study.config import Config
from compaware_kernels.study.curves import Choice
from compaware_kernels.study.data import load
from compaware_kernels.study.points import LOW_RANK, SPARSE
from compaware_kernels.study.runs import Study
from tests.helpers.study_case import CONFIG, STRENGTHS, key, some_digits

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
SMALL = """
epochs = 1
seeds = 1
lr = 0.02
tune_epochs = 1
rules = ["energy:0.9", "energy:0.999"]
sparsities = [0.5]
[arms]
plain = [{}]
"nuclear+group" = [{ nuclear = 2, group = 0.1 }]
"""


ORPHAN = """
import sys, time
from dataclasses import replace
from pathlib import Path
from compaware_kernels.study.config import Config
from compaware_kernels.study.runs import Study

class Endless(Study):
    def train(self, key, data, advance):
        (self.folder / "begun").touch()
        time.sleep(60)

if __name__ == "__main__":
    Endless(Config(device="cpu", seeds=1, arms={"plain": [{}]}), "digits", Path(sys.argv[1])).run(1, lambda key: None)
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


def test_from_the_command_to_the_report(tmp_path):
    """Two trainings; test_killed_and_resumed has more of everything."""
    config, out = tmp_path / "small.toml", tmp_path / "out"
    config.write_text(SMALL)
    done = command(config, "--out", out, "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert "2 trainings, 2 left" in done.stdout and "nuclear+group" in done.stdout and "Written:" in done.stdout
    page, results = (out / "report.html").read_text(), json.loads((out / "results.json").read_text())
    assert page.count("<svg") >= 8 and "nan" not in page.lower()
    outside = re.sub(r'<div class="(scroll|panels|narrow)">.*?</div>', "", page, flags=re.S)
    assert "<table" not in outside and "<svg" not in outside  # on a phone all wide things scroll, shrink or stack
    assert (out / "curves.svg").read_text().startswith("<svg")
    assert len(results["records"]) == 2 and results["config"]["epochs"] == 1
    assert all(r["points"][0]["milliseconds"] > 0 for r in results["records"])


@pytest.mark.slow
def test_killed_and_resumed(config, tmp_path):
    """SIGKILL in the middle: child processes end, finished trainings stay; the next run does the rest, and a third one
    nothing. While one run holds the folder, another refuses to start."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "compaware_kernels", "study", str(config), "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, start_new_session=True, **quiet) as process:
        wait(lambda: stamps(out), 120)
        os.killpg(process.pid, signal.SIGSTOP)
        other = command(config, "--out", out)
        process.send_signal(signal.SIGKILL)
        os.killpg(process.pid, signal.SIGCONT)
    assert other.returncode == 1 and f"{out}: another process works on this study" in other.stderr
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
    """Whether any process of the group is still running."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "when"), [(signal.SIGINT, "starting"), (signal.SIGINT, "training"), (signal.SIGTERM, "training")]
)
def test_interrupted(what, when, config, tmp_path):
    """As Ctrl-C does, which every process of the terminal gets: all end, and one line says how to go on."""
    out = tmp_path / "out"
    config.write_text(TINY.replace("epochs = 2", "epochs = 4000", 1))
    words = [sys.executable, "-m", "compaware_kernels", "study", str(config), "--out", str(out), "--processes", "2"]
    with subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait((out / "study.json").exists, 120)
        if when == "starting":
            wait(lambda: len(children(process.pid)) >= 2, 60)
        else:
            wait(lambda: list(out.glob("runs/**/*.running")), 120)
        if what == signal.SIGINT:
            os.killpg(process.pid, what)
        else:
            process.send_signal(what)
        process.wait(15)
        wait(lambda: not alive(process.pid), 15)
        error = process.stderr.read().decode()
    assert process.returncode == 1
    assert error.splitlines()[-1] == (
        "compaware: error: interrupted, 0 of 7 trainings are done; the same command goes on from there"
    )
    assert "Traceback" not in error


def children(pid):
    """Ids of the process's children."""
    return [child for path in glob.glob(f"/proc/{pid}/task/*/children") for child in open(path).read().split()]


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path):
    """They end in the middle of a training, before they save anything."""
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    words = [sys.executable, str(script), str(tmp_path / "out")]
    with subprocess.Popen(words, start_new_session=True) as process:
        wait((tmp_path / "out/begun").exists, 120)
        process.send_signal(signal.SIGKILL)
    wait(lambda: not alive(process.pid), 15)


def test_the_lock_is_reentrant_within_a_process(config, tmp_path):
    work = Study(Config.read(str(config)), "scikit-learn digits, 8 x 8", tmp_path / "out")
    with work.alone(), work.alone():
        pass
    with work.alone():
        done = command(config, "--out", tmp_path / "out")
    assert done.returncode == 1 and "another process works on this study" in done.stderr


def test_arms_can_be_added_but_settings_not_changed(data, tmp_path):
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


def test_records_round_trip(data, tmp_path):
    study, seen = Study(replace(CONFIG, arms={"group": [{"group": 0.8}], "plain": [{}]}), "digits", tmp_path), []
    record = study.train(key("group"), data, lambda: seen.append(1))
    assert study.records() == [record] and len(seen) == study.config.units
    assert [p.kind for p in record.points] == [LOW_RANK, LOW_RANK, SPARSE] and record.key == key("group")
    for point in record.points[:2]:
        model = restructured(fit.build("dec", (1, 8, 8), 10, 1), point.structure, "")
        assert sum(p.numel() for p in model.parameters()) == point.params


def test_validation_and_test_images_are_kept_apart(tmp_path):
    """With wrong validation labels only the validation accuracy is low."""
    data = some_digits()
    data.held_y = (data.held_y + 1) % 10
    record = Study(replace(CONFIG, arms={"plain": [{}]}), "digits", tmp_path).train(key("plain"), data, lambda: None)
    assert record.validation < 15 and record.test > 30
    for point in record.points[1:]:
        assert max(point.validation, point.tuned_validation) < 15 < 20 < min(point.test, point.tuned_test)


def test_diverged_trainings_are_recorded(data, tmp_path):
    study = Study(replace(CONFIG, lr=1e4, arms={"plain": [{}]}), "digits", tmp_path)
    assert "nan" in study.train(key("plain"), data, lambda: None).diverged
    assert study.left == [] and study.records()[0].diverged


def test_overflow_seen_by_the_proximal_step_is_divergence(tmp_path):
    """L1's proximal step finds it in the middle of an epoch, before the loss does."""
    config = replace(CONFIG, lr=100.0, batch=32, validation=0.25, arms={"plain": [{}], "l1": [{"l1": 0.5}]})
    record = Study(config, "digits", tmp_path).train(key("l1"), load(config), lambda: None)
    assert record.diverged == "10.weight contains NaN or Inf"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize(("arm", "step"), [("trp", 20), ("nuclear", 11), ("nuclear+group", 11), ("reload", 22)])
def test_overflow_before_an_svd_or_proximal_step_is_divergence(arm, step, bad, data, tmp_path, monkeypatch):
    """Just before an SVD, or a proximal step after an epoch of 11."""
    monkeypatch.setattr(ARMS[arm], "after_step", planted(step, bad))
    study = Study(replace(CONFIG, arms={"plain": [{}], arm: [STRENGTHS[arm]]}), "digits", tmp_path)
    why = study.train(key(arm), data, lambda: None).diverged
    assert "linalg.svd" in why or "NaN or Inf" in why


def test_overflow_in_the_product_of_factors_is_divergence(data, tmp_path):
    """In the last step, after the last loss."""
    config = replace(CONFIG, lr=1e25, epochs=1, batch=216, arms={"plain": [{}], "fixed-rank": [{"share": 0.25}]})
    record = Study(config, "digits", tmp_path).train(key("fixed-rank"), data, lambda: None)
    assert record.diverged == "0.weight contains NaN or Inf"


def planted(step, bad):
    def after_step(self):
        self.step += 1
        if self.step == step:
            self.layers[0].weight.data.view(-1)[0] = bad

    return after_step


def test_other_errors_are_raised(data, tmp_path, monkeypatch):
    def broken(self, model, epoch):
        raise ValueError("another reason")

    monkeypatch.setattr(ARMS["plain"], "after_epoch", broken)
    with pytest.raises(ValueError, match="another reason") as error:
        Study(CONFIG, "digits", tmp_path).train(key("plain"), data, lambda: None)
    assert error.type is ValueError


def test_diverged_fine_tuning_keeps_the_training(data, tmp_path):
    config = replace(CONFIG, tune_lr=1e6, arms={"plain": [{}]})
    record = Study(config, "digits", tmp_path).train(key("plain"), data, lambda: None)
    assert not record.diverged and record.validation > 30 and len(record.points) == 3
    assert all(p.tuned_validation is None and p.tuned_test is None and p.test > 5 for p in record.points)
    assert Choice(True).of([record]) == [] and Choice(False).of([record])


def test_divergence_in_the_last_step_of_fine_tuning(data, monkeypatch):
    """After the last loss."""

    def backward(model, *rest):
        loss = before(model, *rest)
        model[0].weight.grad[0] = math.inf
        return loss

    before = fit._backward
    monkeypatch.setattr(fit, "_backward", backward)
    with pytest.raises(fit.Diverged, match=r"0\.weight contains NaN or Inf"):
        fit.tune(fit.build("dec", data.shape, 10, 0), data, replace(CONFIG, batch=data.examples), 0)


def test_killed_after_training(data, tmp_path):
    """Nothing is trained again, and compression gives the same points."""
    calls, study = [], Study(replace(CONFIG, arms={"plain": [{}], "trp": [{"energy": 0.9}]}), "digits", tmp_path / "a")

    def killed():
        calls.append(1)
        if len(calls) == CONFIG.epochs + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.train(key("trp"), data, killed)
    state = torch.load(study.path(key("trp")).with_suffix(".running") / "state.pt", weights_only=True)
    assert state["run"]["epoch"] == CONFIG.epochs
    again, whole = (Study(study.config, "digits", tmp_path / f).train(key("trp"), data, lambda: None) for f in "ab")
    assert again.seconds == state["run"]["seconds"] and again.points == whole.points and again.losses == whole.losses


def test_lost_weights_are_trained_again(data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "SAVE_EVERY", 0)
    first = fit.fit(CONFIG, key("plain"), data, tmp_path, lambda: None)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert fit.fit(CONFIG, key("plain"), data, tmp_path, lambda: None).losses == first.losses


def test_a_failed_training_does_not_stop_the_others(tmp_path, monkeypatch):
    config = replace(CONFIG, epochs=1, arms={"plain": [{}], "l2": [{"l2": 1e-3}]})
    study = Study(config, "digits", tmp_path)
    study.path(key("plain")).with_suffix(".running").mkdir(parents=True)
    (study.path(key("plain")).with_suffix(".running") / "state.pt").write_bytes(b"garbage")
    with pytest.raises(Stopped, match=r"plain none seed 0: \w+Error"):
        study.run(1, lambda key: None)
    assert study.left == [key("plain")]


def test_errors_are_one_line(tmp_path, command_line):
    """They come before anything is written."""
    path = tmp_path / "wrong.toml"
    path.write_text("epoch = 3")
    done = command_line("study", path, "--out", tmp_path / "out")
    assert done.returncode == 1 and "unknown settings: epoch" in done.err and len(done.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
