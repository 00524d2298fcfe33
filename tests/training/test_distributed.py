"""ProximalStep under DistributedDataParallel, fully_shard and tensor parallel: as one process would have done it."""

import logging
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import compaware_kernels as ck
from compaware_kernels.proximal import solver
from compaware_kernels.training.replicas import MODES
from tests.helpers.processes import run

PENALTIES = {"nuclear": 0.3, "group": 0.02, "l1": 0.01}


def network(seed=0):
    """Uneven everywhere, with a grouped and a transposed convolution, and a layer without a bias."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 14, 3, groups=7), nn.ReLU(),
        nn.ConvTranspose2d(14, 5, 2, bias=False), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Linear(45, 33), nn.ReLU(), nn.Linear(33, 3),
    ).double()  # fmt: skip


def batch(step, rank=0, processes=1):
    """The part of one process of a batch of 12."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(12) % 3
    return x[rank::processes], y[rank::processes]


def train(model, optimizer, steps, rank=0, processes=1, start=0):
    for step in range(start, start + steps):
        x, y = batch(step, rank, processes)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def alone(steps=6, every=2, **more):
    """One process, the whole batch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=every, **more)
    train(model, optimizer, steps)
    return model, prox


def full(parameter):
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def assert_same_weights(model, wanted, atol=1e-6):
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(
            full(p), q.detach(), rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_bits(tensors):
    for t in tensors:
        everywhere = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, t.contiguous())
        assert all(torch.equal(t, other) for other in everywhere)


# --- DistributedDataParallel ----------------------------------------------------------------------------------------


def data_parallel(rank, processes, mode):
    inner = network()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=2, division=mode)
    train(model, optimizer, 6, rank, processes)
    assert_same_bits([p.detach() for p in model.parameters()])
    assert_same_bits([V for _, V in sorted(prox.warm.bases.items())])
    assert_same_weights(inner, alone()[0])
    assert prox.report()[0].name == "0"
    return {key: value for key, value in prox.state_dict().items() if key != "warm"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("processes", [2, 3])
def test_data_parallel_is_one_process_and_the_same_to_the_last_bit(processes, mode):
    assert run(data_parallel, processes, processes, mode) == [{"steps": 6, "applied": 3}] * processes


def owners_compute_once(rank):
    """Each layer's SVT on one process only."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.3, division="owner")
    seen, whole = [], solver.shrink_

    def shrink_(records, *args, **more):
        seen.extend(record.name for record in records)
        return whole(records, *args, **more)

    with mock.patch.object(solver, "shrink_", shrink_):
        prox.step()
    return seen


def test_each_layer_has_one_owner():
    seen = run(owners_compute_once, 3)
    assert sorted(name for names in seen for name in names) == sorted(layer.name for layer in alone(0)[1].layers)
    assert all(seen)


def other_bits(rank):
    """A process that computes something else is found out, said, and mended."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.3, division="replicated")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("compaware_kernels").addHandler(handler)
    whole = solver.shrink_

    def shrink_(records, *args, **more):
        infos = whole(records, *args, **more)
        if rank == 1 and records:  # as if rounded otherwise: two elements, one up, one down
            numbers = records[0].weight.view(-1)
            numbers[3] = torch.nextafter(numbers[3], torch.tensor(9.0, dtype=torch.float64))
            numbers[5] = torch.nextafter(numbers[5], torch.tensor(-9.0, dtype=torch.float64))
        return infos

    with mock.patch.object(solver, "shrink_", shrink_):
        for _ in range(2):
            prox.step()
            assert_same_bits([p.detach() for p in model.parameters()])
    return messages


def test_other_bits_are_found_out():
    found = run(other_bits, 2)
    assert found == [["a proximal step gave other bits on another process; from now on each layer has an owner"]] * 2


def nan_somewhere(rank):
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES)
    if rank == 1:
        with torch.no_grad():
            model.module[7].bias[2] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^7: contains NaN"):
        prox.step()
    assert all(torch.equal(p.nan_to_num(1), q.nan_to_num(1)) for p, q in zip(model.parameters(), before, strict=True))
    assert prox.applied == prox.warm.calls == 0 and not prox.warm.bases


def test_nan_on_one_process_stops_all_and_changes_nothing():
    run(nan_somewhere, 2)


def unnoticed(rank):
    """Several processes, but nothing that says how the model lies."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("compaware_kernels").addHandler(handler)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ck.ProximalStep(model, optimizer)
    assert len(messages) == 1 and "takes steps of its own" in messages[0]
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, process_group=dist.group.WORLD)
    assert len(messages) == 1
    prox.step()
    assert_same_bits([p.detach() for p in model.parameters()])


