"""CUDA kernel launcher: loads the kernels of ``csrc/cuda/kernels.cuh`` and queues them on a stream, in one of two ways.

built: compiled by nvcc into the C++ library at installation.  nvrtc: compiled by CuPy's NVRTC at first use for the
current GPU, and cached in CuPy's folder.  ``COMPAWARE_CUDA`` = auto (default: the first that works) | built | nvrtc.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from .._utils.atomic_write import atomic_write
from .._utils.constants import CSRC
from . import library as _library

__all__ = [
    "LAUNCHERS",
    "OPTIONS",
    "WAYS",
    "Built",
    "Launcher",
    "Nvrtc",
    "about",
    "cache_folder",
    "compiled",
    "launch",
    "missing",
    "registered",
    "sources",
]

Numbers = Sequence[int | float]
Launcher = Callable[
    [str, int, int, int, int, int, Numbers], None
]  # launch()'s arguments, device index and stream before the kernel arguments

SOURCES = (CSRC,)
OPTIONS = ("-std=c++17",)  # unlike cupy.RawModule(code=...), whose options flush subnormals to zero


def launch(
    kernel: str, grid: int, block: int, shared: int, arguments: Sequence[int | float | Tensor],
    device: torch.device | None = None,
) -> None:  # fmt: skip
    """Launch a kernel on the current stream of ``device``, by default the device of the first tensor argument.

    A tensor is passed as its data pointer, and must outlive the kernel.  ``shared``: bytes of dynamic shared memory.
    An empty grid launches nothing.

    Raises:
        RuntimeError: no kernels for this device, or the launch failed.
    """
    if not grid:
        return
    device = device or next(x.device for x in arguments if isinstance(x, Tensor))
    numbers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    launcher, reason, index, stream = LAUNCHERS.get(device.type, _no_launcher)(device)
    if not launcher:
        raise RuntimeError(f"{kernel}: {reason}")
    launcher(kernel, grid, block, shared, index, stream, numbers)


def missing(device: torch.device | None = None, compiled: bool = True) -> str:
    """Why no kernel can run on ``device``, by default the current GPU; "" if they can.

    ``compiled``: compile and load the kernels to find out.  False: compile nothing; errors of that remain unknown.
    """
    device = torch.device("cuda") if device is None else device
    if device.type != "cuda":
        return LAUNCHERS.get(device.type, _no_launcher)(device)[1]
    if reason := _no_gpu():
        return reason
    index, wanted = torch.cuda.current_device() if device.index is None else device.index, _wanted()
    if compiled or (index, wanted) in _tried:
        return _ready(index, wanted)[1]
    reasons = _refusals(index, wanted)
    return _text(reasons) if all(reasons.values()) else ""


def about() -> dict[str, str]:
    """Facts for ``compaware info``: each loading method, and which one each GPU uses and why.  Compiles nothing."""
    wanted, facts = _wanted(), {name: way.why_not() or way.what() for name, way in WAYS.items()}
    if reason := _no_gpu():
        return facts | {"taken": f"neither: {reason}"}
    for device in range(torch.cuda.device_count()):
        reasons = _refusals(device, wanted)
        taken = next((name for name, reason in reasons.items() if not reason), "neither")
        refused = [f"not {name}: {reason}" for name, reason in reasons.items() if reason]
        facts[f"cuda:{device}"] = "; ".join([taken, *refused])
    return facts


def _no_gpu() -> str:
    if not torch.version.cuda:
        return "this torch was built without CUDA"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _wanted() -> tuple[str, ...]:
    wanted = os.environ.get("COMPAWARE_CUDA", "auto")
    if wanted not in ("auto", *WAYS):
        raise ValueError(f"COMPAWARE_CUDA: wanted auto, {' or '.join(WAYS)}; got {wanted!r}")
    return tuple(WAYS) if wanted == "auto" else (wanted,)


@cache
def _refusals(device: int, wanted: tuple[str, ...]) -> dict[str, str]:
    """Loading method -> why it does not work on this GPU; "" if it may."""
    return {name: WAYS[name].why_not(_sm(device)) for name in wanted}


def _text(reasons: dict[str, str]) -> str:
    """Reasons of all loading methods as one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


