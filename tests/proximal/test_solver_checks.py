"""The checks that test_gpu_engine.py makes on a GPU, emulated: they pass here, so there they test the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LONG = "minutes: make gpu-check runs it"
pytestmark = pytest.mark.skipif(not os.environ.get("COMPAWARE_LADDER"), reason=LONG)


def test_under_interpreter_and_emulator():
    pytest.importorskip("triton")
    file = Path(__file__).parents[1] / "emulation/solver_emulated.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