def test_a_process_group_by_hand():
    run(unnoticed, 2)


# --- fully_shard ----------------------------------------------------------------------------------------------------


def fsdp_model(mesh=None):
    model = network()
    for layer in model:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(rank, processes, mode):
    model = fsdp_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=2, division=mode)
    train(model, optimizer, 6, rank, processes)
    wanted, prox_alone = alone()
    assert_same_weights(model, wanted)
    for got, expected in zip(prox.report(), prox_alone.report(), strict=True):
        assert (got.name, got.shape, got.rank, got.neurons) == (
            expected.name, expected.shape, expected.rank, expected.neurons)  # fmt: skip
        assert got.rows_alive == pytest.approx(expected.rows_alive)
        assert got.sigma_sum == pytest.approx(expected.sigma_sum, rel=1e-5)
    model.eval()
    model(batch(0)[0])  # leaves gathered weights in the root, on which a step must not run
    prox.step()
    prox_alone.step()
    assert_same_weights(model, wanted)
    prox.state_dict()
    assert prox.warm.bases.keys() >= prox_alone.warm.bases.keys() > set()
    assert_same_bits([V for _, V in sorted(prox.warm.bases.items())])


@pytest.mark.parametrize("mode", ["auto", "owner"])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_fully_sharded_is_one_process(processes, mode):
    run(sharded, processes, processes, mode)


def replicas_of_shards(rank, mode):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fsdp_model(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=2, division=mode)
    train(model, optimizer, 6, rank, 4)
    assert_same_weights(model, alone()[0])
    assert_same_bits([full(p) for p in model.parameters()])
    assert prox.applied == 3
    assert {replicas.mode for replicas in prox._coordinator._replicas.values()} == {
        "owner"
    }  # parts of one must not differ
    prox.state_dict()
    assert_same_bits([V for _, V in sorted(prox.warm.bases.items())])


@pytest.mark.parametrize("mode", ["auto", "owner"])
def test_replicas_of_shards(mode):
    run(replicas_of_shards, 4, mode)


def center_of_shards(rank, processes, mode):
    base, model = fsdp_model(), fsdp_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.5, every=2, center=base, division=mode)
    train(model, optimizer, 4, rank, processes)
    wanted, reference = network(), network()
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.1)
    expected = ck.ProximalStep(wanted, optimizer, nuclear=0.5, every=2, center=reference)
    train(wanted, optimizer, 4)
    assert_same_weights(model, wanted)
    assert [r.rank for r in prox.report()] == [r.rank for r in expected.report()]


@pytest.mark.parametrize("mode", ["auto", "owner"])
def test_around_a_center(mode):
    run(center_of_shards, 2, 2, mode)


# --- tensor parallel ------------------------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 3)).double()


def tensor_parallel(rank, processes, mode):
    mesh = init_device_mesh("cpu", (processes,))
    model = parallelize_module(mlp(), mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=2, division=mode)
    train(model, optimizer, 4)
    wanted = mlp()
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.1)
    expected = ck.ProximalStep(wanted, optimizer, **PENALTIES, every=2)
    train(wanted, optimizer, 4)
    assert_same_weights(model, wanted)
    assert [(r.rank, r.rows_alive) for r in prox.report()] == [(r.rank, r.rows_alive) for r in expected.report()]


@pytest.mark.parametrize("mode", ["auto", "owner"])
@pytest.mark.parametrize("processes", [2, 3])
def test_tensor_parallel_is_one_process(processes, mode):
    run(tensor_parallel, processes, processes, mode)
