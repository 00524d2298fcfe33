"""What users would take for the SVT of one matrix instead, tau = 1, written as they would write it.

A peer takes a weight W ``[m, n]`` and the number of its singular values above tau, which a user would not know, and
returns the SVT. A warm peer takes W and V ``[n, k]``, the leading right singular vectors of the last result. None
bounds its error. ``torch.svd_lowrank`` cannot start from V: its M is subtracted from W, which gives the SVD of the
change.
"""

import numpy as np
import pyproximal
import torch
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from bench.proximal.cases import TAU

try:
    from torchao.prototype.pat.group.low_rank import SVDGrouper
    from torchao.prototype.pat.optim.nuclear_norm import ProxNuclearNorm
except ImportError:
    SVDGrouper = None

OVER = 8  # columns beyond the rank


def shrink(U, s, V):
    """SVT from the singular triplets that a peer found: U max(s - tau, 0) V^T."""
    return (U * (s - TAU).clamp_min(0)[..., None, :]) @ V.mT


def svd(W, rank=0):
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return shrink(U, s, Vh.mT)


def gram_eigh(W, rank=0, dtype=torch.float32):
    X = W if len(W) >= len(W.mT) else W.mT
    X = X.to(dtype)
    w, V = torch.linalg.eigh(X.mT @ X)
    P = (X @ (V * (1 - TAU / w.clamp_min(1e-30).sqrt()).clamp_min(0))) @ V.mT
    return (P if len(W) >= len(W.mT) else P.mT).to(W.dtype)


def gram_eigh_fp64(W, rank=0):
    return gram_eigh(W, rank, torch.float64)


def svd_lowrank(W, rank):
    return shrink(*torch.svd_lowrank(W, min(rank + 6, *W.shape), niter=2))


def sklearn_randomized(W, rank):
    U, s, Vt = map(torch.from_numpy, randomized_svd(W.numpy(), min(rank + 1, *W.shape), random_state=0))
    return shrink(U, s, Vt.mT)


def scipy_arpack(W, rank, solver="arpack"):
    if rank + 1 >= min(W.shape):  # ARPACK refuses
        return svd(W)
    U, s, Vt = (torch.from_numpy(np.ascontiguousarray(x)) for x in svds(W.numpy(), rank + 1, solver=solver, rng=0))
    return shrink(U, s, Vt.mT)


def scipy_propack(W, rank):
    return scipy_arpack(W, rank, "propack")


def pyproximal_nuclear(W, rank):
    P = pyproximal.Nuclear(W.shape, 1.0).prox(W.numpy().ravel(), TAU)
    return torch.from_numpy(P.reshape(W.shape).astype("float32"))


def torchao_pat(W, rank):
    """SVD prox map of torchao's PruneOptimizer (prototype/pat)."""
    P, prox = W.clone(), ProxNuclearNorm(reg_lambda=1.0)
    with SVDGrouper(P) as group:
        prox.apply_(group.p, TAU)
    return P


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


def warm_subspace(W, V, steps=1):
    """Subspace iteration from the last singular vectors, with QR."""
    for _ in range(steps):
        V = torch.linalg.qr(W.mT @ torch.linalg.qr(W @ V).Q).Q
    U, s, Qh = torch.linalg.svd(W @ V, full_matrices=False)
    return shrink(U, s, V @ Qh.mT)


def warm_subspace_2(W, V):
    return warm_subspace(W, V, 2)


def last_vectors(previous: list[Tensor], ranks: list[int]) -> list[Tensor]:
    """Leading right singular vectors ``[n, k]`` of the last results, OVER more than their rank."""
    return [torch.svd_lowrank(P, min(rank + OVER, *P.shape))[2] for P, rank in zip(previous, ranks, strict=True)]


PAT = (torchao_pat,) if SVDGrouper else ()
COLD = (svd, gram_eigh, gram_eigh_fp64, svd_lowrank, sklearn_randomized, scipy_arpack, scipy_propack,
        pyproximal_nuclear, *PAT, newton_schulz_clip)  # fmt: skip
WARM = (warm_subspace, warm_subspace_2)
FAST = (gram_eigh, gram_eigh_fp64, svd_lowrank, scipy_propack)  # where an SVD takes minutes
MISSING = "" if SVDGrouper else "torchao is not installed: no row torchao_pat (SVD prox map of prototype/pat)."
