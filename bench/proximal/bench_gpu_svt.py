"""SVT of every layer of a network on a GPU against its baselines, fp32, tau = 1: make gpu-bench

Regimes and tolerance as in bench_svt.py: every result is compared with the fp64 truth, and a wrong one gets no ratio.
Beside each time stands the one that step_model.py predicted for this GPU.
"""

import pytest
import torch

from bench.common import workloads
from bench.proximal import gpu_race
from bench.proximal.bench_svt import FULL
from bench.proximal.cases import CASES, truth

pytestmark = pytest.mark.skipif(workloads.DEVICE != "cuda", reason="torch.cuda.is_available() is False")


@pytest.fixture
def race(benchmark, show_gpu_rows):
    """race(case, share of the full rank or None, ours, weights, their truths)"""

    def run(case, share, ours, weights, truths):
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        chip, remark = gpu_race.chip_of(name, capability)
        predicted = gpu_race.prediction(chip, weights, share)
        found = gpu_race.race(ours, weights, truths, "cuda")
        table = gpu_race.table(found, predicted)
        show_gpu_rows(case, table)
        benchmark.extra_info |= table
        benchmark.extra_info |= {"model": chip, "remark": remark, "device": name, "versions": gpu_race.versions()}
        benchmark.pedantic(ours, setup=lambda: ours.reset(weights), rounds=5)
        assert table["compaware"]["ok"], "not within the tolerance, or not within its bound"

    return run


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_warm(race, name):
    shapes, share = CASES[name]
    torch.manual_seed(0)
    bases = workloads.low_rank(shapes, share)
    start = workloads.shrunk(bases)
    ours = gpu_race.Ours(start, lambda: workloads.drifted(start, bases))
    weights = workloads.drifted(start, bases)
    race(name, share, ours, weights, [truth(W, U.shape[1]) for W, (U, _) in zip(weights, bases, strict=True)])


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_full_rank(race, name):
    torch.manual_seed(0)
    weights = [torch.randn(shape, device="cuda") for shape in CASES[name][0]]
    weights = [
        1.5 * W / torch.linalg.svdvals(W)[-1] if min(W.shape) > 40 else W + 3 * torch.eye(*W.shape).to(W)
        for W in weights
    ]
    race(name + ", full rank", None, gpu_race.Ours(weights, lambda: weights), weights, [truth(W) for W in weights])
