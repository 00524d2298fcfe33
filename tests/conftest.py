"""What holds for all tests: one thread each, memory that is NaN until written, and which process runs which kernels."""

import os
import sys
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: pytest -n N keeps N cores busy, and numbers stay the same

import pytest
import torch

INTERPRETED = ("_interpreted.py", "gpu_step_emulated.py", "solver_emulated.py")  # what needs Triton's interpreter
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # or compiling: Triton decides as it is imported


def pytest_ignore_collect(collection_path):
    """Under the interpreter nothing but its own tests."""
    if INTERPRETING and collection_path.suffix == ".py" and not collection_path.name.endswith(INTERPRETED):
        return True


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.endswith(INTERPRETED) and not INTERPRETING:
        return Elsewhere.from_parent(parent, path=module_path)


class Elsewhere(pytest.File):
    """A file whose tests need a process of their own: shown as one skipped test."""

    def collect(self):
        item = NotHere.from_parent(self, name="all")
        item.add_marker("emulation")
        yield item


class NotHere(pytest.Item):
    def runtest(self):
        pytest.skip("interpreted Triton kernels: TRITON_INTERPRET=1 pytest runs these and only these")


@pytest.fixture(autouse=True)
def poisoned_empty():
    """What torch.empty returns is NaN: an op that reads what it has not written shows it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def command_line(monkeypatch, capsys):
    """command_line(*arguments): what ``compaware`` prints and returns, without a process of its own."""
    from compaware_kernels import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", ["compaware", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return SimpleNamespace(returncode=ended.value.code, **capsys.readouterr()._asdict())

    return run
