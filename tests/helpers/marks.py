"""Parameters of a test, most of them for ``make test-all`` only."""

import pytest


def slow_but(kept, values):
    """All ``values``, those that are not in ``kept`` marked as slow."""
    values = list(values)
    assert set(kept) <= set(values)
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]
