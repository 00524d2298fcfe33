"""setup.py: what it decides, and what an installation without compiled kernels is like."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compaware_kernels.ops import library

ROOT = Path(__file__).parents[1]


def load_setup():
    spec = importlib.util.spec_from_file_location("compaware_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # not as __main__: decides and builds nothing
    return module


build = load_setup()


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """tools("c++", "nvcc"): a machine on which exactly these programs are found."""
    which = shutil.which

    def install(*names, folder="bin"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (tmp_path / folder / name).write_text("#!/bin/sh\n")
            (tmp_path / folder / name).chmod(0o755)
        return str(tmp_path / folder)

    monkeypatch.setenv("PATH", install())
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    elsewhere = "/usr/local/cuda/bin/nvcc"  # this machine may have one
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name == elsewhere else which(name))
    return install


@pytest.mark.parametrize(
    "found, mode", [((), "none"), (("g++",), "cpu"), (("nvcc",), "none"), (("clang++", "nvcc"), "cuda")]
)
def test_auto_is_decided_by_the_compilers(tools, found, mode):
    tools(*found)
    got, reason = build.decide("auto", *build.find_compilers())
    assert got == mode
    assert ("nvcc: not found" in reason) == ("nvcc" not in found)


def test_cuda_home_is_searched(tools, monkeypatch, tmp_path):
    tools("c++")
    tools("nvcc", folder="cuda/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build.find_compilers()[1] == str(tmp_path / "cuda" / "bin" / "nvcc")


def test_cxx_is_preferred(tools, monkeypatch):
    tools("c++", "my-compiler")
    monkeypatch.setenv("CXX", "my-compiler")
    assert build.find_compilers()[0].endswith("my-compiler")


@pytest.mark.parametrize("mode", ["cpu", "cuda", "none"])
def test_a_forced_mode_is_taken(mode):
    assert build.decide(mode, "c++", "nvcc") == (mode, f"COMPAWARE_BUILD={mode}")


@pytest.mark.parametrize(
    "mode, cxx, nvcc, message",
    [
        ("cuda", "c++", None, "nvcc: not found.*COMPAWARE_BUILD=none installs"),
        ("cuda", None, "nvcc", "C\\+\\+ compiler: not found"),
        ("cpu", None, None, "C\\+\\+ compiler: not found"),
        ("gpu", "c++", "nvcc", "wanted auto, cuda, cpu or none; got 'gpu'"),
    ],
)
def test_what_cannot_be_done_is_refused(mode, cxx, nvcc, message):
    with pytest.raises(SystemExit, match=message):
        build.decide(mode, cxx, nvcc)


def test_archs():
    known = "sm_80\nsm_90\nsm_100\nsm_120\n"
    assert build.pick_archs(build.ARCHS, known) == ["80", "90a", "100", "120"]
    assert build.pick_archs("8.0;9.0a 10.0+PTX", known) == ["80", "90a", "100"]
    assert build.pick_archs("7.0;8.0;13.0", known) == ["80"]
    with pytest.raises(SystemExit, match=r"nvcc knows none of '7\.0'"):
        build.pick_archs("7.0", known)


def pip_install(source, target, **env):
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--target", str(target), str(source)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, with the remains of an earlier build in it."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "_C.abi3.so", "_build.json")
    for name in ("compaware_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "setup.py", ROOT / "MANIFEST.in", ROOT / "LICENSE"):
        shutil.copy(path, source)
    (source / "compaware_kernels" / "_C.abi3.so").write_text("stale")
    (source / "compaware_kernels" / "_build.json").write_text("stale")
    return source


def test_without_kernels(tree, tmp_path):
    installed = tmp_path / "site"
    result = pip_install(tree, installed, COMPAWARE_BUILD="none")
    assert result.returncode == 0, result.stdout + result.stderr
    said = "compaware-kernels: mode none (COMPAWARE_BUILD=none)"
    assert (result.stdout + result.stderr).count(said) == 1
    assert not (installed / "compaware_kernels" / "_C.abi3.so").exists()
    headers = [path.relative_to(ROOT) for folder in ("core", "cuda") for path in ROOT.glob(f"csrc/{folder}/*.*h")]
    for path in headers:  # what NVRTC compiles
        assert (installed / "compaware_kernels" / path).read_bytes() == (ROOT / path).read_bytes()

    script = """if True:
        import json, torch, compaware_kernels as ck
        from compaware_kernels.ops import cuda_launcher
        assert cuda_launcher.sources().parent.name == "compaware_kernels", cuda_launcher.sources()
        assert not ck.group_shrink(torch.ones(2, 3), 5.0).any()
        print(json.dumps(ck.info()))"""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    info = json.loads(run.stdout)
    assert info["library"] == info["CUDA C++ kernels"]["built"] == "not built"
    assert info["build"] == {"mode": "none", "reason": "COMPAWARE_BUILD=none"}
    plain = {"reference (plain PyTorch)", "solver (plain PyTorch)"}
    assert {bodies["CPU"].partition(":")[0] for bodies in info["ops"].values()} == plain
    assert not any(bodies["CUDA"].startswith("C++ kernel") for bodies in info["ops"].values())


def test_a_failed_compilation_says_what_to_do(tree, tmp_path):
    result = pip_install(tree, tmp_path / "site", COMPAWARE_BUILD="cpu", CXX=shutil.which("false"))
    assert result.returncode != 0
    assert "compilation failed" in result.stdout + result.stderr
    assert "COMPAWARE_BUILD=none installs without compiled kernels" in result.stdout + result.stderr


def test_a_library_that_does_not_load_is_logged_not_raised(tmp_path, caplog):
    broken = tmp_path / "_C.abi3.so"
    broken.write_text("not a library")
    with caplog.at_level(logging.WARNING, logger="compaware_kernels"):
        reason = library.load(broken)
    assert "_C.abi3.so could not be loaded" in reason
    assert [record.levelname for record in caplog.records] == ["WARNING"] and reason in caplog.text
    assert library.load(tmp_path / "absent.so") == "not built"
