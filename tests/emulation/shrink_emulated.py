"""The shrinkage ops with ck_shrink emulated; runs in a process of its own that has no other C++ kernels for the CPU."""

import fcntl
import hashlib
import json
import runpy
import subprocess
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils import cpp_extension

from tests.emulation import emulator

SOURCE, CORE = "tests/emulation/cxx/shrink_ops.cpp", ("constants", "shrink", "shrink_ops", "tensor")
READ = (SOURCE, "csrc/cuda/shrink_launch.h", "csrc/cuda/shrink.h", *(f"csrc/core/{name}.h" for name in CORE))


def library() -> Path:
    """Library of the ops, linked to the emulator; compiled if its sources have changed."""
    launcher = emulator.build("plain")
    setup = runpy.run_path(str(emulator.ROOT / "setup.py"))
    command = ["g++", *setup["CXX_FLAGS"].replace("-O3", "-O1").split(), setup["TARGET"]]
    command += ["-shared", SOURCE, str(launcher)]
    command += [*map("-isystem{}".format, cpp_extension.include_paths()), f"-Wl,-rpath,{launcher.parent}"]
    command += [*map("-L{}".format, cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    digest = hashlib.sha256(" ".join(command).encode() + torch.__version__.encode())
    for path in READ:
        digest.update((emulator.ROOT / path).read_bytes())
    target = emulator.BUILT / f"shrink-{digest.hexdigest()[:16]}.so"
    with open(emulator.BUILT / "shrink.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            made = target.with_suffix(".new")
            subprocess.run([*command, "-o", made], cwd=emulator.ROOT, check=True)
            made.rename(target)
    return target


def cases() -> dict[str, Callable[[], None]]:
    """All checks of shrink_checks.py on the CPU, by name."""
    from tests.helpers import shrink_checks as checks

    found = {name: partial(getattr(checks, name), "cpu") for name in ("neuron_values", "neuron_refusals")}
    for name in checks.OPS:
        for check in (name for name in dir(checks) if name.startswith("check_")):
            kinds = [{"dtype": dtype} for dtype in checks.DTYPES] if check == "check_values" else [{}]
            for kind in kinds:
                label = "-".join([name, check.removeprefix("check_"), *map(str, kind.values())])
                found[label] = partial(getattr(checks, check), name, device="cpu", **kind)
    return found


def main() -> None:
    """Prints the name of each case, with its error if it failed."""
    path = library()
    load, torch.ops.load_library = torch.ops.load_library, None  # it fails, so the package works without its library
    import compaware_kernels as ck

    assert ck.info()["ops"]["soft_threshold"]["CPU"] != "C++ kernel"
    load(path)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("compaware::soft_threshold", "CPU")
    for name, check in cases().items():
        wrong = ""
        try:
            check()
        except Exception:
            wrong = traceback.format_exc()
        print(json.dumps([name, wrong]))


if __name__ == "__main__":
    main()
