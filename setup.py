"""Builds compaware_kernels/_C.abi3.so, if a compiler is found. COMPAWARE_BUILD = auto (default) | cuda | cpu | none.

The compilers found decide what is built, not a visible GPU: wheels are often built on machines without one. The library
uses PyTorch's stable ABI (torch >= 2.11) and no Python symbols: one wheel serves every Python and every later torch.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CalledProcessError, check_call, getoutput

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ARCHS = "80;90a;100;120"  # A100, H100, B200, RTX 50; those that nvcc does not know are left out
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11; unstable torch headers become errors
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wno-unknown-pragmas"
NVCC_FLAGS = "-std=c++17 -O3 -t0 -Xcompiler -fPIC,-fvisibility=hidden"
HINT = "COMPAWARE_BUILD=none installs without compiled kernels: every op then runs on its plain PyTorch body."


def find_compilers() -> tuple[str | None, str | None]:
    cxx = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    nvcc = ["nvcc", os.environ.get("CUDA_HOME", "") + "/bin/nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, cxx)), None), next(filter(None, map(shutil.which, nvcc)), None)


def decide(wanted: str, cxx: str | None, nvcc: str | None) -> tuple[str, str]:
    """(Mode, reason) for the mode asked for and the compilers found."""
    found = f"C++ compiler: {cxx or 'not found'}, nvcc: {nvcc or 'not found'}"
    if wanted not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"COMPAWARE_BUILD: wanted auto, cuda, cpu or none; got {wanted!r}")
    if wanted == "auto":
        return ("none" if not cxx else "cuda" if nvcc else "cpu"), found
    if (wanted != "none" and not cxx) or (wanted == "cuda" and not nvcc):
        raise SystemExit(f"COMPAWARE_BUILD={wanted}: a compiler is missing ({found}). {HINT}")
    return wanted, f"COMPAWARE_BUILD={wanted}"


def pick_archs(wanted: str, known: str) -> list[str]:
    """Architectures of "80;90a" or "8.0 9.0a+PTX" that nvcc knows, as ["80", "90a"]."""
    archs = ["".join(arch) for arch in re.findall(r"(\d+)\.?(\d[af]?)", wanted)]
    if picked := [arch for arch in archs if f"sm_{arch.rstrip('af')}" in known.split()]:
        return picked
    raise SystemExit(f"TORCH_CUDA_ARCH_LIST: nvcc knows none of {wanted!r}; it knows {known.split()}")


class BuildLibrary(build_ext):
    def build_extension(self, ext):
        includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        compilers = {".cpp": [cxx, *CXX_FLAGS.split(), TARGET, *includes]}
        linker = [cxx, "-shared", "-Wl,--no-as-needed"]  # so that libtorch loads libtorch_cuda, if there is one
        if mode == "cuda":
            codes = [f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]" for arch in plan["archs"]]
            compilers[".cu"] = [nvcc, "-ccbin", cxx, *NVCC_FLAGS.split(), *codes]
            linker = [nvcc, "-ccbin", cxx, "-shared", "-Xlinker", "--no-as-needed"]  # links the static CUDA runtime
        sources = sorted(p for p in Path("csrc").glob("*/*" if mode == "cuda" else "cpu/*") if p.suffix in compilers)
        objects = [Path(self.build_temp, "-".join(path.parts) + ".o") for path in sources]
        jobs = [[*compilers[src.suffix], "-c", src, "-o", obj] for src, obj in zip(sources, objects, strict=True)]
        linker += [f"-L{path}" for path in cpp_extension.library_paths()]
        library = self.get_ext_fullpath(ext.name)
        self.mkpath(self.build_temp)
        self.mkpath(os.path.dirname(library))
        try:
            list(ThreadPoolExecutor(os.cpu_count()).map(check_call, jobs))
            check_call([*linker, *objects, "-o", library, "-ltorch", "-ltorch_cpu", "-lc10"])
        except CalledProcessError as error:
            raise SystemExit(f"compilation failed: {' '.join(map(str, error.cmd))}\n{HINT}") from error


class RecordPlan(build_py):
    def run(self):
        super().run()
        csrc = Path(self.build_lib, "compaware_kernels", "csrc")  # for NVRTC, if no compiled library fits the GPU
        shutil.copytree("csrc", csrc, ignore=shutil.ignore_patterns("*.cpp", "*.cu"), dirs_exist_ok=True)
        print(f"compaware-kernels: mode {mode} ({plan['reason']})", flush=True)
        package = Path("" if self.editable_mode else self.build_lib, "compaware_kernels")
        (package / "_build.json").write_text(json.dumps(plan, indent=2) + "\n")
        (package / "_C.abi3.so").unlink(missing_ok=True)  # one of an earlier build must not be mistaken for this one's


if __name__ == "__main__":
    cxx, nvcc = find_compilers()
    mode, reason = decide(os.environ.get("COMPAWARE_BUILD", "auto"), cxx, nvcc)
    plan = {"mode": mode, "reason": reason}
    if mode != "none":
        try:
            from torch.utils import cpp_extension
        except ImportError as error:
            raise SystemExit(f"building the kernels needs torch, which cannot be imported ({error}). {HINT}") from error
        plan |= {"torch": cpp_extension.torch.__version__, "cxx": getoutput(f"'{cxx}' --version").split("\n")[0]}
    if mode == "cuda":
        wanted, known = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHS, getoutput(f"'{nvcc}' --list-gpu-code")
        plan |= {"nvcc": getoutput(f"'{nvcc}' --version").split("\n")[-1], "archs": pick_archs(wanted, known)}
    library = [Extension("compaware_kernels._C", [], py_limited_api=True)] if mode != "none" else []
    setup(ext_modules=library, cmdclass={"build_ext": BuildLibrary, "build_py": RecordPlan})
