"""The first cases of damaged and hostile files; ``make hunt`` runs many more."""

import pytest

from tests.fuzz import files


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_damaged_and_hostile_files(first):
    found = {seed: files.check(seed) for seed in range(first, first + 100)}
    assert not {seed: case for seed, case in found.items() if case[1]}


def test_a_sparse_value_of_a_tied_tensor():
    """Found by these cases."""
    assert not files.check(25773)[1]
