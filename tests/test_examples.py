"""Every example runs, and the compressed model that it saved loads into the model of its own code."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import compaware_kernels as ck

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
LAUNCHERS = {"distributed_digits": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
ARGUMENTS = {}  # others than one epoch
LONG = ("learned_rank_lora",)
MODELS = {
    "accelerate_digits": "small_convnet",
    "distributed_digits": "small_convnet",
    "lightning_digits": "Digits",
    "plain_pytorch": "small_convnet",
    "transformers_trainer": "vit",
}


@pytest.mark.parametrize(
    "file", [pytest.param(f, id=f.stem, marks=[pytest.mark.slow] * (f.stem in LONG)) for f in FILES]
)
def test_example(file, tmp_path, more=()):
    arguments = [*LAUNCHERS.get(file.stem, []), str(file), *ARGUMENTS.get(file.stem, ["--epochs", "1"]), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    if file.stem in MODELS:
        assert re.search(r"held-out accuracy [\d.]+%, compressed [\d.]+%", done.stdout)
        (path,) = re.findall(r"saved to ([^\s;]+)", done.stdout)
        ck.load(tmp_path / path, runpy.run_path(str(file))[MODELS[file.stem]]())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "tensor"])
def test_sharded(how, tmp_path):
    test_example(EXAMPLES / "distributed_digits.py", tmp_path, ["--how", how])
