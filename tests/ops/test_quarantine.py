"""The self-test: what it says of right and of wrong kernels, here emulated, and that wrong ones are not used then."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import compaware_kernels as ck
from compaware_kernels import cli, selftest
from compaware_kernels.ops import backends, cuda_launcher, quarantine
from compaware_kernels.proximal.cuda import backend
from compaware_kernels.proximal.spectral_functions import SoftThreshold

LONG = "minutes: make gpu-check runs it"
pytestmark = pytest.mark.skipif(not os.environ.get("COMPAWARE_LADDER"), reason=LONG)

EMULATED = Path(__file__).parents[1] / "emulation/selftest_emulated.py"
CPU = torch.device("cpu")
PATTERNS = {"shrink": "*", "low rank": "*", "step": "matrix program*"}  # step, other: a few seconds each


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No verdicts before, none after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("COMPAWARE_VERDICTS", raising=False)
    quarantine.found.cache_clear()
    yield tmp_path
    quarantine.found.cache_clear()
    quarantine._put.clear()


def emulated(family, *arguments):
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(EMULATED), family, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return selftest.parse(family, done.stdout, "")


@pytest.mark.parametrize("family", PATTERNS)
def test_right_kernels_pass(family):
    rows = emulated(family, PATTERNS[family])
    assert len(rows) > 5 and not [row for row in rows if row.failed or row.skipped], rows
    assert all(0 <= row.error <= 1 for row in rows)
    assert any(row.error > 0 for row in rows)


@pytest.mark.parametrize("route", ["small", "cold", "warm", "firm small", "firm cold", "NaN"])
def test_right_steps_pass(route):
    (row,) = emulated("step", f"step, {route}, fp32")
    assert not row.failed and not row.skipped and row.error <= 1, row


@pytest.mark.parametrize("family, pattern, wrong", [
    ("shrink", "*, fp32", {"soft_threshold, fp32"}),
    ("low rank", "*, tf32", {"lowrank_linear, tf32"}),
    ("step", "matrix program, tf32x3, bf16", {"matrix program, tf32x3, bf16"}),
    ("step", "step, NaN, fp32", {"step, NaN, fp32"}),
])  # fmt: skip
def test_a_wrong_kernel_fails_is_written_down_and_refused(family, pattern, wrong, empty_cache):
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


def test_the_step_is_refused(caplog):
    pytest.importorskip("triton")
    weights, functions = [torch.randn(4, 5)], [SoftThreshold(1.0)]
    token = cuda_launcher.instead.set(lambda *launch: pytest.fail("launched"))
    try:
        assert backend.takes(weights, functions, True)
        failing("step")
        for _ in range(2):
            assert not backend.takes(weights, functions, True)
        ck.svt_(weights, 1.0)
    finally:
        cuda_launcher.instead.reset(token)
    assert len([r for r in caplog.records if "failed the self-test here (case: error 3" in r.message]) == 1


def test_the_fused_low_rank_kernel_is_refused():
    pytest.importorskip("triton")
    x, V, U = torch.randn(4, 16), torch.randn(8, 16), torch.randn(16, 8)
    before = backends.why_not(x, V, U)
    failing("low rank")
    assert backends.why_not(x, V, U) != before and "low rank kernels failed" in backends.why_not(x, V, U)


def test_shrink_is_replaced(caplog):
    """Its ops go from torch to the library; on a GPU the key is CUDA."""
    failing("shrink")
    assert "shrink kernels: plain PyTorch instead" in caplog.text
    script = """if True:
        import torch
        from compaware_kernels.ops import shrinkage
        from compaware_kernels.gpu import verdicts
        assert verdicts._put
        verdicts._put.clear()
        called = []
        for name in [*(name + end for name in verdicts.SHRINK_OPS for end in ("", "_")), "neuron_shrink_"]:
            op = getattr(shrinkage, name)
            op._init_fn = lambda *args, body=op._init_fn, name=name: called.append(name) or body(*args)
        verdicts.replace_shrink("CPU")
        W, tau = torch.randn(3, 4), torch.tensor(0.5)
        P = torch.ops.compaware.soft_threshold(W, tau)
        torch.ops.compaware.soft_threshold_([W], tau[None].double())
        torch.ops.compaware.neuron_shrink_([W.clone()], [torch.ones(3)], tau[None].double())
        assert torch.equal(P, W), P
        assert {"soft_threshold", "soft_threshold_", "neuron_shrink_"} <= {*called}, called"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.splitlines()
        == ["shrink kernels: plain PyTorch instead: they failed: case: error 3 times its bound"] * 2
    )


def test_verdicts_can_be_ignored(monkeypatch):
    failing("step")
    assert quarantine.refused("step", CPU)
    quarantine.found.cache_clear()
    monkeypatch.setenv("COMPAWARE_VERDICTS", "ignore")
    assert not quarantine.refused("step", CPU)


def test_other_code_needs_another_test(monkeypatch):
    failing("step")
    monkeypatch.setattr(quarantine, "_code", lambda: "of another version")
    quarantine.found.cache_clear()
    assert quarantine.refused("step", CPU) == ""


def test_a_damaged_file_says_nothing():
    failing("step")
    quarantine._file().write_text("{")
    quarantine.found.cache_clear()
    assert quarantine.refused("step", CPU) == ""


def test_a_process_that_dies_or_hangs_fails_the_case_it_was_in(monkeypatch, tmp_path):
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
