"""SVT of every layer of a network in one call against its baselines, fp32, tau = 1.

Regimes: ``warm``, weights that drifted since the last call, with its state; ``cold``, the same without a state; ``full
rank``, every singular value above tau. Every result is compared with the fp64 truth: a baseline that misses the
tolerance (1e-3 tau in the spectral norm, and the rounding of the result) is marked wrong and gets no ratio. The floor
is the time of our own products with the weights and of writing the results, at the measured rate of a large matrix
product. ``firm``: firm thresholding, gamma = 3, warm and cold, beside two of our SVTs, whose difference it is.
"""

import pytest
import torch

import compaware_kernels as ck
from bench.proximal import peers
from bench.proximal.cases import CASES, TAU, drifted, full_rank, one_batch, own_floor, svt_, truth

GAMMA = 3.0

COLD_OF = {
    "vit_b": (peers.svd, *peers.FAST),
    "4096 x 4096, rank 64": (peers.svd, *peers.FAST),
    "11008 x 4096, rank 64": peers.FAST,
    **{f"1000 of {n} x {n}": (peers.svd, *peers.PAT) for n in (16, 32, 64)},
}
FIRM = ("lenet", "resnet18", "resnet50", "1000 of 32 x 32")
FULL = (
    "lenet", "demo network", "resnet18", "resnet50", "vit_b", "1000 of 16 x 16", "1000 of 32 x 32", "1000 of 64 x 64",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_low_rank(svt_race, name):
    found = drifted(*CASES[name])
    race(svt_race, name, found.weights, found.calls, COLD_OF.get(name, peers.COLD), found)


@pytest.mark.parametrize("name", FIRM)
@torch.no_grad()
def test_firm(svt_race, name):
    found = drifted(*CASES[name], lambda Ws, state: ck.firm_svt_(Ws, TAU, GAMMA, state=state, fold=None))
    weights, states = found.weights, (ck.WarmState(), ck.WarmState())

    def svd(Ws):
        for W in Ws:
            W.copy_(firm(W))

    def two_svts(Ws):
        others = [W.clone() for W in Ws]
        for W, tau, state in zip((Ws, others), (TAU, GAMMA * TAU), states, strict=True):
            ck.svt_(W, tau, state=state, fold=None)
        torch._foreach_mul_(Ws, GAMMA)
        torch._foreach_sub_(Ws, others)
        torch._foreach_div_(Ws, GAMMA - 1)

    truths, others = [firm(W.double()) for W in weights], {"svd": svd, "two svt_, warm": two_svts}
    svt_race(f"firm, {name}", weights, truths, found.calls, others, lambda infos: own_floor(weights, infos))


def firm(W):
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * torch.minimum(GAMMA / (GAMMA - 1) * (s - TAU), s).clamp_min(0)) @ Vh


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_full_rank(svt_race, name):
    weights, scipy = full_rank(CASES[name][0]), (peers.scipy_arpack, peers.scipy_propack)  # those need a low rank
    cold = [peer for peer in COLD_OF.get(name, peers.COLD) if peer not in scipy]
    race(svt_race, name + ", full rank", weights, {"cold": lambda Ws: svt_(Ws, None)}, cold)


def race(svt_race, name, weights, ours, cold, found=None, warm=peers.WARM):
    """Race of our calls, of cold peers and, on drifted weights, of warm ones."""
    truths = [truth(W, rank) for W, rank in zip(weights, found.ranks if found else [None] * len(weights), strict=True)]
    ranks = found.ranks if found else [min(W.shape) for W in weights]
    others = {peer.__name__: each(peer, ranks) for peer in cold}
    if found:
        others |= {peer.__name__: each(peer, peers.last_vectors(found.previous, ranks)) for peer in warm}
    ours = dict(ours)
    if len({W.shape for W in weights}) == 1 and len(weights) > 1:
        others["batched svd"], ours["one batch"] = batched, one_batch
    svt_race(name, weights, truths, ours, others, lambda infos: own_floor(weights, infos))


def each(peer, known):
    """The peer on every weight in place, with what it knows of each: its rank, or its last singular vectors."""

    def run(Ws):
        for W, what in zip(Ws, known, strict=True):
            W.copy_(peer(W, what))

    return run


def batched(Ws):
    for W, P in zip(Ws, torch.unbind(peers.svd(torch.stack(Ws))), strict=True):
        W.copy_(P)
