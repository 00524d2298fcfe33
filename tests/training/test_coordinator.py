"""Coordinator: bases of the warm state on all ranks, layers of several dtypes, fingerprints, assignment of layers."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import compaware_kernels as ck
from compaware_kernels.proximal import solver
from compaware_kernels.training.replicas import assign, fingerprint
from compaware_kernels.training.report import layer_spectrum
from tests.helpers.cases import low_rank
from tests.helpers.processes import run
from tests.training.test_distributed import assert_same_bits

SHAPES = {"0": (150, 200), "1": (200, 150), "2": (181, 181)}


def low_rank_model():
    model = nn.Sequential(*[nn.Linear(n, m, bias=False) for m, n in SHAPES.values()])
    for layer, (m, n) in zip(model, SHAPES.values(), strict=True):
        layer.weight = nn.Parameter(low_rank(m, n, 6, largest=30.0).float())
    return model


def bases_on_all_ranks(rank, processes, kind, mode):
    model, group = low_rank_model(), None
    if kind == "replicas":
        group = dist.group.WORLD
    else:
        sizes, names = ((2, 2), ("replicate", "shard")) if kind == "replicas of shards" else ((processes,), ("shard",))
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        model = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prox = ck.ProximalStep(model, optimizer, nuclear=1.0, process_group=group, division=mode)
    prox.step()
    prox.state_dict()
    assert sorted(prox.warm.bases) == [f"{name}.0" for name in SHAPES]
    assert all(V.shape[1] >= 6 for V in prox.warm.bases.values())
    assert_same_bits([V for _, V in sorted(prox.warm.bases.items())])
    for name, (m, n) in SHAPES.items():  # the basis spans the rows (m < n: the columns) of the shrunk matrix
        P, V = ck.svt(low_rank(m, n, 6, largest=30.0), 1.0), prox.warm.bases[f"{name}.0"].double()
        P = P if m >= n else P.mT
        assert torch.linalg.matrix_norm(P - P @ V @ V.mT) < 1e-3


@pytest.mark.parametrize("kind", ["replicas", "shards", "replicas of shards"])
@pytest.mark.parametrize("mode", ["auto", "owner"])
def test_bases_are_equal_on_all_ranks(kind, mode):
    run(bases_on_all_ranks, 4, 4, kind, mode)


def two_axes_of_replicas(rank):
    """One of four ranks computes different bits."""
    mesh, model = init_device_mesh("cpu", (2, 2)), low_rank_model()
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate(), Replicate()]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prox = ck.ProximalStep(model, optimizer, nuclear=1.0, division="owner")
    original = solver.shrink_

    def shrink_(records, *args, **more):
        original(records, *args, **more)
        for record in records if rank == 3 else ():
            record.weight.to_local()[0, 0] += 1e-3

    with mock.patch.object(solver, "shrink_", shrink_):
        prox.step()
    assert_same_bits([layer.weight.detach().to_local() for layer in model])


def test_two_axes_of_replicas():
    run(two_axes_of_replicas, 4)


def unaligned_bytes(rank):
    """A message with 2 bytes of bf16 before 8 of fp64, which are not aligned then."""
    torch.manual_seed(0)
    halves = [nn.Linear(1, 1, bias=False).bfloat16() for _ in range(2)]  # one for each owner, first in its message
    model = nn.Sequential(*halves, nn.Linear(5, 3).double(), nn.Linear(5, 3).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.1, group=0.1, process_group=dist.group.WORLD, division="owner")
    wanted = ck.group_shrink(ck.svt(model[0].weight.detach(), 0.01), 0.01)
    prox.step()
    assert_same_bits([p.detach().float() for p in model.parameters()])
    torch.testing.assert_close(model[0].weight.detach(), wanted)


def test_layers_of_several_dtypes():
    run(unaligned_bytes, 1)
    run(unaligned_bytes, 2)


def test_fingerprints_differ_if_bits_differ():
    t = torch.arange(1.0, 3000.0)
    for change in ({5: 9.0}, {7: -9e9, 8: 9e9}, {2998: 0.0}):
        other = t.clone()
        for i, towards in change.items():
            other[i] = torch.nextafter(other[i], torch.tensor(towards))
        assert fingerprint(other) != fingerprint(t), change
    assert fingerprint(t.clone()) == fingerprint(t)
    assert fingerprint(t.bfloat16()[:3]) != fingerprint(t.bfloat16()[1:4])


def test_layers_are_assigned_in_order_of_descending_cost():
    assert assign([1, 9, 5, 4], 2) == [0, 0, 1, 1]
    assert assign([], 2) == []
    assert set(assign([1.0] * 7, 3)) == {0, 1, 2}


def nonzero_rows(rank):
    """Rows with nonzero elements in the column shard of one rank only."""
    W = torch.zeros(6, 9)
    W[0, 0] = W[3, 8] = W[5, 4] = 1.0
    mesh = init_device_mesh("cpu", (3,))
    for dim in (0, 1):
        entry = layer_spectrum("fc", distribute_tensor(W, mesh, [Shard(dim)]), "paper", 1, {})
        assert (entry.rank, entry.neurons, entry.rows_alive) == (3, 6, 0.5)


def test_nonzero_rows_of_sharded_weights():
    run(nonzero_rows, 3)
