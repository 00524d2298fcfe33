"""The first cases of damaged and hostile files; ``make hunt`` runs many more."""

import pytest

from tests.fuzz import files


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_damaged_and_hostile_files(first):
    found = {seed: files.check(seed) for seed in range(first, first + 100)}
    assert not {seed: case for seed, case in found.items() if case[1]}
