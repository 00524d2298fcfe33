"""make gpu-check runs what is marked so: nothing that emulates or compiles a GPU's kernels may be left out of it."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EMULATING = sorted(
    path
    for path in TESTS.rglob("*.py")
    if path.name.startswith("test_") or path.stem.endswith(("_interpreted", "step_emulated", "solver_emulated"))
    if "from tests.emulation import" in path.read_text() and path != Path(__file__)
)


def test_there_are_some():
    assert len(EMULATING) >= 10


@pytest.mark.parametrize("path", EMULATING, ids=lambda path: path.name)
def test_what_emulates_is_marked(path):
    assert "pytest.mark.emulation" in path.read_text()
