"""gram_eigh, the leading eigenpairs of X^T X of a list of matrices: kernel and reference body against LAPACK."""

import pytest
import torch

import compaware_kernels as ck
from compaware_kernels.ops import library, linalg

kernel = pytest.mark.skipif(bool(library.missing), reason=f"no C++ kernel: {library.missing}")
gram_eigh, fp64 = torch.ops.compaware.gram_eigh, torch.float64
BODIES = [pytest.param(gram_eigh, id="kernel", marks=kernel), pytest.param(linalg.gram_eigh._init_fn, id="reference")]
LIMIT = 8  # of all errors in units of u trace(G), measured: up to 4.2; orthonormality in units of n u: up to 1.5


def wilkinson(n):
    """Tridiagonal matrix of size 2 n + 1 whose eigenvalues come in pairs that agree to machine precision."""
    ones = torch.ones(2 * n, dtype=fp64)
    return torch.diag((torch.arange(2 * n + 1, dtype=fp64) - n).abs()) + torch.diag(ones, 1) + torch.diag(ones, -1)


def cases():
    torch.manual_seed(0)
    shapes = [(1, 1), (3, 2), (2, 3), (6, 25), (16, 150), (120, 400), (84, 120), (64, 64), (130, 33)]
    clusters = torch.tensor([5.0] * 30 + [3.0] * 30 + [2.0 + 1e-6] * 20 + [0.5] * 20, dtype=fp64)
    Q = torch.linalg.qr(torch.randn(100, 100, dtype=fp64)).Q
    one = torch.zeros(80, 60)
    one[3, 5], one[4, 5] = 7, 1e-9
    return {
        **{f"gaussian {shape}": torch.randn(shape) for shape in shapes},
        "strided": torch.randn(90, 140, dtype=fp64)[::2, ::3].mT,
        "identity": 3 * torch.eye(90), "all ones": torch.ones(50, 70), "one entry": one,
        "clusters, diagonal": torch.diag(clusters), "clusters": Q * clusters @ Q.mT,
        "graded": torch.logspace(2, -8, 90, dtype=fp64)[:, None] * torch.randn(90, 90, dtype=fp64),
        "pairs": wilkinson(10), "pairs of blocks": torch.block_diag(*[wilkinson(10)] * 4),
        "blocks": torch.block_diag(*torch.randn(15, 4, 3)), "copies": torch.kron(torch.eye(8), torch.randn(12, 10)),
    }  # fmt: skip


@pytest.mark.parametrize("eigh", BODIES)
@pytest.mark.parametrize("floor", [0.0, 1.0, 30.0])
def test_eigenpairs(eigh, floor):
    X = list(cases().values())
    values, vectors, residuals = eigh(X, torch.full((len(X),), floor, dtype=fp64))
    parts = vectors.split([min(x.shape) ** 2 for x in X])
    for name, x, w, V, residual in zip(cases(), X, values, parts, residuals.tolist(), strict=True):
        x, k = (x if x.shape[0] >= x.shape[1] else x.mT).double(), min(x.shape)
        G = x.mT @ x
        truth, unit = torch.linalg.eigvalsh(G).flip(0), float(G.trace()) * 2.0**-53
        near = (truth - floor).abs() <= LIMIT * unit  # may count as above, or not
        r = int((w > 0).sum())
        assert int((truth > floor)[~near].sum()) <= r <= int(((truth > floor) | near).sum()), name
        w, V = w[:r], V.view(k, k)[:r].mT
        assert bool(((w - truth[:r]).abs() <= LIMIT * unit).all()), name
        assert residual <= LIMIT * unit and float((G @ V - V * w).norm()) <= LIMIT * unit, name
        assert float((V.mT @ V - torch.eye(r, dtype=fp64)).norm()) <= 3 * max(8, k) * 2.0**-53, name


