"""Resource table of the GPU kernels: what each compiles to on every architecture. Needs no GPU.

python -m bench.models.gpu_table
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from rich.progress import track

from bench.common import workloads
from compaware_kernels.ops.triton_lowrank import TILES
from compaware_kernels.proximal.cuda.plan import Plan
from compaware_kernels.proximal.cuda.sizes import SMALL_BYTES, width
from compaware_kernels.proximal.cuda.step import COLUMNS, FEW_COLUMNS
from tests.emulation import nvrtc_aot as nvrtc
from tests.emulation import triton_aot as aot

ROOT = Path(__file__).parents[2]
INTERPRETED = tuple(
    f"emulation/{name}.py" for name in ("lowrank_interpreted", "matmul_interpreted", "gpu_step_emulated")
)
EMULATED = (
    "emulation/test_emulator.py",
    "proximal/cuda/test_block_kernels.py",
    "proximal/cuda/test_small_kernel.py",
    "proximal/cuda/test_step_kernels.py",
    "proximal/cuda/test_judge_kernel.py",
    "ops/test_cuda_shrink.py",
)
RANK = 0.125
HEAD = """# The GPU kernels, without a GPU

What each kernel and configuration compiles to, on {archs}: registers per thread, spills, KiB of
shared memory, and, of Triton's, tensor-core instructions. Limits: 255 registers, no spills, {limits} KiB.

{interpreted} tests pass under Triton's interpreter (`tests/emulation/triton_sim.py`: values against fp64,
bounds, strides, orders of programs, races and other planted bugs; the whole step), {emulated} on the emulator of CUDA
(`tests/emulation/cxx`: values, races, bounds, barriers, masks, planted bugs). None of this has run on a GPU. Written by
`python -m bench.models.gpu_table`.
"""
LOWRANK = """## The fused low-rank kernel, Triton

`compaware_kernels/ops/triton_lowrank.py`, each tile in its heaviest form (3 x 3, bias, residual, gelu), compiled with
triton {version}. Tensor cores: `HMMA` on sm_80, on sm_120 and in tiles of 32 pixels; `HGMMA` on sm_90; `UTCHMMA` on
sm_100; none in fp32 proper, `ieee`.
"""
PROGRAM = """## The matrix programs of the proximal step, Triton

`compaware_kernels/proximal/cuda/matmul_kernel.py`, as a step of ResNet-50 at rank {rank:.1%} launches it six times:
the loops over K and the ends that each has, by operand types and strides. Tensor cores: as above,
of fp64 products `DMMA` on sm_80, 90.
"""
CUDA = """## The kernels in CUDA C++

`csrc/cuda`, by NVRTC {version}, 256 threads. Shared memory: static, and what a launch asks for at most.
"""


def passed(files: Sequence[str], **environment: str) -> int:
    """Number of tests that pass in these files; exits with pytest's output if any fails."""
    paths = [str(ROOT / "tests" / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *paths]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def markdown(columns: Sequence[str], rows: dict[tuple, list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *((*row, *cells) for row, cells in rows.items())]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def cell(code: aot.Code) -> str:
    return f"{code.registers}, {code.spills}, {code.shared / 1024:.0f}, {sum(code.tensor_core.values())}"


def lowrank() -> Iterator[tuple[tuple, str, list[str]]]:
    """Entries of the fused low-rank kernel: row of the table, cell, and what exceeds the GPU's limits."""
    tiles = [(kind, BR, tile) for kind in TILES for BR in TILES[kind] for tile in TILES[kind][BR]]
    for (kind, BR, tile), arch in track(list(product(tiles, aot.SHARED)), description="fused kernel"):
        code = aot.lowrank_code(arch, kind, BR, tile)
        row = kind, BR, f"{tile.BM} x {tile.BK} x {tile.BO}", tile.num_warps, tile.num_stages
        yield row, cell(code), aot.problems(code, arch, kind, tile.BM)


def programs() -> Iterator[tuple[tuple, str, list[str]]]:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    found = []
    for name, dtype in types.items():
        weights = [torch.empty(shape, device="meta", dtype=dtype) for shape in workloads.resnet50()]
        plan = Plan(weights, [width(round(RANK * min(W.shape)), min(W.shape)) for W in weights])
        found += [(name, number, program) for number, program in enumerate(plan.programs, 1)]
    for (name, number, program), arch in track(list(product(found, aot.SHARED)), description="matrix programs"):
        code = aot.program_code(arch, program)
        _, loops, ends = map(len, program.kinds)
        yield (name, number, loops, ends, program.warps), cell(code), aot.program_problems(code, arch, program)


def cuda() -> Iterator[tuple[tuple, str, list[str]]]:
    dynamic = {arch: 8 * COLUMNS.get((arch // 10, arch % 10), FEW_COLUMNS) ** 2 for arch in aot.SHARED}
    codes = {arch: nvrtc.codes(name) for arch, name in zip(aot.SHARED, nvrtc.ARCHS, strict=True)}
    for kernel, arch in product(codes[80], aot.SHARED):
        code = codes[arch][kernel]
        shared = code.shared + {"ck_small": SMALL_BYTES, "ck_ritz": dynamic[arch]}.get(kernel, 0)
        wrong = [f"{shared} bytes of shared memory, of {aot.SHARED[arch]}"] if shared > aot.SHARED[arch] else []
        yield (kernel,), f"{code.registers}, {code.spills}, {shared / 1024:.0f}", nvrtc.problems(code) + wrong


def section(
    title: str, columns: Sequence[str], entries: Iterator[tuple[tuple, str, list[str]]]
) -> tuple[str, list[str]]:
    """Markdown table with a column per architecture, and the list of problems found."""
    rows, wrong = {}, []
    for row, text, problems in entries:
        rows.setdefault(row, []).append(text)
        wrong += [f"{row}, sm_{list(aot.SHARED)[len(rows[row]) - 1]}: {problem}" for problem in problems]
    return f"{title}\n{markdown((*columns, *(f'sm_{arch}' for arch in aot.SHARED)), rows)}", wrong


def main(out: Annotated[Path, typer.Option(help="The file to write.")] = ROOT / "bench/results/gpu-kernels.md") -> None:
    """Compile all configurations for all architectures, and write the tables; fails if one of them does not fit."""
    tiles = ("arithmetic", "rank", "tile BM x BK x BO", "warps", "stages")
    parts = [
        section(LOWRANK.format(version=triton.__version__), tiles, lowrank()),
        section(PROGRAM.format(rank=RANK), ("weights", "program", "loops", "ends", "warps"), programs()),
        section(CUDA.format(version=nvrtc.version()), ("kernel",), cuda()),
    ]
    head = HEAD.format(
        archs=", ".join(f"sm_{arch}" for arch in nvrtc.ARCHS),
        limits=", ".join(f"{limit // 1024}" for limit in aot.SHARED.values()),
        interpreted=passed(INTERPRETED, TRITON_INTERPRET="1"),
        emulated=passed(EMULATED),
    )
    out.write_text("\n".join([head, *(text for text, _ in parts)]))
    if wrong := [line for _, lines in parts for line in lines]:
        raise SystemExit("\n".join(wrong))
    print(f"All kernels fit on {', '.join(nvrtc.ARCHS)}, without spills: {out}")


if __name__ == "__main__":
    typer.run(main)
