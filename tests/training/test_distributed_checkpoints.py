"""Checkpoints resumed with another number of ranks: the same weights as training without a stop."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import compaware_kernels as ck
from tests.helpers.processes import run
from tests.training.test_distributed import PENALTIES, assert_same_bits, assert_same_weights, fsdp_model, network, train

KINDS = {
    "fully_shard": (fsdp_model, "auto"),
    "fully_shard, owners": (fsdp_model, "owner"),
    "DDP": (lambda: DistributedDataParallel(network()), "auto"),
    "single process": (network, "auto"),
}


def start(kind):
    build, division = KINDS[kind]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, ck.ProximalStep(model, optimizer, **PENALTIES, every=2, warmup=3, division=division)


def write(rank, processes, kind, folder):
    model, optimizer, prox = start(kind)
    train(model, optimizer, 5, rank, processes)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "prox": prox}, checkpoint_id=folder)
    return prox.warm.calls, {name: tuple(V.shape) for name, V in prox.warm.bases.items()}


def resume(rank, processes, kind, folder, written):
    model, optimizer, prox = start(kind)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "prox": prox}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert (prox.steps, prox.applied) == (5, 2)
    assert (prox.warm.calls, {name: tuple(V.shape) for name, V in prox.warm.bases.items()}) == written
    train(model, optimizer, 5, rank, processes, start=5)
    wanted, unbroken, _ = start("single process")
    train(wanted, unbroken, 10)
    assert_same_weights(model, wanted)
    assert prox.applied == 5
    if isinstance(model, DistributedDataParallel):
        assert_same_bits([p.detach() for p in model.parameters()])


@pytest.mark.parametrize(
    ("before", "wrote", "after", "resumed"),
    [
        ("fully_shard", 2, "fully_shard", 3),
        ("fully_shard, owners", 3, "fully_shard, owners", 2),
        ("fully_shard", 3, "single process", 1),
        ("DDP", 2, "fully_shard, owners", 3),
        ("single process", 1, "DDP", 2),
    ],
)
def test_a_checkpoint_of_another_number_of_ranks(before, wrote, after, resumed, tmp_path):
    written = run(write, wrote, wrote, before, str(tmp_path / "checkpoint"))
    assert all(each == written[0] for each in written)
    run(resume, resumed, resumed, after, str(tmp_path / "checkpoint"), written[0])
