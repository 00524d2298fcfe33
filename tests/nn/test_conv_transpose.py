"""Low-rank transposed convolutions: exact at full rank, optimal below; proximal steps, compression, checkpoints."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression.dead_neurons import remove_dead_neurons
from compaware_kernels.folds import FOLDS, oriented, row_axes
from compaware_kernels.nn.discovery import Layer
from compaware_kernels.nn.registry import low_rank_type

compress_for_size = partial(ck.compress, goal="size")  # factorizes small layers, too

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"groups": 2, "stride": 3, "bias": False},
    {"groups": 2, "dilation": 2, "padding": 2, "stride": 2, "output_padding": 1},
]
KINDS = {
    "1d": (lambda **g: nn.ConvTranspose1d(4, 6, 3, **g), (2, 4, 7)),
    "2d": (lambda **g: nn.ConvTranspose2d(4, 6, (3, 5), **g), (2, 4, 5, 7)),
    "3d": (lambda **g: nn.ConvTranspose3d(4, 6, (3, 1, 2), **g), (2, 4, 4, 5, 3)),
}
folds = pytest.mark.parametrize("fold", FOLDS)


def matrix(layer, fold):
    return Layer("", layer).matrix(fold).detach()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@folds
@pytest.mark.parametrize("kind", KINDS)
def test_exact_at_full_rank_and_to_dense_inverts(kind, fold, geometry):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    dense, x = make(**geometry).double(), torch.randn(shape, dtype=torch.float64)
    small = low_rank_type(dense).from_dense(dense, min(matrix(dense, fold).shape[-2:]), fold)
    for one in (x, x[0]):  # a batch, and one unbatched input
        torch.testing.assert_close(small(one), dense(one), rtol=0, atol=1e-12)
        assert torch.equal(small.to_sequential()(one), small(one))
    back = small.to_dense()
    torch.testing.assert_close(back(x), dense(x), rtol=0, atol=1e-12)
    assert back.extra_repr() == dense.extra_repr()


@folds
@pytest.mark.parametrize("groups", (1, 2))
def test_truncation_error_is_the_discarded_singular_values(fold, groups):
    dense = nn.ConvTranspose2d(4, 6, 3, groups=groups).double()
    small = ck.LowRankConvTranspose2d.from_dense(dense, 1, fold)
    lost = torch.linalg.svdvals(matrix(dense, fold))[:, 1:].square().sum().sqrt()
    torch.testing.assert_close((small.to_dense().weight - dense.weight).norm(), lost)


def test_oriented_weight_entries():
    """Entry by entry: W[o, c] of group g is stored at [g C/G + c, o]; ``oriented`` is its own inverse."""
    W = torch.arange(6 * 2 * 3).reshape(6, 2, 3)  # C = 6, O = 4, two groups
    rows = oriented(W, nn.ConvTranspose1d, 2)
    assert rows.shape == (4, 3, 3)
    assert all(torch.equal(rows[2 * g + o, c], W[3 * g + c, o]) for g in range(2) for o in range(2) for c in range(3))
    assert torch.equal(oriented(rows, nn.ConvTranspose1d, 2), W)
    assert oriented(W, nn.Conv1d, 2) is W


def test_factors_of_each_fold():
    dense = nn.ConvTranspose2d(8, 16, (3, 5), stride=(2, 3), padding=(1, 2), output_padding=(1, 0))
    factors = {fold: list(ck.LowRankConvTranspose2d.from_dense(dense, 2, fold).to_sequential()) for fold in FOLDS}
    kinds = {fold: [type(f) for f in pair] for fold, pair in factors.items()}
    transposed, plain = nn.ConvTranspose2d, nn.Conv2d
    assert kinds == {"paper": [transposed, plain], "spatial": [transposed, transposed], "input": [plain, transposed]}
    assert [f.kernel_size for f in factors["spatial"]] == [(1, 5), (3, 1)]
    assert [f.output_padding for f in factors["spatial"]] == [(0, 0), (1, 0)]
    assert [f.stride for f in factors["input"]] == [(1, 1), (2, 3)]


@folds
def test_output_size(fold):
    dense, x = nn.ConvTranspose2d(4, 6, (3, 5), stride=(2, 3)).double(), torch.randn(2, 4, 5, 7, dtype=torch.float64)
    small = ck.LowRankConvTranspose2d.from_dense(dense, min(matrix(dense, fold).shape[-2:]), fold)
    for size in ([11, 23], [12, 25], torch.Size([2, 6, 12, 24])):
        torch.testing.assert_close(small(x, output_size=size), dense(x, output_size=size), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="output size"):
        small(x, output_size=[40, 23])


@folds
def test_multiply_adds_of_each_fold(fold):
    """The multiply-adds in the table of the class's docstring."""
    C, O, r, n, s, K = 8, 6, 2, 20, 4, 12
    model = nn.Sequential(ck.LowRankConvTranspose2d(C, O, (3, 4), r, stride=2, padding=(1, 1), output_padding=(1, 0),
                                                    fold=fold))  # fmt: skip
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        assert model(torch.randn(1, C, 4, 5)).shape == (1, O, 8, 10)
    wanted = {"paper": n * r * (C * K + s * O), "input": n * r * (C + O * K)}
    assert fold == "spatial" or counter.get_total_flops() == 2 * wanted[fold]


