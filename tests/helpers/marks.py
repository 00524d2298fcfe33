"""Parameters of a test, most of them for ``make test-all`` only."""

import pytest


def slow_but(kept, values):
    """All ``values``, those that are not in ``kept`` marked as slow; tuples are of several parameters."""
    values = list(values)
    assert set(kept) <= set(values)
    return [value if value in kept else _slow(value) for value in values]


def _slow(value):
    return pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
