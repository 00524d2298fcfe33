"""Triton kernels compile for every architecture: to tensor-core code without spills, within the GPU's limits.

Tested are the largest and smallest ranks of the fused low-rank kernel, and the matrix programs with most kinds of
products; ``python -m bench.models.gpu_table`` compiles all.
"""

from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from compaware_kernels.ops.triton_lowrank import TILES, Tile
from compaware_kernels.proximal.cuda.matmul_program import Program
from compaware_kernels.proximal.cuda.plan import Plan
from tests.emulation.triton_aot import SHARED, Code, lowrank_code, problems, program_code, program_problems

pytestmark = pytest.mark.emulation

BIGGEST = [(kind, BR, TILES[kind][BR][0]) for kind in TILES for BR in (16, 128)]


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kind, BR, tile", BIGGEST, ids=str)
def test_largest_tiles(capability, kind, BR, tile):
    code = lowrank_code(capability, kind, BR, tile)
    assert not problems(code, capability, kind, tile.BM), code


@pytest.mark.parametrize("capability", SHARED)
def test_small_tiles_use_tensor_cores_too(capability):
    tile = TILES["half"][64][-1]
    assert not problems(lowrank_code(capability, "half", 64, tile), capability, "half", tile.BM)


VARIANTS = {
    "linear": {"kernel": 1},
    "plain": {"kernel": 1, "activation": "none", "ends": ""},
    "fp16": {"dtype": "fp16", "activation": "silu"},
    "relu6, bias": {"activation": "relu6", "ends": "b"},
    "relu, residual": {"activation": "relu", "ends": "r"},
    "7 x 7": {"kernel": 7},
    "large strides": {"stride": "i64"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    tile = TILES["half"][32][0]
    assert not problems(lowrank_code(90, "half", 32, tile, **VARIANTS[variant]), 90, "half", tile.BM)


@cache
def step(dtype: torch.dtype) -> list[Program]:
    """Matrix programs of a step for layers in all layouts: aligned or not, tall and wide."""
    shapes = [(2048, 512), (512, 2048), (300, 201), (201, 333), (576, 147)]
    return Plan([torch.empty(shape, device="meta", dtype=dtype) for shape in shapes], [80, 80, 32, 32, 32]).programs


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype, number", [(torch.bfloat16, 2), (torch.float32, 3), (torch.float32, 5)], ids=str)
def test_programs(capability, dtype, number):
    program = step(dtype)[number]
    code = program_code(capability, program)
    assert not program_problems(code, capability, program), code


def test_problems_of_a_program_are_reported():
    program, code = step(torch.float32)[2], Code(255, stack=8, spills=2, shared=0, tensor_core={"HMMA": 1}, fma=0)
    assert program_problems(code, 80, program) == ["2 spills, 8 bytes", "no DMMA"]
    assert program_problems(code, 90, program)[1:] == ["no HGMMA", "no DMMA"]
    assert program_problems(code, 100, program)[1:] == ["no UTC"]


def test_too_much_shared_memory_is_reported():
    tile = Tile(128, 128, 64, 8, 4)
    (found,) = problems(lowrank_code(90, "half", 128, tile), 90, "half", tile.BM)
    assert "bytes of shared memory, of 232448" in found


def test_spills_are_reported():
    tile = Tile(128, 64, 128, 4, 2)
    (found,) = problems(lowrank_code(80, "half", 128, tile), 80, "half", tile.BM)
    assert "spills" in found


def test_wrong_arithmetic_is_reported():
    code = Code(registers=256, stack=0, spills=0, shared=0, tensor_core={"HMMA": 8}, fma=0)
    assert problems(code, 90, "half", 64) == ["256 registers", "no HGMMA"]
    assert problems(code._replace(registers=9), 90, "ieee", 64) == ["fp32 on tensor cores"]
