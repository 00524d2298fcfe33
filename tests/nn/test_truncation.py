"""Truncated SVD by routes: ranks of an exact SVD, factors as good as its, and the route that each matrix takes."""

import pytest
import torch

from compaware_kernels import ranks
from compaware_kernels.nn import truncation
from compaware_kernels.nn.factorization import SVD, singular_values
from compaware_kernels.nn.truncation import Truncation

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RULES = [
    ranks.energy(0.9), ranks.energy(0.999), ranks.energy(1.0), ranks.nuclear(0.8), ranks.threshold(0.1),
    ranks.threshold(1e-9), ranks.threshold(0.05, relative=True), ranks.threshold(1e-6, relative=True),
    ranks.fixed(7), ranks.share(0.25), ranks.energy(0.0),
]  # fmt: skip


def matrix(m: int, n: int, kind: str, seed: int = 0) -> torch.Tensor:
    """``[1, m, n]``, fp32, with a spectrum of this kind."""
    torch.manual_seed(seed)
    if kind in ("random", "zero", "constant"):
        return {"random": torch.randn(1, m, n) / n**0.5, "zero": torch.zeros(1, m, n)}.get(
            kind, torch.full((1, m, n), 0.1)
        )
    k = min(m, n)
    i = torch.arange(1.0, k + 1)
    s = {"slow": i**-0.7, "fast": 0.7**i, "rank 5": (i <= 5) * 1.0, "tied": (i <= 30) + 1e-2}[kind]
    U, V = (torch.linalg.qr(torch.randn(size, k)).Q for size in (m, n))
    return ((U * s) @ V.mT)[None]


KINDS = ["random", "zero", "constant", "slow", "fast", "rank 5", "tied"]


@pytest.mark.parametrize("shape", [(40, 200), (150, 130), (300, 144)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_and_factors_are_those_of_an_svd_in_fp64(shape, kind, dtype):
    """The squared error of the factors is measured to be at most 1e-9 above the least one (bf16: 3e-6), beside their
    rounding to the dtype of M; LOSS is the bound."""
    M = matrix(*shape, kind).to(dtype)
    exact = SVD.of(M)
    total = float(exact.s.square().sum())
    for rule in RULES:
        found = Truncation(M)
        rank = found.rank(rule)
        assert rank == rule(exact.s), str(rule)
        rank = max(rank, 1)
        U, V = found.factors(rank, torch.float64)
        error, least = float((M.double() - U @ V).square().sum()), float(exact.s[:, rank:].square().sum())
        rounding = max(torch.finfo(dtype).eps ** 2, 1e-26) * total
        assert error <= (1 + 1e-3) * least + rounding, str(rule)
        torch.testing.assert_close(U.norm(dim=(1, 2)), V.norm(dim=(1, 2)))


@pytest.mark.parametrize("kind", ["random", "slow"])
def test_a_share_at_a_rounding_of_a_partial_sum_is_decided_by_the_svd(kind):
    """Shares that are partial sums themselves, and next to them: no bound decides, and the rank is that of the SVD."""
    M = matrix(150, 60, kind)
    s = singular_values(M)
    sums = s.square().cumsum(1)[0]
    for share in (float(sums[20] / sums[-1]), float(sums[20] / sums[-1]) * (1 - 1e-13)):
        found = Truncation(M)
        assert found.rank(ranks.energy(share)) == ranks.energy(share)(s)
        assert len(found._found) == 2, "fp32 and fp64 were tried"


@pytest.mark.parametrize(("kind", "routes"), [("fast", ["_Sketch"]), ("slow", ["_Sketch", "_Gram"])])
def test_routes(kind, routes, monkeypatch):
    """A spectrum that falls fast needs neither a Gram matrix nor an SVD; no rank needs an SVD in either case."""
    monkeypatch.setattr(SVD, "of", None)
    found = Truncation(matrix(300, 160, kind))
    rank = found.rank(ranks.energy(0.9))
    found.factors(rank, torch.float32)
    assert [kind.__name__ for kind, _ in found._found] == routes
    assert Truncation(found.M).rank(ranks.fixed(3)) == 3


def test_a_wrong_bound_would_be_seen(monkeypatch):
    """Without its bound of what is missed the sketch decides wrongly."""
    M = matrix(300, 160, "slow")
    right = ranks.energy(0.9)(SVD.of(M).s)
    spectrum = truncation._Sketch(M, M.double().square().sum((1, 2)), True).spectrum
    assert ranks.energy(0.9).decide(spectrum) is None
    blind = ranks.Spectrum(spectrum.squares, spectrum.squares.sum(1), *[torch.zeros(1, dtype=torch.float64)] * 3)
    assert ranks.energy(0.9).decide(blind) not in (None, right)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_norms(scale, dtype):
    M = matrix(80, 70, "slow").to(dtype) * scale
    found, s = Truncation(M), SVD.of(M).s
    rank = found.rank(ranks.energy(0.8))
    assert rank == ranks.energy(0.8)(s)
    U, V = found.factors(rank, torch.float64)
    assert float((M.double() - U @ V).norm() / s[0, rank:].norm()) == pytest.approx(1, abs=1e-5)


def test_groups_share_the_largest_rank_and_may_differ_in_scale():
    M = torch.cat([matrix(50, 40, "fast"), 1e-4 * matrix(50, 40, "random", 1), 0 * matrix(50, 40, "slow", 2)])
    s, found = SVD.of(M).s, Truncation(M)
    assert found.rank(ranks.energy(0.9)) == ranks.energy(0.9)(s)
    U, V = found.factors(9, torch.float64)
    torch.testing.assert_close(
        (M.double() - U @ V).square().sum((1, 2)), s[:, 9:].square().sum(1), rtol=1e-3, atol=1e-16
    )


def test_lapack_that_fails_gives_way_to_the_svd(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("did not converge")

    M = matrix(90, 70, "slow")
    s = SVD.of(M).s
    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fails)
    found = Truncation(M)
    assert found.rank(ranks.energy(0.9)) == ranks.energy(0.9)(s)
    U, V = found.factors(5, torch.float32)
    assert float((M - U @ V).square().sum()) == pytest.approx(float(s[:, 5:].square().sum()))


def test_autocast_changes_nothing():
    M = matrix(90, 70, "slow")
    plain = Truncation(M).factors(9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, Truncation(M).factors(9, torch.float32), plain))


@pytest.mark.parametrize("kind", ["random", "slow", "rank 5"])
def test_singular_values_for_error_curves(kind):
    """Energies of all truncations up to the rank to 1e-6; of a matrix of lower rank the values of an SVD."""
    M = matrix(200, 90, kind)
    s, exact = Truncation(M, vectors=False).singular_values(40), SVD.of(M).s
    energies = [x.square().flip(1).cumsum(1).flip(1)[:, :41] for x in (s, exact)]
    torch.testing.assert_close(*energies, rtol=1e-6, atol=1e-20)
