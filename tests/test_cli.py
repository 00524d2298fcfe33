"""The command line: what it writes, exit codes, errors as one line."""

import gzip
import json
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression import command, latency_model
from compaware_kernels.compression.state_dicts import read_into
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


def compress(command_line, weights, *options, out=None, model="compaware_kernels.demo.networks:small_convnet"):
    out = out or weights.parent / "small.safetensors"
    return command_line("compress", weights, "--model", model, "--input", "1,1,8,8", "--rank", "fixed:4", "--goal",
                        "size", "--out", out, *options)  # fmt: skip


STATE = small_convnet().state_dict()
PREFIXED = {f"module._orig_mod.{name}": T for name, T in STATE.items()}
CHECKPOINTS = {
    "state_dict": ({"state_dict": STATE, "epoch": 3}, "state dict at 'state_dict'"),
    "model": ({"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "state dict at 'model'"),
    "ema": ({"ema": {"module": STATE}}, "state dict at 'ema.module'"),
    "DDP": ({f"module.{name}": T for name, T in STATE.items()}, "removed the prefix 'module.'"),
    "compiled": ({f"_orig_mod.{name}": T for name, T in STATE.items()}, "the parts of names that wrappers add"),
    "all": ({"state_dict": PREFIXED}, "removed the prefix 'module.'"),
    "Lightning": ({"state_dict": {f"net.{n}": T for n, T in STATE.items()} | {"loss.weight": torch.ones(2)}},
                  "removed the prefix 'net.' and 1 other entries"),
    "average": ({f"module.{n}": T for n, T in STATE.items()} | {"n_averaged": torch.tensor(3)}, "1 other entries"),
    "half": ({name: T.half() for name, T in STATE.items()}, "converted float16 to float32"),
    "two": ({"model": STATE, "ema": {n: 2 * T for n, T in STATE.items()}}, "'ema' would fit, too (--key)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_as_programs_write_them(tmp_path, command_line, name):
    content, said = CHECKPOINTS[name]
    torch.save(content, tmp_path / "w.pt")
    done = compress(command_line, tmp_path / "w.pt", "--skip", "0")
    assert done.returncode == 0 and said in done.out, done
    kept = ck.load(tmp_path / "small.safetensors", small_convnet())[0].weight
    torch.testing.assert_close(kept, STATE["0.weight"], atol=0, rtol=1e-3 if name == "half" else 0)


def test_the_key_picks_a_state_dict(tmp_path, command_line):
    torch.save(CHECKPOINTS["two"][0], tmp_path / "w.pt")
    done = compress(command_line, tmp_path / "w.pt", "--skip", "0", "--key", "ema")
    assert torch.equal(ck.load(tmp_path / "small.safetensors", small_convnet())[0].weight, 2 * STATE["0.weight"])
    done = compress(command_line, tmp_path / "w.pt", "--key", "best")
    assert done.returncode == 1 and "wanted a state dict at 'best'; got 'model', 'ema'" in done.err


def test_tied_tensors_need_one_of_their_names(tmp_path):
    """Of safetensors files, others' too, hold a tied tensor once."""

    def tied():
        model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
        model[1].weight = model[0].weight
        return model

    for name in ("0.weight", "1.weight", "net.1.weight"):
        save_file({name: torch.full((6, 4), 3.0)}, tmp_path / "w.safetensors")
        read_into(model := tied(), tmp_path / "w.safetensors")
        assert (model[0].weight == 3).all() and model[1].weight is model[0].weight


def test_model_functions_with_arguments(tmp_path, command_line, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef net(width, *, bias): return nn.Sequential(nn.Linear(8, width, bias=bias))"
    )
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Linear(8, 20, bias=False)).state_dict(), tmp_path / "w.pt")
    for arguments in ("20, bias=False", "width=20, bias=False"):
        done = compress(command_line, tmp_path / "w.pt", "--model-args", arguments, "--input", "1,8", model="own:net")
        assert done.returncode == 0 and f"net({arguments})" in done.out, done
    for arguments, words in (("", "wanted its arguments in --model-args; got ''"), ("3, no=4", "unexpected keyword"),
                             ("print(1)", "wanted Python literals"), ("1) + f(2", "wanted Python literals"),
                             ("*[1]", "wanted Python literals"), ("(" * 3000, "wanted Python literals")):  # fmt: skip
        done = compress(command_line, tmp_path / "w.pt", "--model-args", arguments, "--input", "1,8", model="own:net")
        assert done.returncode == 1 and words in done.err and done.err.count("\n") == 1, done.err


def test_folders_are_made_and_sizes_and_loading_said(tmp_path, command_line):
    torch.save(STATE, weights := tmp_path / "w.pt")
    out, report = tmp_path / "new/deep/o.safetensors", tmp_path / "other/r.json"
    done = compress(command_line, weights, "--report", report, out=out)
    assert report.is_file() and f"{weights}, {weights.stat().st_size:,} bytes" in done.out
    assert f"{out}, {out.stat().st_size:,} bytes" in done.out and f"load('{out}', small_convnet())" in done.out


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("o.pt", "--out: wanted a .safetensors file, the only format written; got"),
        ("o.v2", "o.safetensors would do"),
        ("file/o.safetensors", "file"),
        ("folder.safetensors", "wanted a file to write; got a folder"),
    ],
)
def test_where_nothing_can_be_written_is_said_first(tmp_path, command_line, monkeypatch, out, words):
    monkeypatch.setattr(command, "_build", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    torch.save(STATE, tmp_path / "w.pt")
    done = compress(command_line, tmp_path / "w.pt", out=tmp_path / out)
    assert done.returncode == 1 and words in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize("same", ["weights and out", "out and report", "weights and report"])
def test_no_file_is_overwritten_by_another(tmp_path, command_line, same):
    weights, out, report = (tmp_path / name for name in ("w.safetensors", "o.safetensors", "r.json"))
    save_file(STATE, weights)
    before = weights.read_bytes()
    (tmp_path / "link").symlink_to(weights)
    if same == "weights and out":
        out = tmp_path / "link"
    else:
        report = tmp_path / "link" if "weights" in same else out
    done = compress(command_line, weights, "--report", report, out=out)
    assert done.returncode == 1 and "wanted different files to read and to write; got" in done.err, done.err
    assert weights.read_bytes() == before and not (tmp_path / "o.safetensors").exists()


def test_pickled_objects_are_named(tmp_path, command_line):
    torch.save({"state_dict": STATE, "config": small_convnet()}, tmp_path / "w.pt")
    done = compress(command_line, tmp_path / "w.pt")
    assert "got an object of torch.nn.modules.container.Sequential: save model.state_dict() alone" in done.err, done.err
    (tmp_path / "w.pt").write_bytes(b"")
    assert compress(command_line, tmp_path / "w.pt").err.endswith("wanted a readable state dict; got EOFError\n")


def test_nothing_factorized_is_said(tmp_path, command_line, monkeypatch):
    monkeypatch.setattr(latency_model, "choose", lambda *_, **__: (None, 0.9, "would be 0.9x as fast"))
    torch.save(STATE, tmp_path / "w.pt")
    done = compress(command_line, tmp_path / "w.pt", "--goal", "speed")
    assert done.returncode == 0 and "No layer was factorized, for the reasons in the notes. --goal size wo" in done.out
    _, summary = ck.compress(small_convnet(), ck.ranks.fixed(4), (torch.zeros(1, 1, 8, 8),), goal="size")
    assert f"would give {summary.params:,} instead of {summary.params_before:,} parameters" in done.out
    done = compress(command_line, tmp_path / "w.pt", "--rank", "fixed:1000")
    assert "No layer was factorized, for the reasons in the notes.\n" in done.out


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_damaged_state_dicts_are_one_line(tmp_path, command_line, protocol):
    path = tmp_path / "w.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=protocol == "zip")
    raw, chance = path.read_bytes(), random.Random(0)
    for i in range(30):
        at = chance.randrange(400 if i % 2 else len(raw))
        path.write_bytes(raw[:at] if i % 3 else raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :])
        done = compress(command_line, path)
        assert done.returncode == 0 or (done.err.startswith("compaware: error: ") and done.err.count("\n") == 1), done
    for content in (torch.ones(3), [STATE], 3, {}, {"a": 1}, {"x": {1: torch.ones(2)}}):
        torch.save(content, path)
        done = compress(command_line, path)
        assert done.returncode == 1 and "w.pt: wanted a state dict; got " in done.err, done.err


