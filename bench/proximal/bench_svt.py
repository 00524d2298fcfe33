"""SVT of every layer of a network in one call against its baselines, fp32, tau = 1.

Regimes: ``warm``, weights that drifted since the last call, with its state; ``cold``, the same without a state; ``full
rank``, every singular value above tau. Every result is compared with the fp64 truth: a baseline that misses the
tolerance
(1e-3 tau in the spectral norm, and the rounding of the result) is marked wrong and gets no ratio. The floor is the time
of our own products with the weights and of writing the results, at the measured rate of a large matrix product.
``firm``: firm thresholding, gamma = 3, warm and cold, beside two of our SVTs, whose difference it is.
"""

import pyproximal
import pytest
import torch
from sklearn.utils.extmath import randomized_svd

import compaware_kernels as ck
from bench.proximal.cases import CASES, TAU, full_rank, product_rate, regimes

GAMMA = 3.0


def shrink(U, s, V):
    """SVT from the singular triplets that a baseline found: U max(s - tau, 0) V^T."""
    return (U * (s - TAU).clamp_min(0)[..., None, :]) @ V.mT


def svd(W, rank):
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return shrink(U, s, Vh.mT)


def gram_eigh(W, rank, dtype=torch.float32):
    X = W if len(W) >= len(W.mT) else W.mT
    X = X.to(dtype)
    w, V = torch.linalg.eigh(X.mT @ X)
    P = (X @ (V * (1 - TAU / w.clamp_min(1e-30).sqrt()).clamp_min(0))) @ V.mT
    return (P if len(W) >= len(W.mT) else P.mT).to(W.dtype)


def gram_eigh_fp64(W, rank):
    return gram_eigh(W, rank, torch.float64)


def svd_lowrank(W, rank):
    """SVT by torch.svd_lowrank at the true rank, which a user would not know."""
    return shrink(*torch.svd_lowrank(W, min(rank + 6, *W.shape), niter=2))


def sklearn_randomized(W, rank):
    U, s, Vt = map(torch.from_numpy, randomized_svd(W.numpy(), min(rank + 1, *W.shape), random_state=0))
    return shrink(U, s, Vt.mT)


def pyproximal_nuclear(W, rank):
    P = pyproximal.Nuclear(W.shape, 1.0).prox(W.numpy().ravel(), TAU)
    return torch.from_numpy(P.reshape(W.shape).astype("float32"))


def newton_schulz_clip(W, rank):
    """SVT as X - cap(X), cap(X) = (X + O - (X - O) sign(X - O)^T O) / 2 with O = polar(X), polars by Newton-Schulz."""

    def polar(X):
        X = X / X.norm()
        for _ in range(15):
            A = X @ X.mT
            X = 1.875 * X + (-1.25 * A + 0.375 * A @ A) @ X
        return X

    X = (W if len(W) <= len(W.mT) else W.mT) / TAU
    O = polar(X)
    P = X - (X + O - (X - O) @ (polar(X - O).mT @ O)) / 2
    return TAU * (P if len(W) <= len(W.mT) else P.mT)


PEERS = (svd, gram_eigh, gram_eigh_fp64, svd_lowrank, sklearn_randomized, pyproximal_nuclear, newton_schulz_clip)
FAST = (gram_eigh, gram_eigh_fp64, svd_lowrank)  # the only baselines where an SVD takes minutes

PEERS_OF = {
    "vit_b": (svd, *FAST),
    "4096 x 4096, rank 64": (svd, *FAST),
    "11008 x 4096, rank 64": FAST,
    **{f"1000 of {n} x {n}": PEERS[:1] for n in (16, 32, 64)},
}
FIRM = ("lenet", "resnet18", "resnet50", "1000 of 32 x 32")
FULL = ("lenet", "resnet18", "resnet50", "vit_b", "1000 of 16 x 16", "1000 of 32 x 32", "1000 of 64 x 64")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_low_rank(svt_race, name):
    weights, ours = regimes(*CASES[name])
    race(svt_race, name, weights, ours, PEERS_OF.get(name, PEERS))


@pytest.mark.parametrize("name", FIRM)
@torch.no_grad()
def test_firm(svt_race, name):
    weights, ours = regimes(*CASES[name], lambda Ws, state: ck.firm_svt_(Ws, TAU, GAMMA, state=state, fold=None))
    states = ck.WarmState(), ck.WarmState()

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

    truths, peers = [firm(W.double()) for W in weights], {"svd": svd, "two svt_, warm": two_svts}
    svt_race(f"firm, {name}", weights, truths, ours, peers, lambda infos: floor(weights, infos))


def firm(W):
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U * torch.minimum(GAMMA / (GAMMA - 1) * (s - TAU), s).clamp_min(0)) @ Vh


@pytest.mark.parametrize("name", FULL)
@torch.no_grad()
def test_full_rank(svt_race, name):
    weights = full_rank(CASES[name][0])
    ours = {"cold": lambda Ws: ck.svt_(Ws, TAU, fold=None)}
    race(svt_race, name + ", full rank", weights, ours, PEERS_OF.get(name, PEERS))


def race(svt_race, name, weights, ours, peers):
    truths = [truth(W) for W in weights]
    ranks = [int((torch.linalg.svdvals(P) > 1e-9).sum()) if min(P.shape) < 1500 else 64 for P in truths]

    def each(peer):
        return lambda Ws: [W.copy_(peer(W, rank)) for W, rank in zip(Ws, ranks, strict=True)] and None

    def batched(Ws):
        for W, P in zip(Ws, torch.unbind(svd(torch.stack(Ws), 0)), strict=True):
            W.copy_(P)

    def one_batch(Ws):
        X = torch.stack(Ws)
        (info,) = ck.svt_([X], TAU, fold=None)
        torch._foreach_copy_(Ws, X.unbind())
        parts = zip(info.rank, info.s, info.error_bound, strict=True)
        return [ck.SvtInfo(*part, info.method, info.reason) for part in parts]

    peers = {peer.__name__: each(peer) for peer in peers}
    if len({W.shape for W in weights}) == 1 and len(weights) > 1:
        peers["batched svd"], ours["one batch"] = batched, one_batch
    svt_race(name, weights, truths, ours, peers, lambda infos: floor(weights, infos))


def truth(W):
    if min(W.shape) < 1500:
        return svd(W.double(), 0)
    return gram_eigh_fp64(W.double(), 0)  # exact to 1e-10 at these ratios, and minutes faster


def floor(weights, infos) -> float:
    """Milliseconds of the products with the weights and of writing the results."""
    flops = 0
    for W, info in zip(weights, infos, strict=True):
        columns = int(info.reason.split()[2]) if info.method.startswith("subspace") else 2 * min(W.shape)
        flops += 2 * W.numel() * (columns + min(int(info.rank.max()), min(W.shape) // 2))
    return 1e3 * flops / product_rate()
