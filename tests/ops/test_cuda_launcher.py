"""Launcher of the CUDA C++ kernels (ops/cuda_launcher.py): how kernels are found and launched, without a GPU."""

import ctypes
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compaware_kernels.ops import cuda_launcher, library
from tests.emulation import emulator, nvrtc_aot
from tests.emulation.fake_cupy import FakeCupy

FIRST, SECOND = (torch.device("cuda", i) for i in range(2))
no_gpu = not torch.cuda.is_available()
needs_nvrtc = pytest.mark.skipif(nvrtc_aot.nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed")
needs_built = pytest.mark.skipif(bool(cuda_launcher.Built.why_not()), reason=cuda_launcher.Built.why_not())


@pytest.fixture(autouse=True)
def nothing_chosen_yet(monkeypatch):
    monkeypatch.delenv("COMPAWARE_CUDA", raising=False)
    for forget in (cuda_launcher._tried.clear, cuda_launcher._refusals.cache_clear):
        forget()
    yield
    for forget in (cuda_launcher._tried.clear, cuda_launcher._refusals.cache_clear):
        forget()


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, sm_75 and sm_90, and a library built for the second."""
    capabilities = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    streams = {i: SimpleNamespace(device_index=i, cuda_stream=0x1000 + i) for i in capabilities}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    monkeypatch.setattr(library, "build", lambda: {"archs": ["80", "90a"]})


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    """CuPy with an empty cache, and one kernel to compile."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    for folder in ("core", "cuda"):
        shutil.copytree(cuda_launcher.sources() / folder, tmp_path / "csrc" / folder)
    (tmp_path / "csrc" / "cuda" / "kernels.cuh").write_text('#include "shrink.cuh"')
    monkeypatch.setattr(cuda_launcher, "SOURCES", (tmp_path / "absent", tmp_path / "csrc"))
    return FakeCupy(monkeypatch)


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(library, "missing", "not built")


@needs_nvrtc
@pytest.mark.parametrize("older", [False, True])
def test_launch_by_cupy(gpus, cupy, without_library, older):
    if older:
        cupy.cuda.Stream, cupy.cuda.ExternalStream = None, cupy.ExternalStream
    x = torch.zeros(4, dtype=torch.float64)
    assert cuda_launcher.missing(SECOND) == ""
    cuda_launcher.launch("ck_shrink", 3, 256, 100_000, [x, 7, 0.5], SECOND)
    cuda_launcher.launch("ck_shrink", 0, 256, 0, [x], SECOND)
    ((name, grid, block, arguments, shared, device, stream),) = cupy.log
    assert (name, grid, block, shared, device, stream) == ("ck_shrink", (3,), (256,), 100_000, 1, 0x1001)
    assert arguments == (x.data_ptr(), 7, 0.5)
    assert [type(argument) for argument in arguments] == [np.int64, np.int64, np.float64]


@needs_nvrtc
def test_compiled_kernels_are_cached(gpus, cupy, without_library, tmp_path, monkeypatch):
    for _ in range(2):  # the second pass is what another process would find
        cuda_launcher._tried.clear()
        assert cuda_launcher.missing(SECOND) == ""
    assert len(cupy.compiled) == 1 and "-arch=sm_90" in cupy.compiled[0]
    assert not any("fast" in option or "ftz" in option for option in cupy.compiled[0])
    csrc = shutil.copytree(cuda_launcher.sources(), tmp_path / "copy")
    monkeypatch.setattr(cuda_launcher, "SOURCES", (csrc,))
    assert cuda_launcher.compiled(90) == cuda_launcher.compiled(90) and len(cupy.compiled) == 1, (
        "the same sources elsewhere"
    )
    with open(csrc / "core" / "shrink.h", "a") as header:
        header.write("// changed\n")
    assert cuda_launcher.compiled(90) and len(cupy.compiled) == 2
    assert cuda_launcher.compiled(120) and len(cupy.compiled) == 3
    cupy.version = (13, 1)
    assert cuda_launcher.compiled(90) and len(cupy.compiled) == 4
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 4 and {file.suffix for file in files} == {".cubin"}, "no partial file is left"


@needs_nvrtc
def test_reasons_why_nothing_can_be_launched(gpus, cupy, without_library, monkeypatch):
    (cuda_launcher.sources() / "cuda" / "kernels.cuh").write_text("undeclared x;")
    assert cuda_launcher.missing(SECOND).startswith("built: not built; nvrtc: NVRTC -std=c++17 -arch=sm_90")
    with pytest.raises(RuntimeError, match=r'ck_shrink: built: not built; nvrtc: .*\n.*identifier "undeclared"'):
        cuda_launcher.launch("ck_shrink", 1, 32, 0, [], SECOND)
    assert len(cupy.compiled) == 1, "tried once"
    assert cuda_launcher.missing(SECOND, compiled=False) == cuda_launcher.missing(SECOND), "known from then on"
    monkeypatch.setattr(cuda_launcher, "SOURCES", ())
    assert cuda_launcher.about()["nvrtc"] == "the package has no sources of the kernels"


def test_choice_of_launcher(gpus, cupy, monkeypatch):
    monkeypatch.setattr(library, "missing", None)
    monkeypatch.setattr(cuda_launcher.Built, "_library", lambda: SimpleNamespace(ck_launch=None))
    folder = cuda_launcher.cache_folder()
    assert cuda_launcher.missing(SECOND, compiled=False) == cuda_launcher.missing(FIRST, compiled=False) == ""
    assert not cupy.compiled
    assert cuda_launcher.about() == {
        "built": "for sm_80, sm_90a",
        "nvrtc": f"NVRTC 13.0, CuPy 14.2.0, cache {folder}",
        "cuda:0": "nvrtc; not built: for sm_80, sm_90a; this GPU is sm_75",
        "cuda:1": "built",
    }
    monkeypatch.setenv("COMPAWARE_CUDA", "built")
    assert cuda_launcher.missing() == cuda_launcher.missing(FIRST) == "built: for sm_80, sm_90a; this GPU is sm_75"
    assert cuda_launcher.about()["cuda:0"].startswith("neither; not built")
    monkeypatch.setenv("COMPAWARE_CUDA", "nvrtc")
    assert cuda_launcher.about()["cuda:1"] == "nvrtc"
    monkeypatch.setenv("COMPAWARE_CUDA", "fast")
    with pytest.raises(ValueError, match="COMPAWARE_CUDA: wanted auto, built or nvrtc; got 'fast'"):
        cuda_launcher.missing()


def test_build_record():
    runs = {"80": (80, 86, 90, 100, 120), "90a": (90,), "100": (100, 103, 120), "120": (120, 121)}
    for sm in (75, 80, 86, 90, 100, 103, 120, 121):
        for arch, those in runs.items():
            assert cuda_launcher._runs(sm)(arch) == (sm in those or (arch.isdigit() and sm >= int(arch)))
    assert not cuda_launcher._runs(75)("80") and not cuda_launcher._runs(100)("90a")


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_launcher.missing() == "torch sees no CUDA device"
    assert cuda_launcher.about()["taken"] == "neither: torch sees no CUDA device"


def test_arguments_are_packed_into_eight_bytes():
    pointers = cuda_launcher._cells([-1, 2**62, 0.5])
    assert [ctypes.c_int64.from_address(pointers[i]).value for i in range(2)] == [-1, 2**62]
    assert ctypes.c_double.from_address(pointers[2]).value == 0.5


@needs_built
def test_library_errors_are_raised(gpus, monkeypatch):
    monkeypatch.setenv("COMPAWARE_CUDA", "built")
    assert cuda_launcher.missing(SECOND) == ""
    with pytest.raises(RuntimeError, match="not launched: no kernel is called ck_absent"):
        cuda_launcher.launch("ck_absent", 1, 32, 0, [], SECOND)
    if no_gpu:
        with pytest.raises(RuntimeError, match="not launched: ck_shrink: CUDA driver version is insufficient"):
            cuda_launcher.launch("ck_shrink", 1, 32, 0, [1], SECOND)


@pytest.mark.emulation
@pytest.mark.skipif(bool(emulator.missing), reason=emulator.missing)
def test_replacement_launcher():
    count = torch.zeros(1, dtype=torch.int32)
    with cuda_launcher.registered(emulator.launcher):
        assert cuda_launcher.missing(count.device) == ""
        cuda_launcher.launch("ck_planted_count", 3, 64, 0, [count, 0])
        with cuda_launcher.registered(None):
            assert cuda_launcher.missing(count.device)
        assert cuda_launcher.missing(count.device) == ""
    assert count.item() == 3 * 64 and cuda_launcher.missing(count.device) == "nothing launches kernels on cpu"
    with pytest.raises(RuntimeError, match="ck_planted_count: nothing launches kernels on cpu"):
        cuda_launcher.launch("ck_planted_count", 3, 64, 0, [count, 0])


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu, reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("way", cuda_launcher.WAYS)
def test_on_a_gpu(way, monkeypatch):
    """Ordered after pending work of the current stream; the second launch uses much shared memory."""
    monkeypatch.setenv("COMPAWARE_CUDA", way)
    if reason := cuda_launcher.missing():
        pytest.skip(reason)
    words = torch.ones(1000, dtype=torch.int32, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for shared in (0, 64 * 1024):
            torch.cuda._sleep(50_000_000)
            words.fill_(1)
            cuda_launcher.launch("ck_begin", 1, 256, shared, [0, 0, 0, 0, 0, 0, 0, words, 999])
            assert words.tolist() == [0] * 999 + [1]
    with pytest.raises(Exception, match=r"ck_absent|not found"):
        cuda_launcher.launch("ck_absent", 1, 32, 0, [words])