_tried: dict[tuple[int, tuple[str, ...]], tuple[Launcher | None, str]] = {}


def _ready(device: int, wanted: tuple[str, ...]) -> tuple[Launcher | None, str]:
    """Launcher of the first loading method that works, or None and why none does; cached."""
    if (device, wanted) not in _tried:
        _tried[device, wanted] = _try(device, wanted)
    return _tried[device, wanted]


def _try(device: int, wanted: tuple[str, ...]) -> tuple[Launcher | None, str]:
    reasons = dict(_refusals(device, wanted))
    for name in (name for name, reason in reasons.items() if not reason):
        try:
            return WAYS[name](device), ""
        except Exception as error:  # any loader or compiler error: try the next, else plain PyTorch runs
            reasons[name] = str(error)
            logging.getLogger("compaware_kernels").warning("CUDA kernels, %s: %s", name, error)
    return None, _text(reasons)


def _sm(device: int) -> int:
    """Compute capability of a GPU as one number, 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# --- launchers by device type ----------------------------------------------------------------------------------------


Target = tuple[Launcher | None, str, int, int]  # or None and why; device index; stream pointer


def _on_gpu(device: torch.device) -> Target:
    stream = torch.cuda.current_stream(device)
    return *_ready(stream.device_index, _wanted()), stream.device_index, stream.cuda_stream


def _no_launcher(device: torch.device) -> Target:
    return None, f"nothing launches kernels on {device.type}", 0, 0


LAUNCHERS: dict[str, Callable[[torch.device], Target]] = {"cuda": _on_gpu}  # by device type


@contextmanager
def registered(launcher: Launcher | None, kind: str = "cpu") -> Iterator[None]:
    """Context in which ``launcher`` (an emulator, say) launches kernels on this device type; None: no launcher."""
    before = LAUNCHERS.pop(kind, None)
    if launcher:
        LAUNCHERS[kind] = lambda device: (launcher, "", device.index or 0, 0)
    try:
        yield
    finally:
        LAUNCHERS.pop(kind, None)
        if before:
            LAUNCHERS[kind] = before


# --- built ------------------------------------------------------------------------------------------------------------


class Built:
    """Loading method "built": launches through ``ck_launch`` of the C++ library."""

    def __init__(self, device: int) -> None:
        self.ck_launch = self._library().ck_launch
        self.ck_launch.restype = ctypes.c_char_p
        self.ck_launch.argtypes = [ctypes.c_char_p, *[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 2]

    def __call__(self, kernel, grid, block, shared, device, stream, numbers) -> None:
        error = self.ck_launch(kernel.encode(), grid, block, shared, device, stream, _cells(numbers))
        if error:
            raise RuntimeError(f"not launched: {error.decode()}")

    @staticmethod
    def _library() -> ctypes.CDLL:
        return ctypes.CDLL(str(_library.PATH))  # another handle to the library that torch has loaded

    @classmethod
    def why_not(cls, sm: int | None = None) -> str:
        """Why it does not work on a GPU of compute capability ``sm`` (None: on any); "" if it does."""
        if _library.missing:
            return _library.missing
        if not hasattr(cls._library(), "ck_launch"):
            return "the library was built without nvcc"
        return "" if sm is None or any(map(_runs(sm), _archs())) else f"{cls.what()}; this GPU is sm_{sm}"

    @staticmethod
    def what() -> str:
        """CUDA architectures in the library, as text."""
        return "for " + ", ".join(f"sm_{arch}" for arch in _archs())


def _archs() -> list[str]:
    return _library.build().get("archs", [])


def _runs(sm: int) -> Callable[[str], bool]:
    """Predicate: code built for an arch runs on ``sm``. PTX runs on all later GPUs, arch-specific 90a only on 90."""
    return lambda arch: int(arch) <= sm if arch.isdigit() else int(arch[:-1]) == sm


def _cells(numbers: Numbers) -> ctypes.Array:
    """Kernel arguments as ``cudaLaunchKernel`` takes them: pointers to 8-byte values, int64 or double."""
    packed = struct.pack("".join("d" if isinstance(x, float) else "q" for x in numbers), *numbers)
    cells = ctypes.create_string_buffer(packed, len(packed))
    first = ctypes.addressof(cells)
    pointers = (ctypes.c_void_p * len(numbers))(*range(first, first + len(packed), 8))
    pointers.cells = cells  # keeps the values alive
    return pointers


# --- nvrtc ------------------------------------------------------------------------------------------------------------


class Nvrtc:
    """Loading method "nvrtc": compiles with CuPy's NVRTC, launches through CuPy."""

    def __init__(self, device: int) -> None:
        import cupy

        self.cupy = cupy
        self.module = cupy.RawModule(path=str(compiled(_sm(device))))
        self.kernels: dict = {}

    def __call__(self, kernel, grid, block, shared, device, stream, numbers) -> None:
        arguments = tuple(np.float64(x) if isinstance(x, float) else np.int64(x) for x in numbers)
        with self.cupy.cuda.Device(device) as current, self._stream(stream):
            if kernel not in self.kernels:
                self.kernels[kernel] = self._kernel(kernel, current)
            self.kernels[kernel]((grid,), (block,), arguments, shared_mem=shared)

    def _stream(self, pointer: int):
        cuda = self.cupy.cuda
        if not hasattr(cuda.Stream, "from_external"):  # before CuPy 14
            return cuda.ExternalStream(pointer)
        return cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, pointer)))

    def _kernel(self, name: str, device):
        """Kernel function by name, allowed all shared memory of the device; each launch states how much it uses."""
        kernel = self.module.get_function(name)
        kernel.max_dynamic_shared_size_bytes = (
            device.attributes["MaxSharedMemoryPerBlockOptin"] - kernel.shared_size_bytes
        )
        return kernel

    @staticmethod
    def why_not(sm: int | None = None) -> str:
        """Why it does not work on any GPU; "" if it may."""
        try:
            from cupy.cuda import nvrtc

            nvrtc.getVersion()
        except Exception as error:  # CuPy and its libraries raise various types
            return f"CuPy's NVRTC cannot be loaded ({' '.join(str(error).split())})"
        return "" if sources() else "the package has no sources of the kernels"

    @staticmethod
    def what() -> str:
        """Versions of NVRTC and CuPy, and the cache folder, as text."""
        import cupy

        version = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
        return f"NVRTC {version}, CuPy {cupy.__version__}, cache {cache_folder()}"


