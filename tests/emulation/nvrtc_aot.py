"""Compiles CUDA C++ kernels with NVRTC, without a GPU, and parses the resource use that ptxas reports."""

import ctypes
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from compaware_kernels.ops.cuda_launcher import OPTIONS

CSRC = Path(__file__).parents[2] / "csrc"
ALL = '#include "kernels.cuh"'
ARCHS = ("80", "90a", "100", "120")


class Code(NamedTuple):
    """Resources that a kernel's machine code uses."""

    registers: int
    stack: int  # bytes
    spills: int  # bytes stored and loaded
    shared: int  # bytes, static


@cache
def nvrtc() -> ctypes.CDLL | None:
    """Library of the package nvidia-cuda-nvrtc, or None."""
    package = importlib.util.find_spec("nvidia")
    folders = map(Path, package.submodule_search_locations if package else ())
    found = next((path.parent for folder in folders for path in folder.glob("cu*/lib/libnvrtc.so.*")), None)
    if found is None:
        return None
    # builtins first: NVRTC finds them only if they are loaded
    return [ctypes.CDLL(str(next(found.glob(f"libnvrtc{part}.so.*")))) for part in ("-builtins", "")][-1]


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def compile(source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """(Machine code, log); raises ValueError with the log."""
    program = ctypes.c_void_p()
    _check(nvrtc().nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc().nvrtcCompileProgram(program, len(options), texts)
    log = _read(program, "ProgramLog").rstrip(b"\0").decode()
    if failed:
        raise ValueError(log)
    code = _read(program, "CUBIN")
    _check(nvrtc().nvrtcDestroyProgram(ctypes.byref(program)))
    return code, log


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(error: int) -> None:
    assert error == 0, f"NVRTC error {error}"


@cache
def codes(arch: str, source: str = ALL) -> dict[str, Code]:
    """Resource use of every kernel of the source, by name."""
    options = (*OPTIONS, f"-arch=sm_{arch}", f"-I{CSRC / 'cuda'}", "--ptxas-options=-v")
    return parse(compile(source, options)[1])


def parse(log: str) -> dict[str, Code]:
    """Parse the output of ``ptxas -v``. The functions that a kernel calls follow it."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        stack, stores, loads = (
            sum(map(int, re.findall(rf"(\d+) bytes {what}", part)))
            for what in ("stack frame", "spill stores", "spill loads")
        )
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[part.partition("'")[0]] = Code(registers, stack, stores + loads, int(shared[1]) if shared else 0)
    return found


def problems(code: Code) -> list[str]:
    """What exceeds the limits, in words. Too many registers or too much shared memory would not even compile."""
    return [f"{code.spills} bytes of spills"] if code.spills else []
