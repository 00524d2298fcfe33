"""The command line: what it writes, exit codes, errors as one line."""

import gzip
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import compaware_kernels as ck
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.ops.backends import TABLE

NETWORK = ["--model", "compaware_kernels.demo.networks:small_convnet", "--input", "1,1,8,8"]


def run(*args):
    command = [sys.executable, "-m", "compaware_kernels", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_info(command_line):
    facts = json.loads(run("info", "--json").stdout)
    assert set(facts["ops"]) == set(TABLE) and facts["version"] == ck.__version__
    assert facts["ops"] == ck.info()["ops"]
    table = command_line("info").out
    assert all(f"compaware::{name} " in table for name in facts["ops"])


def test_compress_writes_a_model_that_loads(tmp_path):
    torch.save(small_convnet().state_dict(), tmp_path / "dense.pt")
    out, report = tmp_path / "small.safetensors", tmp_path / "report.json"
    options = ("--rank", "fixed:4", "--goal", "size", "--out", out, "--report", report)
    done = run("compress", tmp_path / "dense.pt", *NETWORK, *options)
    assert done.returncode == 0, done.stderr
    totals = json.loads(report.read_text())
    small = ck.load(out, small_convnet())
    assert sum(p.numel() for p in small.parameters()) == totals["params"] < totals["params_before"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "absent.pt"}, "absent.pt: no such file"),
        ({"weights": "damaged.pt"}, "damaged.pt: wanted a readable state dict"),
        ({"--rank": "magic:1"}, "rank rule: wanted name:value"),
        ({"--fold": "crane"}, "got 'crane'"),
        ({"--goal": "fame"}, "got 'fame'"),
        ({"--model": "torch.nn:Identity"}, "wanted a state dict of torch.nn:Identity"),
        ({"--model": "no_such_module:f"}, "No module named"),
        ({"--input": "1,3,8,8"}, "3 channels"),
    ],
    ids=str,
)
def test_errors_are_one_line(tmp_path, command_line, change, words):
    torch.save(small_convnet().state_dict(), tmp_path / "dense.pt")
    (tmp_path / "damaged.pt").write_bytes(b"garbage")
    options = dict(zip(NETWORK[::2], NETWORK[1::2], strict=True)) | {"--rank": "energy:0.9", "--fold": "paper"} | change
    weights = tmp_path / options.pop("weights", "dense.pt")
    done = command_line(
        "compress", weights, "--out", tmp_path / "out", *[x for option in options.items() for x in option]
    )
    assert done.returncode == 1 and done.err.count("\n") == 1, done.err
    assert done.err.startswith("compaware: error: ") and words in done.err
    assert not (tmp_path / "out").exists()


def test_errors_of_a_process():
    done = run("compress", "absent.pt", *NETWORK, "--rank", "energy:0.9", "--out", "out")
    assert done.returncode == 1 and done.stderr == "compaware: error: absent.pt: no such file\n"


def test_usage_errors_exit_2(command_line):
    assert command_line("compress", "w.pt", "--out", "o", "--model", "nocolon", "--input", "1,2").returncode == 2
    assert command_line("demo", "--seeds", "0").returncode == 2


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_demo_on_idx_files_writes_report_results_and_models(tmp_path, command_line):
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        labels = gzip.compress(idx((np.arange(count) % 10).astype(np.uint8)))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(labels)
    out = tmp_path / "out"
    done = run("demo", "--data", tmp_path, "--seeds", 1, "--epochs", 1, "--tune-epochs", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5 and "<script" not in page and "<link" not in page
    assert "Measured time" not in page and "Zeros free" not in page  # neither is part of the demo
    results = json.loads((out / "results.json").read_text())
    assert [record["key"]["arm"] for record in results["records"]] == ["plain", "nuclear+group"]
    assert {path.name for path in out.iterdir()} - {"small.safetensors"} == {
        "report.html", "results.json", "curves.svg", "dense.safetensors"
    }  # fmt: skip
    sizes = [sum(p.numel() for p in ck.load(path, small_convnet()).parameters()) for path in out.glob("*.safetensors")]
    assert max(sizes) == results["records"][0]["params"]
    assert done.stdout.count("compression-aware") >= 12 and "of the plain one's multiply-adds" in done.stdout
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    assert (
        "not an IDX file"
        in command_line("demo", "--data", tmp_path, "--threads", torch.get_num_threads(), "--out", out).err
    )
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    assert (
        "no such file"
        in command_line("demo", "--data", tmp_path, "--threads", torch.get_num_threads(), "--out", out).err
    )
