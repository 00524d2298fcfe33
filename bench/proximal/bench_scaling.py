"""How the SVT of drifted weights scales: with the number of layers, their width, and threads; and its peak memory."""

import os

import pytest
import torch

from bench.proximal import memory, peers
from bench.proximal.bench_svt import race
from bench.proximal.cases import CASES, drifted

SIZE, RANK = 128, 16
FEW = (peers.svd, peers.gram_eigh_fp64, peers.svd_lowrank)
DIRECTIONS = 1024  # of the drift: in all of 8,192 it would take minutes


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
@torch.no_grad()
def test_layers(svt_race, count):
    found = drifted([(SIZE, SIZE)] * count, RANK)
    race(svt_race, f"{count} of {SIZE} x {SIZE}", found.weights, found.calls, FEW, found)


@pytest.mark.parametrize("width", [64, 256, 1024, 4096, 8192])
@torch.no_grad()
def test_width(svt_race, width):
    rank = min(64, width // 8)
    found = drifted([(width, width)], rank, directions=DIRECTIONS)
    cold = FEW if width <= 1024 else FEW[2:]
    race(svt_race, f"{width} x {width}, rank {rank}", found.weights, found.calls, (*cold, peers.scipy_propack), found)


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_threads(svt_race, threads):
    if threads > (os.cpu_count() or 1):
        pytest.skip(f"this machine has fewer than {threads} CPUs")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = drifted(*CASES["resnet50"])
        race(
            svt_race, f"resnet50, {threads} thread{'s' * (threads > 1)}", found.weights, found.calls, FEW[:2], found, ()
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["resnet50", "4096 x 4096, rank 64"])
def test_memory(show_memory, case):
    rows = memory.ROWS if case == "resnet50" else ("warm", "cold", "svd_lowrank", "warm_subspace")
    show_memory(case, lambda: {row: memory.measure(case, row) for row in rows})
