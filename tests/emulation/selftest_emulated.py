"""The self-test on the CPU: Triton kernels in Triton's interpreter, CUDA kernels in the emulator.

test_quarantine.py runs this in separate processes: FAMILY [PATTERN [planted]]. Prints the rows of the cases that match;
planted: the kernels of the family then return one wrong number.
"""

import json
import sys
from fnmatch import fnmatchcase

import torch

CPU = torch.device("cpu")


def shrink(planted: bool) -> None:
    """Put ck_shrink behind the CPU ops, which have no other kernels in this process."""
    from tests.emulation import shrink_emulated

    path = shrink_emulated.library()
    load, torch.ops.load_library = torch.ops.load_library, lambda path: None
    from compaware_kernels.ops import shrinkage

    load(path)
    if planted:
        library = torch.library.Library("compaware", "IMPL")
        library.impl("soft_threshold", wrong(shrinkage.soft_threshold._init_fn), "CPU", allow_override=True)
        shrinkage.planted = library  # keeps the registration alive


def wrong(body):
    def perturbed(*args, **options):
        result = body(*args, **options)
        result.view(-1)[0] += 1
        return result

    return perturbed


def step(planted: bool) -> None:
    from compaware_kernels.proximal.cuda import matmul_program
    from tests.emulation import triton_sim

    run, multiply = matmul_program.Program.run, matmul_program.Program.multiply

    def listed(self, layer, A, B, C, *rest, **options):
        vars(self).setdefault("first", C)
        multiply(self, layer, A, B, C, *rest, **options)

    def interpreted(self, counters):
        with triton_sim.register(*self.tensors):
            run(self, counters)
        if planted and "first" in vars(self):
            self.first[0, 0] += 1

    matmul_program.Program.run, matmul_program.Program.multiply = interpreted, listed


def low_rank(planted: bool) -> None:
    from compaware_kernels.ops import triton_lowrank
    from tests.emulation import triton_sim  # noqa: F401

    triton_lowrank._multiprocessors = lambda device: 1
    if planted:
        triton_lowrank.lowrank_linear = wrong(triton_lowrank.lowrank_linear)


def main(family: str, pattern: str = "*", planted: str = "") -> None:
    torch.set_num_threads(1)
    {"shrink": shrink, "step": step, "low rank": low_rank}[family](bool(planted))
    from compaware_kernels import selftest
    from compaware_kernels.ops import cuda_launcher
    from tests.emulation import emulator

    cases = selftest.CASES[family]
    selftest.CASES[family] = {name: case for name, case in cases.items() if fnmatchcase(name, pattern)}
    with cuda_launcher.registered(emulator.launcher):
        for row in selftest.check(family, CPU):
            print("row", json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
