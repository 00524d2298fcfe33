"""Folds, foldable layers of a model, and low-rank layers: exact at full rank, optimal below."""

import copy

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.folds import FOLDS, from_matrix, to_matrix
from compaware_kernels.nn.discovery import foldable_layers
from compaware_kernels.nn.registry import low_rank_type

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"groups": 2, "dilation": 2, "bias": False},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "stride": 2},
    {"padding": 2, "padding_mode": "replicate", "groups": 2},
]
CONVS = {
    "conv1d": (lambda **g: nn.Conv1d(4, 6, 3, **g), (2, 4, 13)),
    "conv2d": (lambda **g: nn.Conv2d(4, 6, (3, 5), **g), (2, 4, 13, 17)),
    "conv3d": (lambda **g: nn.Conv3d(4, 6, (3, 1, 2), **g), (2, 4, 9, 8, 7)),
}


def full_rank(layer, fold):
    return min(to_matrix(layer.weight, fold, layer.groups).shape[-2:])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("kind", CONVS)
def test_conv_is_exact_at_full_rank_and_to_dense_inverts(kind, fold, geometry):
    torch.manual_seed(0)
    make, shape = CONVS[kind]
    dense, x = make(**geometry).double(), torch.randn(shape, dtype=torch.float64)
    small = low_rank_type(dense).from_dense(dense, full_rank(dense, fold), fold)
    torch.testing.assert_close(small(x), dense(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(small.to_sequential()(x), small(x), rtol=0, atol=0)
    back = small.to_dense()
    torch.testing.assert_close(back(x), dense(x), rtol=0, atol=1e-12)
    assert back.extra_repr() == dense.extra_repr()


@pytest.mark.parametrize("fold", FOLDS)
def test_truncation_error_is_the_discarded_singular_values(fold):
    dense = nn.Conv2d(4, 6, 3, groups=2).double()
    small = ck.LowRankConv2d.from_dense(dense, 1, fold)
    M = to_matrix(dense.weight, fold, 2)
    lost = torch.linalg.svdvals(M)[:, 1:].square().sum().sqrt()
    torch.testing.assert_close((small.to_dense().weight - dense.weight).norm(), lost)


def test_linear():
    dense, x = nn.Linear(7, 5).double(), torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(ck.LowRankLinear.from_dense(dense, 5)(x), dense(x))
    small = ck.LowRankLinear.from_dense(dense, 2)
    torch.testing.assert_close(small(x), small.to_dense()(x))
    assert "rank=2" in repr(small) and small.first.weight.shape == (2, 7)


def test_factor_kernels_of_each_fold():
    dense = nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(1, 2))
    kernels = {
        fold: [c.kernel_size for c in ck.LowRankConv2d.from_dense(dense, 2, fold).to_sequential()] for fold in FOLDS
    }
    assert kernels == {"paper": [(3, 5), (1, 1)], "spatial": [(1, 5), (3, 1)], "input": [(1, 1), (3, 5)]}


def test_from_dense_keeps_training_mode_dtype_and_requires_grad():
    dense = nn.Conv2d(4, 8, 3, dtype=torch.bfloat16).requires_grad_(False).eval()
    small = ck.LowRankConv2d.from_dense(dense, 2)
    assert not small.training and not any(p.requires_grad for p in small.parameters())
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    trained = ck.LowRankLinear.from_dense(nn.Linear(4, 4), 2)
    trained(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_copies_and_state_dicts():
    small = ck.LowRankConv2d.from_dense(nn.Conv2d(4, 8, 3), 2, "spatial")
    other = ck.LowRankConv2d(4, 8, 3, 2, fold="spatial")
    other.load_state_dict(copy.deepcopy(small).state_dict())
    x = torch.randn(1, 4, 9, 9)
    assert torch.equal(small(x), other(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ck.LowRankLinear(4, 8, 5), "from 1 to 4 for a 8 x 4 matrix; got 5"),
        (lambda: ck.LowRankConv2d(4, 8, 3, 9), "from 1 to 8 for a 8 x 36 matrix; got 9"),
        (lambda: ck.LowRankConv2d(4, 8, 3, 2, fold="crane"), "paper, spatial, input; got 'crane'"),
        (lambda: ck.LowRankLinear.from_dense(nn.Linear(4, 4), 2, fold="crane"), "got 'crane'"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_layer_type():
    with pytest.raises(TypeError, match="wants a Conv2d; got Conv1d"):
        ck.LowRankConv2d.from_dense(nn.Conv1d(2, 2, 1), 1)


# --- folds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize(("shape", "groups"), [((6, 4), 1), ((6, 4, 3), 1), ((6, 2, 3, 5), 2), ((6, 4, 2, 3, 5), 3)])
def test_from_matrix_inverts_to_matrix(shape, groups, fold):
    W = torch.randn(shape)
    M = to_matrix(W, fold, groups)
    assert M.ndim == 3 and M.shape[0] == groups
    assert torch.equal(from_matrix(M, shape, fold), W)


def test_fold_entries():
    """The definition, entry by entry: rows are (o, first k kernel axes), columns (c, other kernel axes)."""
    W = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    o, c, i, j = 1, 2, 3, 4
    assert to_matrix(W, "paper")[0, o, (c * 4 + i) * 5 + j] == W[o, c, i, j]
    assert to_matrix(W, "spatial")[0, o * 4 + i, c * 5 + j] == W[o, c, i, j]
    assert to_matrix(W, "input")[0, (o * 4 + i) * 5 + j, c] == W[o, c, i, j]


def test_layers_that_do_not_fold_are_listed_with_a_reason():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({
        "conv": nn.Conv2d(3, 4, 3), "table": nn.Embedding(5, 4), "pairs": nn.Bilinear(4, 4, 2),
        "norm": nn.BatchNorm2d(4), "lstm": nn.LSTM(4, 4), "attention": nn.MultiheadAttention(4, 2), "a": shared,
        "b": nn.Linear(4, 4),
        "para": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "lazy": nn.LazyLinear(3),
        "head": nn.Linear(4, 2),
    })  # fmt: skip
    model["b"].weight = shared.weight
    layers, skipped = foldable_layers(model, skip=["he*"])
    assert [layer.name for layer in layers] == ["conv", "attention.out_proj", "a"]
    assert set(skipped) == {"table", "pairs", "lstm", "attention", "b", "para", "lazy", "head"}
    assert skipped["b"] == "shares its weight with a" and skipped["head"] == "skipped by name"
    assert "parametrized" in skipped["para"] and "not initialized" in skipped["lazy"]
    assert skipped["pairs"] == "Bilinear: only Linear and (transposed) convolutions fold to matrices"


def test_a_skip_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'hed' matches no layer; layers: 0"):
        foldable_layers(nn.Sequential(nn.Linear(2, 2)), skip=["hed"])