@kernel
def test_neither_the_list_nor_the_threads_change_a_bit():
    X, threads = list(cases().values()), torch.get_num_threads()
    floor = torch.ones(len(X), dtype=fp64)
    try:
        together = [gram_eigh(X, floor) for count in (1, 2, 3) if torch.set_num_threads(count) is None]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in together[1:] for a, b in zip(other, together[0], strict=True))
    start = 0
    for x, w in zip(X, together[0][0], strict=True):
        k = min(x.shape)
        own, V, _ = gram_eigh([x], floor[:1])
        assert torch.equal(own[0], w[:k]) and torch.equal(V, together[0][1][start : start + k * k])
        start += k * k


@kernel
def test_nan_and_empty_matrices_and_refusals():
    bad = torch.randn(12, 9)
    bad[3, 4] = float("nan")
    w, _, residuals = gram_eigh([torch.eye(4), bad, torch.empty(0, 3)], torch.ones(3, dtype=fp64) / 2)
    assert w[0].tolist() == [1.0] * 4 + [0.0] * 5 and residuals[0] < 1e-14 and w[2].sum() == 0
    for X, floor in (([torch.eye(3)], torch.ones(1)), ([torch.eye(3)], torch.ones(2, dtype=fp64))):
        with pytest.raises(RuntimeError, match="floor: wanted one fp64 number per matrix"):
            gram_eigh(X, floor)
    with pytest.raises(RuntimeError, match="X: wanted fp64 or fp32"):
        gram_eigh([torch.eye(3).half()], torch.ones(1, dtype=fp64))


def test_where_the_kernel_fails_lapack_serves(monkeypatch):
    """Eigenvectors whose residual is too large are never used."""
    from compaware_kernels.proximal import gram_list

    def wrong(X, floor):
        w, V, residuals = linalg.gram_eigh._init_fn(X, floor)
        return w, torch.zeros_like(V), torch.full_like(residuals, float("nan"))

    W = [torch.randn(40, 30), torch.randn(25, 60)]
    truths = [ck.svt(M.double(), 2.0) for M in W]
    monkeypatch.setattr(gram_list.torch.ops.compaware, "gram_eigh", wrong)
    for M, truth, info in zip(W, truths, ck.svt_(W, 2.0), strict=True):
        assert info.method == "gram, fp64" and float((M - truth).norm()) <= float(info.error_bound)


@pytest.mark.parametrize("dtype", [torch.float32, fp64, torch.bfloat16, torch.float16], ids=str)
def test_one_list_of_every_kind(dtype):
    """Square, wide, tall and batched weights, with a center: svt_, firm_svt_ and spectral_ball_ against fp64."""
    torch.manual_seed(0)
    W = [torch.randn(shape).to(dtype) for shape in ((40, 40), (20, 90), (90, 20), (2, 3, 50, 30), (5, 6))]
    C = [torch.randn(M.shape).to(dtype) for M in W]
    tau, exact = 4.0, [M.double() for M in W]
    steps = {
        "svt": (lambda X: ck.svt_(X, tau, center=C, fold=None), lambda X, D: D + ck.svt(X - D, tau)),
        "firm": (lambda X: ck.firm_svt_(X, tau, 2.0, fold=None), lambda X, D: ck.firm_svt(X, tau, 2.0)),
        "ball": (lambda X: ck.spectral_ball_(X, tau, fold=None), lambda X, D: X - ck.svt(X, tau)),
    }
    for name, (step, truth) in steps.items():
        X = [M.clone() for M in W]
        for M, before, D, info in zip(X, exact, C, step(X), strict=True):
            error = torch.linalg.matrix_norm(M.double() - truth(before, D.double()))
            assert bool((error <= info.error_bound).all()), (name, M.shape)
            assert info.method.startswith("gram, fp64") and info.s.shape == (*M.shape[:-2], min(M.shape[-2:])), info
            assert torch.equal(info.rank, (info.s > 0).sum(-1))
