"""What every configuration of the Triton kernels compiles to; needs no GPU: python bench/gpu_table.py"""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Annotated

import triton
import typer
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from triton_aot import SHARED, lowrank_code, problems  # noqa: E402

from compaware_kernels.triton.lowrank import TILES  # noqa: E402

COLUMNS = ("arithmetic", "rank", "tile BM x BK x BO", "warps", "stages", *(f"sm_{arch}" for arch in SHARED))
HEAD = """# The GPU kernels, without a GPU

The fused low-rank kernel (`compaware_kernels/triton/lowrank.py`), every tile, in its heaviest form (3 x 3, bias,
residual, gelu), compiled with triton {version}. Per architecture: registers per thread, spills, KiB of shared memory,
tensor-core instructions (`HMMA` on sm_80, on sm_120 and in tiles of 32 pixels; `HGMMA` on sm_90; `UTCHMMA` on sm_100;
none in fp32 proper, `ieee`). Limits: 255 registers, {limits} KiB.

{cases} tests passed under the interpreter: values against fp64, strides, program orders, bounds, planted bugs.
None of this has run on a GPU. Written by `python bench/gpu_table.py`.
"""


def interpreted() -> int:
    """How many tests of the kernel pass under the interpreter; all must."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "triton_interpreted.py")]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def main(out: Annotated[Path, typer.Option(help="The file to write.")] = ROOT / "bench/results/gpu-kernels.md") -> None:
    """Compile all configurations for all architectures, and write the table; fails if one of them does not fit."""
    tiles = [(kind, BR, tile) for kind in TILES for BR in TILES[kind] for tile in TILES[kind][BR]]
    rows = {entry: [] for entry in tiles}
    wrong = []
    for (kind, BR, tile), arch in track(list(product(tiles, SHARED)), description="compiling"):
        code = lowrank_code(arch, kind, BR, tile)
        rows[kind, BR, tile].append(
            f"{code.registers}, {code.spills}, {code.shared / 1024:.0f}, {sum(code.tensor_core.values())}"
        )
        wrong += [f"sm_{arch} {kind} {BR} {tile}: {problem}" for problem in problems(code, arch, kind, tile.BM)]
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for (kind, BR, tile), cells in rows.items():
        lines.append((kind, BR, f"{tile.BM} x {tile.BK} x {tile.BO}", tile.num_warps, tile.num_stages, *cells))
    limits = ", ".join(f"{limit // 1024}" for limit in SHARED.values())
    text = HEAD.format(version=triton.__version__, limits=limits, cases=interpreted())
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    out.write_text(f"{text}\nregisters, spills, KiB, tensor-core instructions:\n\n{table}\n")
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{len(tiles) * len(SHARED)} configurations compiled without spills; {out}")


if __name__ == "__main__":
    typer.run(main)
