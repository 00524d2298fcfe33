"""Self-test and quarantine: correct kernels (here emulated) pass; wrong ones are reported and not used any more."""

import fnmatch
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import compaware_kernels as ck
from compaware_kernels import cli, selftest
from compaware_kernels.ops import backends, cuda_launcher, quarantine
from compaware_kernels.proximal.cuda import backend
from compaware_kernels.proximal.spectral_functions import SoftThreshold

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STEPS = [
    f"step, {route}, fp32" for route in ("small", "cold", "warm", "firm small", "firm cold", "NaN")
]  # other dtypes take a few seconds each
PROCESSES = [("shrink", "*"), ("low rank", "*"), ("step", "matrix program*"), *(("step", step) for step in STEPS)]
RIGHT = [(*process, name) for process in PROCESSES for name in fnmatch.filter(selftest.CASES[process[0]], process[1])]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """Empty folder for the self-test's record, which is read again before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COMPAWARE_VERDICTS", raising=False)
    quarantine.found.cache_clear()
    yield tmp_path
    quarantine.found.cache_clear()
    backends._put.clear()


def emulated(family, *arguments):
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.emulation.selftest_emulated", family, *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return selftest.parse(family, done.stdout, "")


@cache
def right(family, pattern):
    return {row.name: row for row in emulated(family, pattern)}


@pytest.mark.emulation
@pytest.mark.parametrize("family, pattern, name", RIGHT, ids=str)
def test_correct_kernels_pass(family, pattern, name):
    rows = right(family, pattern)
    assert not rows[name].failed and not rows[name].skipped and 0 <= rows[name].error <= 1, rows[name]
    assert any(row.error > 0 for row in rows.values()) or pattern == "step, NaN, fp32"


@pytest.mark.emulation
@pytest.mark.parametrize("family, pattern, wrong", [
    ("shrink", "*, fp32", {"soft_threshold, fp32"}),
    ("low rank", "*, tf32", {"lowrank_linear, tf32"}),
    ("step", "matrix program, tf32x3, bf16", {"matrix program, tf32x3, bf16"}),
    ("step", "step, NaN, fp32", {"step, NaN, fp32"}),
])  # fmt: skip
def test_a_wrong_kernel_is_recorded_and_refused(family, pattern, wrong, empty_cache):
    rows = emulated(family, pattern, "planted")
    assert {row.name for row in rows if row.failed} == wrong, rows
    assert all(row.failed.startswith(("error", "AssertionError")) for row in rows if row.failed), rows
    assert quarantine.refused(family, CPU) == ""
    file = selftest.record(CPU, rows)
    assert file.parent == empty_cache / "compaware" and list(file.parent.iterdir()) == [file]
    assert next(iter(wrong)) in quarantine.refused(family, CPU)
    assert "failed" in quarantine.about()["cpu"]
    selftest.record(CPU, [row for row in rows if not row.failed] or [rows[0]._replace(failed="")])
    assert quarantine.refused(family, CPU) == "" and quarantine.about() == {"cpu": "all passed"}


def failing(family):
    selftest.record(CPU, [selftest.Row(family, "case", 3.0, 0.1, "error 3 times its bound")])


def test_a_failed_step_is_refused(caplog):
    pytest.importorskip("triton")
    weights, functions = [torch.randn(4, 5)], [SoftThreshold(1.0)]
    with cuda_launcher.registered(lambda *launch: pytest.fail("launched")):
        assert backend.takes(weights, functions, True)
        failing("step")
        for _ in range(2):
            assert not backend.takes(weights, functions, True)
        ck.svt_(weights, 1.0)
    assert len([r for r in caplog.records if "failed the self-test here (case: error 3" in r.message]) == 1


def test_a_failed_fused_low_rank_kernel_is_refused():
    pytest.importorskip("triton")
    x, V, U = torch.randn(4, 16), torch.randn(8, 16), torch.randn(16, 8)

    def why_not():
        return backends.choose("lowrank_linear", CPU, x, V, U, kind="cuda")[1]

    before = why_not()
    failing("low rank")
    assert why_not() != before and "low rank kernels failed" in why_not()
    assert "low rank kernels failed" in backends.describe("lowrank_linear", CPU, kind="cuda")


def test_failed_shrink_kernels_are_replaced(caplog):
    """Its ops move from the library's kernels to the reference bodies; on a GPU the dispatch key is CUDA."""
    failing("shrink")
    assert "shrink kernels: plain PyTorch instead" in caplog.text
    script = """if True:
        import torch
        from compaware_kernels.ops import backends, library, quarantine, shrinkage
        assert backends._put
        assert backends.describe("soft_threshold", torch.device("cuda")).startswith("reference (plain PyTorch): ")
        backends._put.clear()
        called = []
        for name in backends.SHRINK_OPS:
            op = getattr(shrinkage, name)
            op._init_fn = lambda *args, body=op._init_fn, name=name: called.append(name) or body(*args)
        backends.replace_shrink("CPU")
        W, tau = torch.randn(3, 4), torch.tensor(0.5)
        P = torch.ops.compaware.soft_threshold(W, tau)
        torch.ops.compaware.soft_threshold_([W], tau[None].double())
        torch.ops.compaware.neuron_shrink_([W.clone()], [torch.ones(3)], tau[None].double())
        assert torch.equal(P, W), P
        assert {"soft_threshold", "soft_threshold_", "neuron_shrink_"} <= {*called}, called
        quarantine.failure = lambda *_: ""  # another self-test has passed
        backends.replace_shrink("CPU")
        called.clear()
        torch.ops.compaware.soft_threshold(W, tau)
        assert library.missing or not called, called"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.splitlines()
        == ["shrink kernels: plain PyTorch instead: they failed: case: error 3 times its bound"] * 2
    )


def test_records_can_be_ignored(monkeypatch):
    failing("step")
    assert quarantine.refused("step", CPU)
    quarantine.found.cache_clear()
    monkeypatch.setenv("COMPAWARE_VERDICTS", "ignore")
    assert not quarantine.refused("step", CPU)


def test_changed_code_needs_a_new_test(monkeypatch):
    failing("step")
    monkeypatch.setattr(quarantine, "code", lambda: "of another version")
    quarantine.found.cache_clear()
    assert quarantine.refused("step", CPU) == ""


def test_a_damaged_record_is_ignored():
    failing("step")
    quarantine._file().write_text("{")
    quarantine.found.cache_clear()
    assert quarantine.refused("step", CPU) == ""


def test_a_crash_or_timeout_fails_the_running_case(monkeypatch, tmp_path):
    script, python = tmp_path / "child", sys.executable

    def child(text):
        row = """print('row ["step", "one", 0.5, 1.0, "", ""]')"""
        lines = (
            f"#!{python}",
            "import os, time",
            "print('begin one')",
            row,
            "print('begin two', flush=True)",
            text,
        )
        script.write_text("\n".join(lines))
        script.chmod(0o755)
        monkeypatch.setattr(selftest.sys, "executable", str(script))
        return selftest._in_process("step", 0)

    one = selftest.Row("step", "one", 0.5, 1.0)
    killed = "its process ended with -6"
    assert child("os.abort()") == [one, selftest.Row("step", "two", failed=killed)]
    raised = child("raise RuntimeError('an illegal memory access')")[1]
    assert raised.name == "two" and raised.failed.endswith("RuntimeError: an illegal memory access")
    monkeypatch.setattr(selftest, "TIMEOUT", 2)
    assert child("time.sleep(60)") == [one, selftest.Row("step", "two", failed="no answer within 2 s")]


def test_the_command_reports_and_exits_1(monkeypatch):
    rows = [selftest.Row("step", "cold", 0.25, 1.5), selftest.Row("step", "warm", 7.0, None, "error 7 times its bound"),
            selftest.Row("shrink", "all", skipped="not in the library")]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU of a test")
    monkeypatch.setattr(selftest, "run", lambda device: rows)
    done = CliRunner().invoke(cli.app, ["info", "--selftest"])
    assert done.exit_code == 1
    for text in ("GPU of a test", "FAILED: error 7 times its bound", "0.25", "1.500", "not in the library"):
        assert text in done.output
    assert json.loads(quarantine._file().read_text()) == {"GPU of a test": {"step": "warm: error 7 times its bound"}}
