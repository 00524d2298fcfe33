"""Emulator of the CUDA C++ kernels on the CPU: csrc/cuda, compiled by g++ with tests/emulation/cxx/cuda_on_cpu.h.

``launch`` runs a kernel in this process. ``sanitize`` runs launches in another one, under ThreadSanitizer (races) or
AddressSanitizer with UBSan (bounds, alignment), with the same results. Undefined behavior of CUDA that the emulator
detects raises RuntimeError. CK_EMU_SEED=n shuffles the order of threads and blocks, CK_EMU_THREADS=n runs n blocks at a
time.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "emulator"
COMPILE = "g++ -std=c++17 -fPIC -pthread -Wall -Wextra -Wno-unknown-pragmas"
KERNELS = "-include tests/emulation/cxx/cuda_on_cpu.h tests/emulation/cxx/kernels.cpp"
# thread-local storage of a shared library is slow otherwise
TLS = " -mtls-dialect=gnu2" if platform.machine() == "x86_64" else ""
# With the last three checks on, g++ 12 loses the store in (c ? x : y)[i] = v for arrays x and y.
ADDRESS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    " -fno-sanitize=shift,signed-integer-overflow,integer-divide-by-zero"
)
VARIANTS = {
    "fibers": f"{COMPILE}{TLS} -O2 -c tests/emulation/cxx/fibers.cpp",
    "plain": f"{COMPILE}{TLS} -O2 -shared {KERNELS}",
    "thread": f"{COMPILE} -O1 -g -fsanitize=thread tests/emulation/cxx/replay.cpp {KERNELS}",
    "address": f"{COMPILE} -O1 -g {ADDRESS} tests/emulation/cxx/replay.cpp {KERNELS}",
}
OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
HOUR = 3600

Argument = int | float | bytes | Tensor  # bytes: a struct passed by value

LETTERS = {float: "d", bytes: "s", Tensor: "p", int: "pi"}  # as ck_parameters has them; an int may be an address

missing = "" if shutil.which("g++") else "g++ is not found"


class Launch(NamedTuple):
    kernel: str
    grid: int
    block: int
    shared: int  # bytes of dynamic shared memory
    args: Sequence[Argument]


def launch(kernel: str, grid: int, block: int, shared: int, args: Sequence[Argument]) -> None:
    """Run one kernel in this process. Tensors are passed as pointers."""
    _check(kernel, args)
    values = [ctypes.create_string_buffer(_value(arg), max(8, len(_value(arg)))) for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    if error := library().ck_launch(kernel.encode(), grid, block, shared, 0, None, pointers):
        raise RuntimeError(error.decode())


def launcher(
    kernel: str, grid: int, block: int, shared: int, device: int, stream: int, args: Sequence[Argument]
) -> None:
    """:func:`launch`, as ``cuda_launcher.registered`` takes it."""
    launch(kernel, grid, block, shared, args)


def sanitize(sanitizer: str, launches: Iterable[Launch], tensors: Iterable[Tensor] = (), timeout: float = 300) -> None:
    """Run launches one after the other under a sanitizer: "thread" or "address".

    ``tensors``: those that kernels reach through pointers in other tensors or in structs, not as arguments. Such
    pointers are found in arguments and in int64 tensors. For AddressSanitizer a tensor ends where its storage ends.
    """
    launches = [Launch(*each) for each in launches]
    for each in launches:
        _check(each.kernel, each.args)
    tensors = [*(arg for each in launches for arg in each.args if isinstance(arg, Tensor)), *tensors]
    buffers = {x.untyped_storage().data_ptr(): x for x in tensors if x.untyped_storage().nbytes()}
    tables = {x.untyped_storage().data_ptr() for x in tensors if x.dtype == torch.int64}
    words = [_word(len(buffers))]
    for address, x in buffers.items():
        size = x.untyped_storage().nbytes()
        words += [_word(address), _word(size), _word(address in tables), _padded(ctypes.string_at(address, size))]
    words.append(_word(len(launches)))
    for each in launches:
        words += [_blob(each.kernel.encode()), *map(_word, each[1:4]), _word(len(each.args))]
        words += [_blob(_value(arg)) for arg in each.args]
    together = min(4, max((each.grid for each in launches), default=1)) if sanitizer == "thread" else 1
    results = _replay(build(sanitizer), b"".join(words), {"CK_EMU_THREADS": str(together)} | OPTIONS, timeout)
    for address, x in buffers.items():
        size = x.untyped_storage().nbytes()
        ctypes.memmove(address, results[:size], size)
        results = results[size:]


@cache
def library() -> ctypes.CDLL:
    """The emulator's shared library; ck_launch has the signature of csrc/cuda/launch.h."""
    lib = ctypes.CDLL(str(build("plain")))
    lib.ck_launch.restype = lib.ck_parameters.restype = ctypes.c_char_p
    lib.ck_launch.argtypes = [ctypes.c_char_p, *4 * [ctypes.c_int64], ctypes.c_void_p, ctypes.c_void_p]
    return lib


@cache
def build(variant: str) -> Path:
    """Path of a compiled variant; compiles it if its sources or flags have changed."""
    command = VARIANTS[variant].split()
    parts = [] if variant == "fibers" else [build("fibers")]
    digest = hashlib.sha256(" ".join([*command, *map(str, parts)]).encode())
    for source in sorted([*ROOT.glob("csrc/cuda/*"), *ROOT.glob("csrc/core/*"), *ROOT.glob("tests/emulation/cxx/*")]):
        if variant != "fibers" or source.parent.name == "cxx":
            digest.update(source.read_bytes())
    BUILT.mkdir(parents=True, exist_ok=True)
    suffix = {"fibers": ".o", "plain": ".so"}.get(variant, "")
    target = BUILT / f"{variant}-{digest.hexdigest()[:16]}{suffix}"
    with open(BUILT / f"{variant}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that test the same tree at the same time
        if not target.exists():
            for old in BUILT.glob(f"{variant}-*"):
                if old.stat().st_mtime < time.time() - HOUR:
                    old.unlink()
            made = target.with_suffix(".new")
            done = subprocess.run([*command, *parts, "-o", made], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            made.rename(target)
    return target


def _check(kernel: str, args: Sequence[Argument]) -> None:
    """Raise TypeError if the number or the types of the arguments are not those of the kernel."""
    if (wanted := library().ck_parameters(kernel.encode())) is None:
        raise RuntimeError(f"{kernel}: there is no such kernel")
    given = [next(letters for kind, letters in LETTERS.items() if isinstance(x, kind)) for x in args]
    wanted = wanted.decode()
    if len(wanted) != len(given) or any(w not in g for w, g in zip(wanted, given, strict=True)):
        raise TypeError(f"{kernel}: wanted {wanted!r} (p: pointer, i: int, d: float, s: bytes); got {given}")


def _replay(program: Path, recorded: bytes, env: dict[str, str], timeout: float) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(recorded)
        env = env | os.environ
        done = subprocess.run(
            [program, source, result], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise RuntimeError(done.stderr or f"{program.name} ended with {done.returncode}")
        return result.read_bytes()


def _value(arg: Argument) -> bytes:
    if isinstance(arg, bytes):
        return arg
    if isinstance(arg, Tensor):
        return _word(arg.data_ptr())
    return struct.pack("<d", arg) if isinstance(arg, float) else _word(arg)


def _word(value: int) -> bytes:
    return struct.pack("<q", value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _blob(data: bytes) -> bytes:
    return _word(len(data)) + _padded(data)