def test_extra_repr_why_two_step_activation_and_residual():
    small = ck.LowRankConvTranspose2d(8, 4, 4, 2, stride=2, padding=1, fold="input")
    wanted = "8, 4, kernel_size=(4, 4), fold=input, groups=1, rank=2, weights=144 of 512 (28%)"
    assert small.extra_repr() == wanted and small.why_two_step(torch.randn(1, 8, 3, 3)).startswith("transposed")
    small.activation = "relu"
    x = torch.randn(1, 8, 3, 3)
    residual = torch.randn_like(small(x))
    wanted = (small.to_sequential()[:2](x) + residual).relu()
    assert torch.equal(small(x, residual=residual), wanted) and torch.equal(small.eval()(x, None, residual), wanted)


def test_loads_state_dicts_of_the_dense_layer_and_of_the_sequential():
    dense = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    x = torch.randn(1, 4, 5, 5)
    for fold in FOLDS:
        small = ck.LowRankConvTranspose2d.from_dense(dense, 2, fold)
        for state in (small.state_dict(), small.to_sequential().state_dict(), dense.state_dict()):
            other = ck.LowRankConvTranspose2d.like(dense, 2, fold)
            other.load_state_dict(state)
            torch.testing.assert_close(other(x), small(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ck.LowRankConvTranspose2d(4, 8, 3, 9), "from 1 to 8 for a 8 x 36 matrix; got 9"),
        (lambda: ck.LowRankConvTranspose2d(4, 8, 3, 5, fold="input"), "from 1 to 4 for a 72 x 4 matrix; got 5"),
        (lambda: ck.LowRankConvTranspose2d(4, 8, 3, 2, fold="crane"), "paper, spatial, input; got 'crane'"),
        (lambda: ck.LowRankConvTranspose2d(4, 8, 3, 2, padding_mode="reflect"), "zeros"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_layer_type():
    with pytest.raises(TypeError, match="wants a ConvTranspose2d; got Conv2d"):
        ck.LowRankConvTranspose2d.from_dense(nn.Conv2d(2, 2, 1), 1)
    with pytest.raises(TypeError, match=r"wanted Linear, .*ConvTranspose3d; got BatchNorm1d"):
        low_rank_type(nn.BatchNorm1d(3))


# --- in a model -------------------------------------------------------------------------------------------------------


def decoder(dtype=torch.float64):
    """Grouped and ungrouped transposed convolutions with a norm, activations and a convolution between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.ConvTranspose2d(12, 16, 3, stride=2, groups=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 10, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(10, 8, 4, stride=2, padding=1, bias=False), nn.Tanh(), nn.ConvTranspose2d(8, 3, 1),
    ).to(dtype)  # fmt: skip


X = torch.randn(2, 12, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@folds
def test_proximal_step(fold):
    """Reference: the penalties' proximal operators on the oriented weight, group lasso with the bias."""
    lr, nuclear, group, l1 = 0.5, 0.2, 0.1, 0.02
    model = decoder()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    prox = ck.ProximalStep(model, optimizer, nuclear=nuclear, group=group, l1=l1, fold=fold)
    assert [layer.name for layer in prox.layers] == ["0", "3", "5", "7"] and prox.skipped == {}
    prox.step()
    for name in ("0", "5", "7"):
        old, new = before.get_submodule(name), model.get_submodule(name)
        W = old.weight.unflatten(0, (old.groups, -1)).transpose(1, 2).flatten(0, 1).detach()
        W = ck.folds.from_matrix(ck.svt(ck.folds.to_matrix(W, fold, old.groups), lr * nuclear), W.shape, fold)
        neurons = W.flatten(1) if old.bias is None else torch.cat([W.flatten(1), old.bias.detach()[:, None]], 1)
        neurons = ck.group_shrink(neurons, lr * group * neurons.shape[1] ** 0.5)
        wanted = ck.soft_threshold(neurons[:, : W[0].numel()], lr * l1).reshape(W.shape)
        got = new.weight.unflatten(0, (new.groups, -1)).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3 * lr * nuclear)  # the solver's tol, and a margin
        if old.bias is not None:
            torch.testing.assert_close(new.bias, neurons[:, -1], rtol=0, atol=2e-3 * lr * nuclear)


def test_report_of_the_proximal_step():
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 3))
    with torch.no_grad():
        model[0].weight[:, :2] = 0
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.1), group=0.1)
    (row,) = prox.report()
    assert row.shape == (1, 8, 36) and row.rows_alive == 0.75 and row.rank == 6
    assert prox.thresholds()["0"]["group"] == pytest.approx(0.1 * 0.1 * 37**0.5)


