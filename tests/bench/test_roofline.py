"""Time model of the GPU step (bench/models/step_model.py): its counts match what the programs do."""

import re
from math import ceil
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.common import workloads
from bench.models import step_model as model
from compaware_kernels.proximal.cuda.matmul_program import Program

H100 = model.GPUS["H100 SXM"]


def multiplied(m, n, k, p=32):
    """flops of the products of proximal/cuda/subspace_iteration.py for one layer, by program, counted independently."""

    def gemm(*sizes):
        return 2 * sizes[0] * sizes[1] * sizes[2]

    forward, gram, polish = gemm(m, n, k), gemm(k, m, k), gemm(m, k, k)
    orthonormal = 3 * polish + 2 * gram
    first = forward + gram
    second = orthonormal + 2 * forward + gram
    third = orthonormal + forward + gram + gemm(k, n, k) + gemm(m, n, p) + 2 * gemm(k, m, p) + gemm(k, n, p)
    triplets = 2 * gemm(n, k, k) + gemm(m, k, k) + 3 * gemm(k, k, p)
    checks = gemm(m, k, p) + gemm(n, k, p) + 5 * gemm(k, k, p) + gemm(m, n, p)
    powers = 8 * gemm(m, n, p) + 4 * 2 * gemm(m, k, p)
    return first, second, third, triplets + checks + powers


def test_flops_equal_an_independent_count():
    m, n = 300, 200
    plan = model.plan_of([(m, n)], 40)
    (k,) = {x.k for x in plan.layers}
    assert k == 48
    predicted = model.predict(H100, plan)
    programs = [launch for launch in predicted.launches if launch.tiles]
    counted = [sum(part.flops for part in launch.parts) for launch in programs]
    # the last program: products of the whole matrix, not run
    assert counted == [*multiplied(m, n, k), 2 * m * n * k, 0]


def test_tile_counts_equal_those_launched():
    plan = model.plan_of([(300, 200), (5000, 96)], 0.125)
    for program in plan.programs:
        works = [work for stage in model.stages(program) for work in stage]
        assert sum(work.tiles for work in works) == program.tiles
        assert sum(work.flops for work in works) == program.flops
        for work in works:
            assert work.steps * work.chunks >= ceil(work.product.sizes[2] / work.product.loop.BK)
            assert work.tiles * work.tile_flops >= work.flops


def test_a_stage_takes_at_least_its_bounds():
    program = Program(layers=1)
    A, B = torch.empty(8192, 8192, device="meta"), torch.empty(8192, 8192, device="meta")
    program.multiply(0, A, B, torch.empty(8192, 8192, device="meta"))
    (works,) = model.stages(program.build("meta"))
    seconds, bound = model.stage_time(H100, works)
    assert bound in ("tf32x3", "L2")
    assert seconds >= 3 * 2 * 8192**3 / H100.tf32
    assert seconds >= 3 * 4 * 8192**2 / H100.chip.dram


@pytest.mark.parametrize("share", [0.125, None], ids=["warm", "first"])
def test_launches(share):
    counts = {len(model.launches(model.plan_of(shapes(), share))) for shapes in (workloads.resnet50, workloads.vit_b)}
    assert len(counts) == 1 and max(counts) <= 16


def test_committed_predictions_are_up_to_date():
    """On a failure: run bench/models/step_roofline.py again; the step or its model has changed."""
    text = (Path(workloads.__file__).parents[1] / "results" / "roofline-step.md").read_text()
    (row,) = re.findall(r"^\| ResNet-50 \| warm \|(.*)\|$", text, re.M)
    cells = [float(cell.replace(",", "")) for cell in row.split("|")]
    plan = model.plan_of(workloads.resnet50(), 0.125)
    predicted = [round(1e3 * model.predict(gpu, plan).seconds, 2) for gpu in model.GPUS.values()]
    assert cells == [*predicted, len(model.launches(plan)), round(model.workspace(plan) / 1e6)]