WAYS = {"built": Built, "nvrtc": Nvrtc}


def sources() -> Path | None:
    """The folder ``csrc`` with the kernel sources; None if it was not installed."""
    return next((path for path in SOURCES if (path / "cuda" / "kernels.cuh").exists()), None)


def cache_folder() -> Path:
    """CuPy's kernel cache folder."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache").expanduser()


def compiled(sm: int) -> Path:
    """Cubin file with all kernels for ``sm``, compiled with NVRTC unless cached."""
    from cupy.cuda import nvrtc

    csrc = sources()
    key = hashlib.sha256(repr((nvrtc.getVersion(), OPTIONS, sm)).encode())
    for path in sorted([*csrc.glob("core/*.h"), *csrc.glob("cuda/*.h"), *csrc.glob("cuda/*.cuh")]):
        key.update(path.name.encode() + path.read_bytes())
    file = cache_folder() / f"compaware-{key.hexdigest()[:40]}.cubin"
    if not file.exists():
        logging.getLogger("compaware_kernels").info("compiling the CUDA kernels for sm_%d, once, to %s", sm, file)
        code = _compile((*OPTIONS, f"-arch=sm_{sm}", f"-I{csrc / 'cuda'}"))
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as new:
            new.write_bytes(code)
    return file


def _compile(options: tuple[str, ...]) -> bytes:
    """Cubin of ``kernels.cuh``.  Raises RuntimeError with the compiler log."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram('#include "kernels.cuh"', "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC {' '.join(options)}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
