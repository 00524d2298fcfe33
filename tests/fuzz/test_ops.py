"""The first seeds of the fuzz of the ops; ``make hunt`` runs many more."""

import os
import signal

from tests.fuzz import driver, ops


def test_first_seeds():
    found = list(driver.results("tests.fuzz.ops", 0, 250))
    assert [result for result in found if result.violations] == []
    assert [result.seed for result in found] == list(range(250))


def test_a_seed_makes_the_same_case_again():
    assert [ops.check(seed)[0] for seed in range(5)] == [ops.check(seed)[0] for seed in range(5)]


def test_a_crash_is_a_violation():
    before, crashed = driver.results("tests.fuzz.test_ops", 6, 2)
    assert before == (6, "none", []) and crashed == (7, "?", ["the process ended with SIGSEGV"])


def check(seed: int) -> tuple[str, list[str]]:
    """Cases of the test above: seed 7 ends the process."""
    if seed == 7:
        os.kill(os.getpid(), signal.SIGSEGV)
    return "none", []
