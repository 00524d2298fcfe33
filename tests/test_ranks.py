"""Rank rules, the break-even rank, and numerical rank."""

import pytest
import torch

import compaware_kernels as ck
from compaware_kernels.nn.factorization import singular_values
from compaware_kernels.nn.truncation import factors
from compaware_kernels.ranks import numerical_rank

S = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (ck.ranks.threshold(1.0), 2),
        (ck.ranks.threshold(0.0), 4),
        (ck.ranks.threshold(0.3, relative=True), 2),
        (ck.ranks.nuclear(0.5), 1),
        (ck.ranks.nuclear(0.51), 2),
        (ck.ranks.nuclear(1.0), 4),
        (ck.ranks.nuclear(0.0), 0),
        (ck.ranks.energy(16 / 22), 1),
        (ck.ranks.energy(0.9), 2),
        (ck.ranks.energy(1.0), 4),
        (ck.ranks.fixed(3), 3),
        (ck.ranks.fixed(9), 5),
        (ck.ranks.share(0.5), 3),
        (ck.ranks.share(0.0), 0),
        (ck.ranks.share(1.0), 5),
    ],
    ids=lambda x: str(x),
)
def test_rule(rule, rank):
    assert rule(S) == rank and isinstance(rule(S), int)
    assert rule(S[None].expand(3, -1)) == rank
    assert ck.ranks.parse(str(rule))(S) == rank, "what a rule prints is how it is written"


def test_groups_share_the_largest_rank():
    assert ck.ranks.threshold(0.5)(torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == 2


@pytest.mark.parametrize("rule", [ck.ranks.nuclear(0.9), ck.ranks.energy(0.9), ck.ranks.threshold(0)], ids=str)
def test_zero_and_empty_spectra_have_rank_zero(rule):
    assert rule(torch.zeros(4)) == 0 and rule(torch.zeros(0)) == 0


MALFORMED = ["", "energy", "energy:", "energy:x", "magic:0.5", "energy:nan"]
OUT_OF_RANGE = [
    "energy:1.5",
    "nuclear:-1",
    "fixed:0",
    "fixed:2.5",
    "fixed:inf",
    "share:2",
    "threshold:-1",
    "threshold:inf",
]


@pytest.mark.parametrize("text", MALFORMED + OUT_OF_RANGE)
def test_bad_rule(text):
    with pytest.raises(ValueError, match=r"rank rule: wanted name:value|ranks\.\w+: wanted"):
        ck.ranks.parse(text)


def test_break_even_is_the_last_rank_that_saves():
    for m in range(1, 40):
        for n in range(1, 40):
            r = ck.ranks.break_even(m, n)
            assert r * (m + n) < m * n <= (r + 1) * (m + n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "rank"), [(32, 9, 1), (64, 64, 3), (200, 300, 40)])
def test_numerical_rank_of_a_stored_low_rank_matrix(dtype, m, n, rank):
    """Rounding to a half type fills the whole spectrum with noise; it is not counted."""
    torch.manual_seed(0)
    W = (torch.randn(m, rank).double() @ torch.randn(rank, n).double()).to(dtype)
    s = singular_values(W)
    assert s[rank] > 0 or dtype == torch.float64
    assert numerical_rank(s, dtype) == rank
    assert numerical_rank(torch.zeros(4), dtype) == 0


def test_factors_are_the_best_approximation_with_balanced_norms():
    M = torch.randn(3, 12, 8, dtype=torch.float64)
    U, V = factors(M, 3)
    s = torch.linalg.svdvals(M)
    torch.testing.assert_close(torch.linalg.matrix_norm(M - U @ V), s[:, 3:].norm(dim=-1))
    torch.testing.assert_close(torch.linalg.matrix_norm(U), torch.linalg.matrix_norm(V))


@pytest.mark.parametrize("rank", [0, 9, -1, 2.0])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match="from 1 to 8 for a 12 x 8 matrix"):
        factors(torch.randn(1, 12, 8), rank)
