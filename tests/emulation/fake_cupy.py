"""Stand-in for CuPy on machines without a GPU: compiles with the real NVRTC, and logs launches."""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.emulation import nvrtc_aot


class NVRTCError(RuntimeError):
    pass


class FakeCupy:
    """Fake of the ``cupy`` module. ``log``: calls; ``compiled``: options of each compilation."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.compiled, self.version = [], [], (13, 0)
        self._programs, self._logs, self._inside = {}, {}, []
        functions = ("createProgram", "compileProgram", "getCUBIN", "getProgramLog", "destroyProgram", "getVersion")
        nvrtc = SimpleNamespace(NVRTCError=NVRTCError, **{name: getattr(self, name) for name in functions})
        self.cuda = cuda = ModuleType("cupy.cuda")
        cuda.nvrtc, cuda.Device, cuda.Stream = nvrtc, self.Device, SimpleNamespace(from_external=self.from_external)
        cupy = ModuleType("cupy")
        cupy.cuda, cupy.RawModule, cupy.__version__ = cuda, self.RawModule, "14.2.0"
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)

    # cupy.cuda.nvrtc

    def getVersion(self):
        return self.version

    def createProgram(self, source, name, headers, include_names):
        self._programs[len(self._programs) + 1] = source
        return len(self._programs)

    def compileProgram(self, program, options):
        self.compiled.append(options)
        try:
            self._programs[program], self._logs[program] = nvrtc_aot.compile(self._programs[program], options)
        except ValueError as error:
            self._logs[program] = str(error)
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)") from error

    def getCUBIN(self, program):
        return self._programs[program]

    def getProgramLog(self, program):
        return self._logs[program]

    def destroyProgram(self, program):
        del self._programs[program]

    # cupy

    @contextmanager
    def Device(self, device):
        self._inside.append(device)
        yield SimpleNamespace(attributes={"MaxSharedMemoryPerBlockOptin": 232448})
        self._inside.pop()

    def from_external(self, stream):
        version, pointer = stream.__cuda_stream__()
        assert version == 0
        return self.ExternalStream(pointer)

    @contextmanager
    def ExternalStream(self, pointer):
        assert len(self._inside) == 1, "on a device"
        self._inside.append(pointer)
        yield
        self._inside.pop()

    def RawModule(self, *, path):
        code = Path(path).read_bytes()
        assert code.startswith(b"\x7fELF")
        return SimpleNamespace(get_function=lambda name: _Kernel(self, name, code))


class _Kernel:
    shared_size_bytes = 384

    def __init__(self, cupy: FakeCupy, name: str, code: bytes) -> None:
        assert name.encode() in code, f"no kernel {name}"
        self.cupy, self.name = cupy, name
        self.max_dynamic_shared_size_bytes = 49152 - self.shared_size_bytes

    def __call__(self, grid, block, arguments, *, shared_mem):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.cupy.log.append((self.name, grid, block, arguments, shared_mem, *self.cupy._inside))
