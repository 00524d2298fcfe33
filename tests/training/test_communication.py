"""Bytes that a sharded proximal step communicates: equal to the model of bench/training/communication.py."""

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import compaware_kernels as ck
from bench.training import communication
from compaware_kernels.proximal.subspace_iteration import NEAR, PROBES
from tests.helpers.cases import low_rank
from tests.helpers.processes import run

ERROR_FLAG = 8  # bytes all-reduced to raise argument errors on all ranks


def warm_started_step(rank, processes, m, n, r, tau):
    mesh, state = init_device_mesh("cpu", (processes,)), ck.WarmState()
    W = low_rank(m, n, r).float()
    for _ in range(2):
        known = next((V.shape[1] for V in state.bases.values()), 0)
        D = distribute_tensor(W.clone(), mesh, [Shard(0)])
        with communication.Counted() as counted:
            (info,) = ck.svt_([D], tau, state=state)
    s = torch.linalg.svdvals(W.double())
    return info.method, info.reason, known, int((s > tau).sum()), int((s > NEAR * tau).sum()), counted.bytes


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(("m", "n", "r"), [(1200, 600, 12), (700, 1300, 20)])
def test_bytes_of_a_warm_started_step_are_those_of_the_model(processes, m, n, r):
    found = run(warm_started_step, processes, processes, m, n, r, 1.0)
    for method, reason, known, wanted, near, sent in found:
        assert method == "subspace, fp32"
        passes, products = map(int, re.fullmatch(r"(\d+) passes, (\d+) products", reason).groups())
        assert passes == 1
        powers = (products - 3 * known) // PROBES
        model = communication.subspace(min(m, n), known, wanted, near, powers)
        assert sent["reduced"] - ERROR_FLAG == model.reduced
        assert sent["spread"] == model.spread
    turned = communication.turning(m, n, m >= n, processes)
    assert sum(sent["turned"] for *_, sent in found) * (processes - 1) / processes == pytest.approx(
        processes * turned.turned
    )
