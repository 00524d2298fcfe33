"""Every example runs, and the compressed model that it saved loads into the model of its own code."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import compaware_kernels as ck
from tests.helpers.marks import slow_but

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
FAST = ("distributed_digits", "plain_pytorch", "transformers_trainer")
LAUNCHERS = {"distributed_digits": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
ARGUMENTS = {}  # others than one epoch
MODELS = {
    "accelerate_digits": "small_convnet",
    "distributed_digits": "small_convnet",
    "lightning_digits": "Digits",
    "plain_pytorch": "small_convnet",
    "transformers_trainer": "vit",
}


@pytest.mark.parametrize("name", slow_but(FAST, FILES))
def test_example(name, tmp_path, more=()):
    file = EXAMPLES / f"{name}.py"
    arguments = [*LAUNCHERS.get(name, []), str(file), *ARGUMENTS.get(name, ["--epochs", "1"]), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    if name in MODELS:
        assert re.search(r"held-out accuracy [\d.]+%, compressed [\d.]+%", done.stdout)
        (path,) = re.findall(r"saved to ([^\s;]+)", done.stdout)
        ck.load(tmp_path / path, runpy.run_path(str(file))[MODELS[name]]())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "tensor"])
def test_sharded(how, tmp_path):
    test_example("distributed_digits", tmp_path, ["--how", how])
