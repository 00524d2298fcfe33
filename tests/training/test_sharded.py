"""Sharded weights: the result of unsharded ones within the error bound, without gathering."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import compaware_kernels as ck
from compaware_kernels.proximal.error_bounds import storage
from tests.helpers.cases import low_rank
from tests.helpers.oracle import svt
from tests.helpers.processes import run

TAU = 1.0
MATRICES = {  # m, n, rank; one for each route of the solver
    "subspace, tall": (700, 331, 12),
    "subspace, wide": (331, 700, 12),
    "Gram": (90, 70, 40),
    "fewer rows than processes": (3, 50, 2),
    "one column": (50, 1, 1),
    "square, odd": (101, 101, 20),
}


def mesh_of(*sizes):
    return init_device_mesh("cpu", sizes)


def sharded(W, mesh, placements):
    return distribute_tensor(W.clone(), mesh, placements)


def assert_within_bounds(D, info, truth, s, tau, tol):
    """Check the error against the returned bound, and against tol tau plus the rounding of the storage dtype.

    s: the singular values of the truth.
    """
    error = D.full_tensor().double() - truth
    assert float(error.norm()) <= float(info.error_bound)
    stored = storage(D.dtype, float(truth.norm()), truth.numel())
    assert float(torch.linalg.matrix_norm(error, 2)) <= tol * tau + stored
    assert int(info.rank) == int((s > 1e-9 * s[0]).sum())


def sharded_equals_unsharded(rank, processes):
    """Two calls, cold and warm started; the bases must be equal on all ranks."""
    mesh = mesh_of(processes)
    for name, (m, n, r) in MATRICES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            W = low_rank(m, n, r).to(dtype)
            truth = torch.from_numpy(svt(W.double().numpy(), TAU))
            s = torch.linalg.svdvals(truth)
            for placement in (Shard(0), Shard(1), Replicate()):
                state = ck.WarmState()
                for _ in range(2):
                    D = sharded(W, mesh, [placement])
                    (info,) = ck.svt_([D], TAU, state=state, names=[name])
                    assert_within_bounds(D, info, truth, s, TAU, 1e-3)
                    assert info.name == name and info.s.shape[-1] == min(m, n)
                    assert info.method.startswith("subspace") == name.startswith("subspace")
                for V in state.bases.values():
                    gathered = [torch.empty_like(V) for _ in range(processes)]
                    dist.all_gather(gathered, V.contiguous())
                    assert all(torch.equal(V, other) for other in gathered)


def other_operators(rank, processes):
    mesh, tau = mesh_of(processes), 0.5
    W, C = low_rank(200, 77, 6), 0.1 * low_rank(200, 77, 3, seed=5)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    weights = torch.linspace(0.2, 3.0, 77, dtype=torch.float64)
    for placement in (Shard(0), Shard(1)):
        D = sharded(W, mesh, [placement])
        ck.spectral_ball_([D], tau)
        torch.testing.assert_close(D.full_tensor(), (U * s.clamp_max(tau)) @ Vh, rtol=0, atol=1e-3 * tau)
        D = sharded(W, mesh, [placement])
        ck.truncate_([D], 4)
        torch.testing.assert_close(D.full_tensor(), (U[:, :4] * s[:4]) @ Vh[:4], rtol=0, atol=1e-3 * float(s[3]))
        D = sharded(W, mesh, [placement])
        ck.weighted_svt_([D], [weights])
        torch.testing.assert_close(D.full_tensor(), (U * (s - weights).clamp_min(0)) @ Vh, rtol=0, atol=1e-3 * 0.2)
        D = sharded(W, mesh, [placement])
        ck.svt_([D], tau, center=[sharded(C, mesh, [placement])])
        truth = C + torch.from_numpy(svt((W - C).numpy(), tau))
        torch.testing.assert_close(D.full_tensor(), truth, rtol=0, atol=1e-3 * tau)
        D = sharded(W, mesh, [placement])
        ck.svt_([D], 1e-8)  # only a QR factorization is accurate enough for this threshold
        truth = torch.from_numpy(svt(W.numpy(), 1e-8))
        torch.testing.assert_close(D.full_tensor(), truth, rtol=0, atol=1e-11)
        D = sharded(W, mesh, [placement])
        (info,) = ck.svt_([D], 1e4)
        assert info.method == "zero" and not D.full_tensor().any()
        for shrink_, shrink in (
            (ck.group_shrink_, ck.group_shrink),
            (ck.soft_threshold_, ck.soft_threshold),
        ):
            D = sharded(W, mesh, [placement])
            shrink_([D], tau)
            torch.testing.assert_close(D.full_tensor(), shrink(W, tau))
        D = sharded(W, mesh, [placement])
        ck.sparse_group_shrink_([D], 0.1, tau)
        torch.testing.assert_close(D.full_tensor(), ck.sparse_group_shrink(W, 0.1, tau))


def convolutions(rank, processes):
    mesh = mesh_of(processes)
    generator = torch.Generator().manual_seed(0)
    for shape, groups in (((10, 6, 3, 3), 1), ((12, 5, 3), 1), ((12, 2, 3, 3), 3), ((7, 1, 3, 3), 7)):
        W = torch.randn(shape, generator=generator)
        for fold in ck.folds.FOLDS:
            truth = W.double()
            ck.svt_([truth], 0.7, fold=fold, groups=[groups])
            for dim in (0, 1):
                for memory in (torch.contiguous_format, torch.channels_last):
                    if memory == torch.channels_last and len(shape) != 4:
                        continue
                    D = sharded(W, mesh, [Shard(dim)])
                    D = D.to_local().to(memory_format=memory)
                    D = torch.distributed.tensor.DTensor.from_local(
                        D, mesh, [Shard(dim)], shape=W.shape, stride=W.stride()
                    )
                    (info,) = ck.svt_([D], 0.7, fold=fold, groups=[groups])
                    error = D.full_tensor().double() - truth
                    assert float(error.norm()) <= float(info.error_bound.norm()) + 1e-6, (shape, fold, dim, memory)


def nan_on_the_last_rank(rank, processes):
    """NaN in the shard of the last rank raises on all ranks and changes nothing; errors name the layer."""
    mesh = mesh_of(processes)
    weights = [sharded(low_rank(8 * processes, 9, 3), mesh, [Shard(0)]) for _ in range(3)]
    if rank == processes - 1:
        weights[1].to_local()[0, 0] = math.nan
    before = [W.to_local().clone() for W in weights]
    state = ck.WarmState()
    with pytest.raises(ValueError, match=r"^fc2: contains NaN; nothing was changed"):
        ck.svt_(weights, 0.1, state=state, names=["fc1", "fc2", "fc3"])
    with pytest.raises(ValueError, match=r"^fc2: contains NaN"):
        ck.group_shrink_(weights, 0.1, names=["fc1", "fc2", "fc3"])
    for W, old in zip(weights, before, strict=True):
        assert torch.equal(W.to_local().view(torch.int64), old.view(torch.int64))
    assert state.calls == 0
    with pytest.raises(ValueError, match="center of fc1: wanted"):
        ck.svt_(weights[:1], 0.1, center=[weights[0].full_tensor()], names=["fc1"])
    with pytest.raises(ValueError, match=r"sharded along its outputs or inputs; got \(Shard\(dim=2\)"):
        ck.svt_([sharded(torch.randn(4, 4, 4), mesh, [Shard(2)])], 0.1)


def on_a_two_dimensional_mesh(rank):
    """FSDP x tensor parallel: shards of rows and columns in either order, of rows twice, and replicated shards."""
    mesh = mesh_of(2, 2)
    for m, n in ((303, 120), (120, 303), (5, 3)):
        W = low_rank(m, n, 2)
        truth = torch.from_numpy(svt(W.numpy(), TAU))
        s = torch.linalg.svdvals(truth)
        for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)], [Replicate(), Shard(1)],
                           [Shard(1), Shard(1)]):  # fmt: skip
            state = ck.WarmState()
            for _ in range(2):
                D = sharded(W, mesh, placements)
                (info,) = ck.svt_([D], TAU, state=state)
                assert_within_bounds(D, info, truth, s, TAU, 1e-3)
            D = sharded(W, mesh, placements)
            ck.group_shrink_([D], TAU)
            torch.testing.assert_close(D.full_tensor(), ck.group_shrink(W, TAU))


@pytest.mark.parametrize("processes", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_equals_unsharded(processes):
    run(sharded_equals_unsharded, processes, processes)


@pytest.mark.parametrize("work", [other_operators, convolutions, nan_on_the_last_rank])
def test_three_processes(work):
    run(work, 3, 3)


def test_on_a_two_dimensional_mesh():
    run(on_a_two_dimensional_mesh, 4)
