"""Compiles Triton kernels to machine code without a GPU, and reads its resource use and instructions."""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compaware_kernels.ops.triton_lowrank import Tile, lowrank_kernel
from compaware_kernels.proximal.cuda.matmul_kernel import options, program_kernel

# Shared memory of a block, in bytes: CUDA C++ Programming Guide, compute capabilities.
SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA"}  # opcodes for tiles of 64 rows or more
DOUBLE = (80, 90)  # architectures on which Triton uses tensor cores for fp64
TYPES = {"half": "bf16", "tf32": "fp32", "ieee": "fp32"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Code(NamedTuple):
    """Resources and instructions of a kernel's machine code."""

    registers: int
    stack: int  # bytes: spilled registers
    spills: int  # loads and stores of local memory
    shared: int  # bytes
    tensor_core: dict[str, int]  # opcode -> count
    fma: int


def compiled(kernel, capability: int, types: dict[str, str], constants: dict[str, object], **options: int) -> Code:
    """Compile a kernel; ``types``: Triton's type of each non-constant argument; pointers are aligned to 16 bytes."""
    at = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={at[name]: value for name, value in constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name, type in types.items() if type.startswith("*")},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, assembly = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", file.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    opcodes = re.findall(r"\b(STL|LDL|FFMA|DMMA|HMMA|HGMMA|UTC\w*MMA)\b", assembly)
    count = {opcode: opcodes.count(opcode) for opcode in dict.fromkeys(opcodes)}
    spills, fma = count.pop("STL", 0) + count.pop("LDL", 0), count.pop("FFMA", 0)
    return Code(registers, stack, spills, binary.metadata.shared, count, fma)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


@cache
def lowrank_code(
    capability: int, kind: str, BR: int, tile: Tile, kernel: int = 3, activation: str = "gelu", ends: str = "br",
    dtype: str = "", stride: str = "i32",
) -> Code:  # fmt: skip
    """The fused low-rank kernel; by default with all its features: 3 x 3, bias, residual, gelu."""
    dtype = dtype or TYPES[kind]
    constants = {
        **dict(KH=kernel, KW=kernel, ACTIVATION=activation, PRECISION=kind if kind == "tf32" else "ieee"),
        **dict(ALIGN=4 if dtype == "fp32" else 8, BM=tile.BM, BK=tile.BK, BO=tile.BO, BR=BR),
        **{name: None for name in ("bias", "residual") if name[0] not in ends},
    }
    pointers = ("x", "V", "U", "bias", "residual", "y")
    types = {name: f"*{dtype}" if name in pointers else "i32" for name in lowrank_kernel.arg_names}
    types |= dict.fromkeys(("x_n", "x_h", "x_w"), stride)
    types = {name: type for name, type in types.items() if name not in constants}
    stages = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compiled(lowrank_kernel, capability, types, constants, **stages)


def program_code(capability: int, program) -> Code:
    """The matrix program kernel as :class:`compaware_kernels.proximal.cuda.matmul_program.Program` launches it."""
    names = ("GROUPS", "LOOPS", "ENDS", "PRECISION")
    constants = dict(zip(names, (*program.kinds, program.precision), strict=True))
    types = {name: "*i64" if name == "problems" else "*i32" for name in ("problems", "tiles", "counters", "awake")}
    types["all_tiles"] = "i32"
    return compiled(program_kernel, capability, types, constants, num_warps=program.warps, **options(capability // 10))


def problems(code: Code, capability: int, kind: str, BM: int) -> list[str]:
    """What exceeds the limits or misses tensor cores in the fused kernel, in words."""
    wanted = TENSOR_CORES[capability] if BM >= 64 else "HMMA"
    on_tensor_cores = any(opcode.startswith(wanted) for opcode in code.tensor_core)
    found = {f"no {wanted}": kind != "ieee" and not on_tensor_cores,
             "fp32 on tensor cores": kind == "ieee" and code.tensor_core}  # fmt: skip
    return _unfit(code, capability) + [text for text, wrong in found.items() if wrong]


def program_problems(code: Code, capability: int, program) -> list[str]:
    """What exceeds the limits or misses tensor cores in a matrix program, in words."""
    types = {group[0] for group in program.kinds[0]}
    wanted = {TENSOR_CORES[capability]: 0 in types, "DMMA": 3 in types and capability in DOUBLE}
    used = " ".join(code.tensor_core)
    return _unfit(code, capability) + [f"no {name}" for name, needed in wanted.items() if needed and name not in used]


def _unfit(code: Code, capability: int) -> list[str]:
    found = {
        f"{code.spills} spills, {code.stack} bytes": code.spills or code.stack,
        f"{code.registers} registers": code.registers > 255,
        f"{code.shared} bytes of shared memory, of {SHARED[capability]}": code.shared > SHARED[capability],
    }
    return [text for text, wrong in found.items() if wrong]
