"""A rank that dies or raises during a proximal step: the others raise soon, and their weights are unchanged."""

import os
import signal
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import compaware_kernels as ck
from compaware_kernels.distributed.dtensor import local
from compaware_kernels.proximal import solver
from tests.helpers.processes import run
from tests.training.test_distributed import PENALTIES, fsdp_model, full, network

MODELS = {
    "DDP": (lambda: DistributedDataParallel(network()), "owner"),
    "fully_shard": (fsdp_model, "auto"),
    "owners": (fsdp_model, "owner"),
}


def die_at(calls, collective, how):
    """Let this process end at the ``calls``-th call of a collective from now on."""
    original, left = getattr(dist, collective), [calls]

    def dying(*args, **more):
        left[0] -= 1
        if left[0] == 0:
            how()
        return original(*args, **more)

    setattr(dist, collective, dying)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(3)


def survivor(rank, kind, collective, calls, how):
    build, division = MODELS[kind]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prox = ck.ProximalStep(model, optimizer, **PENALTIES, division=division)
    before = [local(p.detach()).clone() for p in model.parameters()]
    if rank == 1:
        die_at(calls, collective, how)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"^proximal step: failed here, or lost another process; no weight was changed"
    ):
        prox.step()
    assert all(torch.equal(local(p.detach()), old) for p, old in zip(model.parameters(), before, strict=True))
    assert prox.applied == 0 and not prox.warm.bases
    return time.monotonic() - start


@pytest.mark.parametrize("how", [kill, leave])
@pytest.mark.parametrize(
    ("kind", "collective", "calls"),
    [
        ("DDP", "all_reduce", 1),
        ("DDP", "broadcast", 1),
        ("DDP", "broadcast", 2),
        ("fully_shard", "all_reduce", 9),
        ("owners", "all_to_all_single", 1),
        ("owners", "all_to_all_single", 2),
    ],
)
def test_a_rank_that_dies_makes_the_others_raise_soon(kind, collective, calls, how):
    first, dead, third = run(survivor, 3, kind, collective, calls, how)
    assert dead is None and max(first, third) < 30


def one_raises(rank):
    """An exception on one rank, which stays alive."""
    model = DistributedDataParallel(network())
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), **PENALTIES, division="owner")
    before = [full(p).clone() for p in model.parameters()]
    shrink_ = mock.Mock(side_effect=ZeroDivisionError("division by zero")) if rank == 1 else solver.shrink_
    with (
        mock.patch.object(solver, "shrink_", shrink_),
        pytest.raises(ZeroDivisionError, match="division by zero"),
    ):
        prox.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_an_error_on_one_rank_is_raised_on_all():
    run(one_raises, 3)