@folds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compressed_saved_and_loaded(tmp_path, fold, dtype):
    model, x = decoder(dtype).eval(), X.to(dtype)
    small, report = compress_for_size(model, {"[05]": ck.ranks.fixed(2), "*": ck.ranks.fixed(3)}, (x,), fold=fold)
    assert report.skipped == {} and [r.kind for r in report.layers].count("ConvTranspose2d") == 3
    assert [r.rank for r in report.layers][:3] == [2, 3, 2] and "break-even: 2" in report.layers[3].reason
    dense = [row.macs_before for row in report.layers]
    assert dense == [2 * 12 * n for n in (12 * 8 * 9, 16 * 10 * 9 * 63 / 12, 10 * 8 * 16 * 63 / 12, 8 * 3 * 252 / 12)]
    assert all(row.macs < row.macs_before and row.params < row.params_before for row in report.layers[:3])
    ck.save(small, tmp_path / "m.safetensors")
    loaded = ck.load(tmp_path / "m.safetensors", decoder(dtype)).eval()
    assert torch.equal(loaded(x), small(x)) and type(loaded[5]) is ck.LowRankConvTranspose2d


def test_compressing_without_truncation_keeps_the_outputs():
    model = decoder().eval()
    with torch.no_grad():
        for i in (0, 5):
            model[i].weight.copy_(ck.LowRankConvTranspose2d.from_dense(model[i], 2).to_dense().weight)
    small, report = compress_for_size(model, ck.ranks.threshold(1e-9), (X,))
    assert [r.rank for r in report.layers] == [2, None, 2, None]
    torch.testing.assert_close(small(X), model(X), rtol=0, atol=1e-12)


def test_loading_into_a_model_with_other_sizes_or_another_class(tmp_path):
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, stride=2, output_padding=1))
    small, _ = compress_for_size(model, ck.ranks.fixed(2), (torch.randn(1, 8, 4, 4),))
    ck.save(small, tmp_path / "m.safetensors")
    with pytest.raises(ck.CheckpointError, match="the file has LowRankConvTranspose2d, the model Conv2d"):
        ck.load(tmp_path / "m.safetensors", nn.Sequential(nn.Conv2d(8, 8, 3)))
    wider = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=False))
    loaded, x = ck.load(tmp_path / "m.safetensors", wider), torch.randn(1, 8, 4, 4)
    assert torch.equal(loaded(x), small(x))  # sizes from the file, stride and padding from the model


def test_dead_neurons_of_and_before_a_transposed_convolution_are_kept_with_a_reason():
    model = decoder().eval()
    with torch.no_grad():
        model[5].weight[:, 3] = 0  # an output
        model[0].weight[2] = 0  # an input: not a neuron
        model[3].weight[4] = 0
        model[3].bias[4] = 0
    small, removed, kept = remove_dead_neurons(model, (X,))
    assert removed == {} and set(kept) == {"3", "5"}
    assert kept["3"] == "dead neurons kept: they feed 5 (ConvTranspose2d)"
    assert kept["5"] == "dead neurons kept: 5 is a ConvTranspose2d"
    torch.testing.assert_close(small(X), model(X))


@folds
def test_gradients(fold):
    small = ck.LowRankConvTranspose3d(4, 6, (3, 2, 1), 2, stride=2, fold=fold, dtype=torch.float64)
    x = torch.randn(1, 4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(small.named_parameters())

    def f(x, *values):
        return torch.func.functional_call(small, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters.values()), fast_mode=True)


def test_row_axes_of_a_1d_kernel():
    """With one kernel axis the spatial fold is the paper's."""
    assert row_axes("spatial", 1) == 0
    one, two = (ck.LowRankConvTranspose1d(4, 4, 3, 2, fold=fold) for fold in ("paper", "spatial"))
    assert [f.weight.shape for f in one.to_sequential()] == [f.weight.shape for f in two.to_sequential()]