def test_a_state_dict_that_does_not_fit_lists_three_names(tmp_path, command_line):
    torch.save({"w": {name: T for name, T in STATE.items() if name != "0.weight"}, "h": STATE | {
        f"more.{i}": torch.ones(1) for i in range(40)}}, tmp_path / "w.pt")  # fmt: skip
    done = compress(command_line, tmp_path / "w.pt", "--key", "w")
    assert "1 missing (0.weight). Another architecture" in done.err and "at 'w'" in done.err
    done = compress(command_line, tmp_path / "w.pt", "--key", "h")
    assert "40 not of the model (more.0, more.1, more.2, ...)" in done.err
    torch.save(STATE | {"0.bias": torch.full_like(STATE["0.bias"], torch.nan)}, tmp_path / "w.pt")
    assert "0.bias: wanted numbers; got NaN" in compress(command_line, tmp_path / "w.pt").err
    small, _ = ck.compress(small_convnet(), ck.ranks.fixed(4), (torch.zeros(1, 1, 8, 8),), goal="size")
    ck.save(small, tmp_path / "w.safetensors")
    assert "It is a compressed model" in compress(command_line, tmp_path / "w.safetensors").err


def test_version(command_line):
    done = command_line("--version")
    assert done.returncode == 0 and done.out == f"compaware {ck.__version__}\n"


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
        ({"--input": "100000000,100000000"}, "--input: wanted a shape that"),
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
    layers = len(STATE) // 2  # a spectrum of each, and their legend
    assert page.count("<svg") == 4 + layers + 1 and "<script" not in page and "<link" not in page
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
