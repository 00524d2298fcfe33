"""Sharded models: biases sharded differently, partly sharded models, 16-bit dtypes, models unsharded by forward."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import compaware_kernels as ck
from tests.helpers.processes import run
from tests.training.test_distributed import assert_same_bits, assert_same_weights

PENALTIES = {"nuclear": 0.5, "group": 0.1, "l1": 0.05}
MODES = ("auto", "owner")


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def convolutions():
    torch.manual_seed(0)
    grouped = nn.ConvTranspose2d(6, 9, 3, groups=3), nn.Conv2d(9, 6, 3, groups=3)
    return nn.Sequential(*grouped, nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 5, 3)).double()


def shard(model, kind):
    if kind == "inputs":  # the biases are sharded along the outputs
        return fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)
    if kind == "weights only":
        biases = {p for name, p in model.named_parameters() if name.endswith("bias")}
        return fully_shard(model, ignored_params=biases)
    if kind == "replicas":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return fully_shard(model)


def attached(model, **options):
    return ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def rounded(report):
    return [(r.name, r.shape, r.rank, r.neurons, round(r.rows_alive, 6)) for r in report]


def one_step(rank, build, kind, options):
    model = shard(build(), kind)
    group = dist.group.WORLD if kind == "weights only" else None  # of the biases
    prox = attached(model, process_group=group, **options)
    prox.step()
    wanted = build()
    expected = attached(wanted, **{k: v for k, v in options.items() if k != "division"})
    expected.step()
    assert_same_weights(model, wanted)
    assert rounded(prox.report()) == rounded(expected.report())
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, prox.state_dict())
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["outputs", "inputs", "weights only"])
def test_biases_sharded_differently_from_weights(kind, mode):
    run(one_step, 2, linear, kind, PENALTIES | {"division": mode})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fold", ck.folds.FOLDS)
def test_grouped_and_transposed_convolutions(fold, mode):
    run(one_step, 2, convolutions, "outputs", PENALTIES | {"division": mode, "fold": fold})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nuclear", [{"0": 0.5}, {"*": 0.5}])
def test_a_replica_may_have_nothing_to_shrink(nuclear, mode):
    run(one_step, 4, pair, "replicas", {"nuclear": nuclear, "group": 0.1, "division": mode})


def pair():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 18), nn.Linear(18, 3)).double()


def dtypes_of_16_bits(rank):
    for dtype in (torch.bfloat16, torch.float16):
        model, wanted = shard(linear().to(dtype), "outputs"), linear().to(dtype)
        prox, expected = (attached(each, nuclear=0.5) for each in (model, wanted))
        prox.step()
        expected.step()
        assert_same_weights(model, wanted, atol=2 * torch.finfo(dtype).eps)
        assert rounded(prox.report()) == rounded(expected.report())


def test_dtypes_of_16_bits():
    run(dtypes_of_16_bits, 2)


def unsharded_by_forward(rank, mode):
    """After a forward pass without a backward pass FSDP2 modules hold unsharded weights."""
    x = torch.ones(1, 20, dtype=torch.float64)
    model, teacher = shard(linear(), "outputs"), shard(linear(), "outputs")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(x)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.5, center=teacher, division=mode)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
        model(x), teacher(x)
    assert len(prox.thresholds()) == 3
    prox.step()
    report = prox.report()
    plain, center = linear(), linear()  # an unsharded center, too
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.3)
    again = shard(copy.deepcopy(plain), "outputs")
    expected, whole = attached(plain, nuclear=0.5, center=center), attached(again, nuclear=0.5, center=center)
    expected.step()
    whole.step()
    assert_same_weights(model, plain)
    assert_same_weights(again, plain)
    assert rounded(report) == rounded(expected.report()) == rounded(whole.report())


@pytest.mark.parametrize("mode", MODES)
def test_models_left_unsharded_by_forward(mode):
    run(unsharded_by_forward, 2, mode)


def partly_sharded(rank, mode):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("compaware_kernels").addHandler(handler)
    model = linear()
    fully_shard(model[0])
    attached(model, **PENALTIES)
    assert len(messages) == 1 and messages[0].startswith("2, 4: no DistributedDataParallel")
    prox = attached(model, **PENALTIES, process_group=dist.group.WORLD, division=mode)
    assert len(messages) == 1
    prox.step()
    wanted = linear()
    attached(wanted, **PENALTIES).step()
    assert_same_weights(model, wanted)
    assert_same_bits([p.detach() for p in model[2:].parameters()])


@pytest.mark.parametrize("mode", MODES)
def test_partly_sharded(mode):
    run(partly_sharded, 2, mode)


def frozen_later(rank):
    """The basis of a layer that the last step did not shrink is still in the state of all ranks."""
    model = shard(linear(), "outputs")
    prox = attached(model, nuclear=0.5, division="owner")
    prox.step()
    model[0].weight.requires_grad_(False)
    prox.optimizer.param_groups[0]["lr"] = 0.0
    prox.step()
    return prox.state_dict(), sorted(prox.warm.bases)


def test_frozen_later():
    found = run(frozen_later, 3)
    assert all(each == found[0] for each in found)


def two_errors(rank):
    model = shard(linear(), "outputs")
    prox = attached(model, nuclear=0.5)
    with torch.no_grad():
        model[0 if rank == 0 else 2].weight.to_local()[0, 0] = torch.nan if rank == 0 else torch.inf
    with pytest.raises(ValueError, match=r"^0: contains NaN"):
        prox.step()
    prox.warm.calls = rank
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().fill_(1.0)
    with pytest.raises(ValueError, match="wanted the same number of steps on every rank; got 0 to 1"):
        prox.step()


def test_all_ranks_raise_the_same_error():
    run(two_errors, 2)
