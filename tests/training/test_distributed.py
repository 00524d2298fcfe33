"""ProximalStep under DistributedDataParallel, fully_shard and tensor parallel: the weights of a single process."""

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
from compaware_kernels.proximal import gram_list, solver
from compaware_kernels.training.replicas import MODES
from tests.helpers.processes import run

PENALTIES = {"nuclear": 0.3, "group": 0.02, "l1": 0.01}


def network(seed=0):
    """Sizes that divide evenly nowhere, a grouped and a transposed convolution, and a layer without a bias."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 14, 3, groups=7), nn.ReLU(),
        nn.ConvTranspose2d(14, 5, 2, bias=False), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Linear(45, 33), nn.ReLU(), nn.Linear(33, 3),
    ).double()  # fmt: skip


def batch(step, rank=0, processes=1):
    """This rank's part of a batch of 12."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(12) % 3
    return x[rank::processes], y[rank::processes]


def train(model, optimizer, steps, rank=0, processes=1, start=0):
    for step in range(start, start + steps):
        x, y = batch(step, rank, processes)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def single_process(steps=6, every=2, **more):
    """Reference: a single process with the whole batch."""
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
        gathered = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, t.contiguous())
        assert all(torch.equal(t, other) for other in gathered)


# --- DistributedDataParallel ----------------------------------------------------------------------------------------


def data_parallel(rank, processes, mode):
    inner = network()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=2, division=mode)
    train(model, optimizer, 6, rank, processes)
    assert_same_bits([p.detach() for p in model.parameters()])
    assert_same_bits([V for _, V in sorted(prox.warm.bases.items())])
    assert_same_weights(inner, single_process()[0])
    assert prox.report()[0].name == "0"
    return {key: value for key, value in prox.state_dict().items() if key != "warm"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("processes", [2, 3])
def test_data_parallel_equals_one_process_with_bitwise_identical_replicas(processes, mode):
    assert run(data_parallel, processes, processes, mode) == [{"steps": 6, "applied": 3}] * processes


def owners_compute_once(rank):
    """The layers whose SVT this rank has computed."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.3, division="owner")
    seen, original = [], solver.shrink_

    def shrink_(records, *args, **more):
        seen.extend(record.name for record in records)
        return original(records, *args, **more)

    with mock.patch.object(solver, "shrink_", shrink_):
        prox.step()
    return seen


def test_each_layer_has_one_owner():
    seen = run(owners_compute_once, 3)
    assert sorted(name for names in seen for name in names) == sorted(
        layer.name for layer in single_process(0)[1].layers
    )
    assert all(seen)


def different_bits(rank):
    """A rank that computes different bits is detected, logged, and gets the owners' results."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.3, division="replicated")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("compaware_kernels").addHandler(handler)
    original = solver.shrink_

    def shrink_(records, *args, **more):
        infos = original(records, *args, **more)
        if rank == 1 and records:  # as by another rounding: one element up, one down
            numbers = records[0].weight.view(-1)
            numbers[3] = torch.nextafter(numbers[3], torch.tensor(9.0, dtype=torch.float64))
            numbers[5] = torch.nextafter(numbers[5], torch.tensor(-9.0, dtype=torch.float64))
        return infos

    with mock.patch.object(solver, "shrink_", shrink_):
        for _ in range(2):
            prox.step()
            assert_same_bits([p.detach() for p in model.parameters()])
    return messages


def test_different_bits_are_detected():
    message = ("ProximalStep: wanted bitwise equal results on all ranks; got different ones: from now on one owner "
               "rank computes each layer")  # fmt: skip
    assert run(different_bits, 2) == [[message]] * 2


def nan_on_one_rank(rank):
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


def test_nan_on_one_rank_raises_on_all_and_changes_nothing():
    run(nan_on_one_rank, 2)


def without_process_group(rank):
    """Several ranks, but neither DDP nor DTensors nor a process group: a warning; then with a process group."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("compaware_kernels").addHandler(handler)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ck.ProximalStep(model, optimizer)
    assert len(messages) == 1 and "each rank shrinks its own copy" in messages[0]
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, process_group=dist.group.WORLD)
    assert len(messages) == 1
    prox.step()
    assert_same_bits([p.detach() for p in model.parameters()])


def test_process_group_argument():
    run(without_process_group, 2)


# --- fully_shard ----------------------------------------------------------------------------------------------------


def fsdp_model(mesh=None):
    model = network()
    for layer in model:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(rank, processes, mode):
    with mock.patch.object(gram_list, "MEDIUM", 0):  # small layers as large ones, with a basis in the state
        sharded_as_large(rank, processes, mode)


def sharded_as_large(rank, processes, mode):
    model = fsdp_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=2, division=mode)
    train(model, optimizer, 6, rank, processes)
    wanted, single_prox = single_process()
    assert_same_weights(model, wanted)
    for got, expected in zip(prox.report(), single_prox.report(), strict=True):
        assert (got.name, got.shape, got.rank, got.neurons) == (
            expected.name, expected.shape, expected.rank, expected.neurons)  # fmt: skip
        assert got.rows_alive == pytest.approx(expected.rows_alive)
        assert got.sigma_sum == pytest.approx(expected.sigma_sum, rel=1e-5)
    model.eval()
    model(batch(0)[0])  # leaves the root unsharded; the step must reshard it first
    prox.step()
    single_prox.step()
    assert_same_weights(model, wanted)
    prox.state_dict()
    assert prox.warm.bases.keys() >= single_prox.warm.bases.keys() > set()
    assert_same_bits([V for _, V in sorted(prox.warm.bases.items())])


@pytest.mark.parametrize("mode", ["auto", "owner"])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_fully_sharded_equals_one_process(processes, mode):
    run(sharded, processes, processes, mode)


def replicas_of_shards(rank, mode):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fsdp_model(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, every=2, division=mode)
    train(model, optimizer, 6, rank, 4)
    assert_same_weights(model, single_process()[0])
    assert_same_bits([full(p) for p in model.parameters()])
    assert prox.applied == 3
    modes = {group.mode for group in prox._coordinator._replica_groups.values()}
    assert modes == {"owner"}, "the shards of one replica must take the same decision"
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
def test_tensor_parallel_equals_one_process(processes, mode):
    run(tensor_parallel, processes, processes, mode)
