"""Measured choices: candidates are timed once per key, process and machine; the file may be damaged at any time."""

import json
import logging
import os
import time

import pytest

from compaware_kernels.environment import info
from compaware_kernels.ops import quarantine, tuner


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """An empty folder for the file, and nothing known to this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COMPAWARE_TUNE", "on")
    for forget in (tuner.forget, tuner._say.cache_clear):
        forget()
    yield tmp_path
    for forget in (tuner.forget, tuner._say.cache_clear):
        forget()


def sleeps(**milliseconds):
    """Candidates that take so long, and how often each was called."""
    count = dict.fromkeys(milliseconds, 0)

    def call(name):
        count[name] += 1
        time.sleep(1e-3 * milliseconds[name])

    return {name: lambda name=name: call(name) for name in milliseconds}, count


def test_the_fastest_has_the_least_time():
    calls, count = sleeps(slow=8, fast=1, second=1.2)
    found = tuner.least(calls)
    assert min(found, key=found.get) == "fast" and found["slow"] >= 8 and found["fast"] < found["second"] < 8
    assert count["slow"] <= 3 and tuner.ROUNDS <= count["fast"] <= tuner.MOST + 2, "what is far slower is dropped early"


def test_a_first_call_that_takes_longer_does_not_count(monkeypatch):
    monkeypatch.setattr(tuner, "FIRST", 1e3)
    calls, _ = sleeps(a=1, b=2)
    first = iter([0.2])

    def late():
        time.sleep(next(first, 0))
        calls["a"]()

    found = tuner.least({"b": calls["b"], "a": late})
    assert found["a"] < 100


def test_one_candidate_needs_no_rounds():
    calls, count = sleeps(only=1)
    assert tuner.least(calls)["only"] >= 1 and count["only"] <= 2


def test_a_key_is_measured_once_per_process_and_per_machine():
    calls, count = sleeps(a=0.2, b=0.4)
    first = tuner.times("key", lambda: calls)
    done = dict(count)
    assert tuner.times("key", lambda: calls) is first
    tuner.forget()  # as a new process
    assert tuner.times("key", lambda: pytest.fail("measured again")) == first and count == done
    assert tuner.times("other key", lambda: calls) and count != done
    assert json.loads(tuner.file().read_text()).keys() == {"key", "other key"}


def test_the_file_is_of_this_machine_and_these_versions(empty_cache, monkeypatch):
    here = tuner.file()
    assert here.parent == empty_cache / "compaware"
    for name, value in (("processor", lambda: "another"), ("quarantine.code", lambda: "other kernels")):
        with monkeypatch.context() as patch:
            patch.setattr(f"compaware_kernels.ops.tuner.{name}", value)
            tuner._machine.cache_clear()
            assert tuner.file() != here
    tuner._machine.cache_clear()
    assert tuner.file() == here


DAMAGED = {
    "cut": b'{"key": {"a": 1.0',
    "empty": b"",
    "no text": b"\xff\x00\xfe",
    "a list": b"[1, 2]",
    "no times": b'{"key": 3}',
    "no candidate": b'{"key": {}}',
    "a word for a time": b'{"key": {"a": "fast"}}',
    "not a time": b'{"key": {"a": -1.0}}',
    "NaN": b'{"key": {"a": NaN}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_ignored_and_replaced(damage, caplog):
    tuner.file().parent.mkdir()
    tuner.file().write_bytes(DAMAGED[damage])
    with caplog.at_level(logging.WARNING, logger="compaware_kernels"):
        for key in ("key", "other"):
            assert set(tuner.times(key, lambda: sleeps(a=0, b=0)[0])) == {"a", "b"}
    assert len(caplog.records) == 1 and str(tuner.file()) in caplog.text, caplog.text
    assert json.loads(tuner.file().read_text()).keys() == {"key", "other"}


def test_without_a_place_for_the_file(monkeypatch, tmp_path, caplog):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    with caplog.at_level(logging.WARNING, logger="compaware_kernels"):
        for key in ("key", "other"):
            assert tuner.times(key, lambda: sleeps(a=0, b=0)[0])
    assert len({record.message for record in caplog.records}) == len(caplog.records) <= 2
    assert "cannot be written" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork") or tuner.flock is None, reason="no processes that share this folder")
def test_processes_that_write_at_once_lose_nothing():
    children = []
    for child in range(4):
        if not (pid := os.fork()):
            for i in range(12):
                tuner._write(f"{child} {i}", {"a": 1.0})
            os._exit(0)
        children.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    assert len(json.loads(tuner.file().read_text())) == 48
    assert {path.suffix for path in tuner.file().parent.iterdir()} == {".json", ".lock"}, "nothing temporary is left"


def test_off(monkeypatch):
    assert tuner.enabled() and str(tuner.file()) in info()["low-rank layers on the CPU"]
    monkeypatch.setenv("COMPAWARE_TUNE", "off")
    assert not tuner.enabled() and "COMPAWARE_TUNE=off" in info()["low-rank layers on the CPU"]
    assert not quarantine.folder().exists()
