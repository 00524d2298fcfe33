"""The shrinkage ops on ck_shrink, emulated: run in a process of its own, which has no other C++ kernels for the CPU."""

import fcntl
import hashlib
import runpy
import subprocess
from functools import partial
from pathlib import Path

import emulator
import torch
from torch.utils import cpp_extension

SOURCE, CORE = "tests/emulator/shrink_ops.cpp", ("constants", "shrink", "shrink_ops", "tensor")
READ = (SOURCE, "csrc/cuda/shrink_launch.h", "csrc/cuda/shrink.h", *(f"csrc/core/{name}.h" for name in CORE))


def library() -> Path:
    """The ops, compiled if they are new, and linked to the emulator."""
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


def main() -> None:
    """All checks of shrink_checks.py."""
    path = library()
    load, torch.ops.load_library = torch.ops.load_library, None  # which fails, so that the package does without
    import shrink_checks as checks

    import compaware_kernels as ck

    assert ck.info()["ops"]["soft_threshold"]["CPU"] != "C++ kernel"
    load(path)
    assert ck.info()["ops"]["soft_threshold"]["CPU"] == "C++ kernel"
    values = [partial(checks.check_values, dtype=dtype) for dtype in checks.DTYPES]
    others = [getattr(checks, name) for name in dir(checks) if name.startswith("check_") and name != "check_values"]
    for name in checks.OPS:
        for check in (*values, *others):
            check(name, device="cpu")
        print(name)
    checks.neuron_values("cpu")
    checks.neuron_refusals("cpu")
    print("neuron_shrink")


if __name__ == "__main__":
    main()
