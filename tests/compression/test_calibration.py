"""Calibrated factorization: second moments of a layer's inputs, and the best factors by them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compaware_kernels as ck
from compaware_kernels.compression.calibration import RIDGE, Calibration, columns
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.folds import FOLDS, from_matrix
from compaware_kernels.nn.discovery import Layer
from compaware_kernels.nn.factorization import SVD
from compaware_kernels.nn.truncation import Truncation

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (7, 5, 12)),
    "plain": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 9, 8)),
    "one image": (lambda: nn.Conv2d(3, 8, 3), (3, 9, 8)),
    "strided": (lambda: nn.Conv2d(3, 8, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1)), (2, 3, 11, 10)),
    "same": (lambda: nn.Conv2d(3, 8, 4, padding="same"), (2, 3, 9, 8)),
    "circular": (lambda: nn.Conv2d(3, 8, 3, padding=2, padding_mode="circular"), (2, 3, 9, 8)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1), (2, 6, 7, 8)),
    "1-D": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 17)),
    "3-D": (lambda: nn.Conv3d(2, 6, (2, 3, 1), padding=1), (2, 2, 5, 6, 4)),
}


def inputs(shape):
    """Inputs with uneven channels, whose second moments are far from the identity."""
    torch.manual_seed(3)
    return torch.randn(shape).cumsum(1 if len(shape) > 3 else -1).double()


def second_moment(module, x, fold):
    """C = sum x x^T ``[G, n, n]`` over all columns that the layer reads."""
    return sum(X.mT @ X for X in columns(module, x, fold))


def roots(C):
    """``C^(1/2)`` and its inverse, of the regularized C."""
    values, Q = torch.linalg.eigh(C)
    root = (values.clamp_min(0) + RIDGE * values.mean(-1, keepdim=True)).sqrt()[..., None, :]
    return Q * root @ Q.mT, Q / root @ Q.mT


def responses(module, x, M, fold="paper"):
    """Output of the layer with the folded matrix M as its weight, without bias."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        Layer("", other).set_rows(from_matrix(M, Layer("", other).rows.shape, fold))
        other.bias.zero_()
    return other(x)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_give_the_energy_of_the_outputs(name):
    """tr(M C M^T) is the energy of the outputs for any M; in the paper's fold all kernel axes are columns."""
    make, shape = LAYERS[name]
    module, x = make().double(), inputs(shape)
    C = second_moment(module, x, "paper")
    for seed in range(3):
        torch.manual_seed(seed)
        M = torch.randn_like(Layer("", module).matrix().detach())
        energy = responses(module, x, M).square().sum()
        torch.testing.assert_close((M @ C @ M.mT).diagonal(dim1=-2, dim2=-1).sum(), energy.detach())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fold", FOLDS)
def test_factors_are_optimal(name, fold):
    """By the moments no other matrix of that rank is closer: neither the truncated SVD nor a perturbation; a matrix of
    that rank is kept as it is."""
    make, shape = LAYERS[name]
    module, x = make().double(), inputs(shape)
    M = Layer("0", module).matrix(fold).detach()
    seen = Calibration(nn.Sequential(module), ["0"], [(x,)], [fold])
    root, inverse = roots(second_moment(module, x, fold))
    torch.testing.assert_close(root @ inverse, torch.eye(len(root[0])).expand_as(root).double(), atol=1e-9, rtol=0)

    def loss(R):
        return float(((M - R) @ root).square().sum())

    rank = min(M.shape[1:]) // 2 or 1
    R = seen.svd("0", fold, M).nearest(rank)
    s = seen.spectrum("0", fold, M)
    torch.testing.assert_close(seen.svd("0", fold, M).s, s)
    torch.testing.assert_close(s, torch.linalg.svdvals(M @ root))
    U, V = seen.svd("0", fold, M).factors(rank, torch.float64)
    torch.testing.assert_close(U @ V, R)
    assert loss(R) == pytest.approx(float(s[:, rank:].square().sum()), abs=1e-9)
    U, sigma, Vh = torch.linalg.svd(M @ root, full_matrices=False)
    torch.testing.assert_close((U[..., :rank] * sigma[:, None, :rank]) @ Vh[:, :rank] @ inverse, R)
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    assert loss(R) <= loss((U[..., :rank] * sigma[:, None, :rank]) @ Vh[:, :rank]) + 1e-9
    U, sigma, Vh = torch.linalg.svd(R, full_matrices=False)
    assert (sigma[:, rank:] < 1e-9 * sigma[:, :1]).all()
    for _ in range(5):
        beside = (U[..., :rank] + 1e-3 * torch.randn_like(U[..., :rank])) * sigma[:, None, :rank] @ Vh[:, :rank]
        assert loss(beside) >= loss(R)
    torch.testing.assert_close(seen.svd("0", fold, R).nearest(rank), R, atol=1e-8, rtol=0)


def test_compress_with_calibration_loses_less():
    """On inputs that span a few directions, at the same ranks."""
    torch.manual_seed(0)
    model = small_convnet().double().eval()
    basis = torch.randn(6, 64, dtype=torch.float64)
    draw = lambda count: (torch.randn(count, 6, dtype=torch.float64) @ basis).view(count, 1, 8, 8)  # noqa: E731
    few, others = draw(64), draw(256)
    options = {"ranks": {name: ck.ranks.share(0.2) for name in ("2", "5", "9")}, "example_inputs": (few[:1],)}
    errors = []
    for calibration in (None, [(few,)]):
        small, report = ck.compress(model, goal="size", calibration=calibration, **options)
        assert [r.rank for r in report.layers] == [None, 13, 13, 13, None]
        errors.append(float((small(others) - model(others)).norm() / model(others).norm()))
    assert errors[1] < 0.6 * errors[0]


def test_rank_rules_see_output_energy():
    """A full-rank layer needs rank 2 for inputs in two directions, and at most 1 for inputs that nothing reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40).double())
    x = torch.randn(500, 2).double() @ torch.randn(2, 40).double()
    small, report = ck.compress(
        model, ck.ranks.energy(0.97), (x[:1],), goal="size", calibration=[(x[:250],), (x[250:],)]
    )
    assert report.layers[0].rank == 2
    assert float((small(x) - model(x)).norm() / (model(x) - model[0].bias).norm()) < 0.05
    zero = [(torch.zeros_like(x),)]
    small, report = ck.compress(model, ck.ranks.fixed(5), (x[:1],), goal="size", calibration=zero)
    plain, _ = ck.compress(model, ck.ranks.fixed(5), (x[:1],), goal="size")
    torch.testing.assert_close(small(x), plain(x))


def test_batches_add_up():
    torch.manual_seed(0)
    model, x = small_convnet().double().eval(), torch.randn(12, 1, 8, 8).double()
    whole, parts = (Calibration(model, ["2"], batches, ["paper"])._moments["2", "paper"].K
                    for batches in ([(x,)], [(x[:5],), (x[5:],)]))  # fmt: skip
    torch.testing.assert_close(whole, parts)


def test_model_is_left_as_it_was():
    model = small_convnet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ck.compress(model, ck.ranks.share(0.2), (torch.zeros(1, 1, 8, 8),), calibration=[(torch.randn(4, 1, 8, 8),)])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_shared_weights_are_kept():
    """Factors would be stored besides the embedding, which shares the head's weight and stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 50, bias=False))
    model[1].weight = model[0].weight
    words = torch.arange(50)
    small, report = ck.compress(model, ck.ranks.fixed(4), (words,), goal="size", calibration=[(words,)])
    assert small[1].weight is small[0].weight and torch.equal(small[0].weight, model[0].weight)
    assert report.params == report.params_before and "shares its weight with 0.weight" in report.layers[0].reason


def test_training_modes_are_restored_per_module():
    """Also after an error: a batch norm may be frozen in a model that trains."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)).train()
    model[1].eval()
    for batches in ([(torch.randn(4, 8),)], [(torch.randn(4, 9),)]):
        try:
            Calibration(model, ["0", "2"], batches, ["paper"])
        except RuntimeError:
            assert batches[0][0].shape == (4, 9)
        assert [m.training for m in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize("batches", [torch.zeros(1, 1, 8, 8), [torch.zeros(1, 1, 8, 8)]], ids=["tensor", "tensors"])
def test_batches_are_tuples(batches):
    with pytest.raises(TypeError, match=r"wanted inputs of the model, \[\(x,\), ...\]; got one of Tensor"):
        ck.compress(small_convnet(), ck.ranks.share(0.2), (torch.zeros(1, 1, 8, 8),), calibration=batches)


@pytest.mark.parametrize(
    ("batches", "words"),
    [([], "wanted inputs of the model"), ([(torch.full((1, 1, 8, 8), torch.nan),)], "calibration: 0 reads NaN or Inf")],
)
def test_errors(batches, words):
    model = small_convnet()
    with pytest.raises(ValueError, match=words):
        ck.compress(model, ck.ranks.share(0.2), (torch.zeros(1, 1, 8, 8),), calibration=batches)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_counts_as_zeros():
    """A pixel of padding adds nothing to the moments."""
    conv, x = nn.Conv2d(1, 4, 3, padding=3).double(), torch.randn(1, 1, 2, 2).double()
    C = second_moment(conv, x, "paper")
    full = F.unfold(x, 3, padding=3)[0]
    torch.testing.assert_close(C[0], full @ full.T)


def test_convolution_that_pads_in_its_own_forward_is_not_calibrated():
    """What its weight is multiplied with is unknown: the input may even be narrower than the kernel."""

    class Padded(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (2, 2, 2, 2)), self.weight, self.bias)

    torch.manual_seed(0)
    model, x = nn.Sequential(Padded(4, 16, 5), nn.Conv2d(16, 16, 1)), torch.randn(2, 4, 3, 3)
    moments = Calibration(model, ["0", "1"], [(x,)], ["paper"])
    M = torch.randn(1, 16, 100)
    assert isinstance(moments.svd("0", "paper", M), Truncation)
    assert torch.equal(moments.svd("0", "paper", M).s, SVD.of(M).s)
    M = torch.randn(1, 16, 16)
    assert not torch.equal(moments.svd("1", "paper", M).s, SVD.of(M).s)


class Encoder(nn.Module):
    """torch's encoder between two layers of its own; in eval mode it packs the tokens that are not masked."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.body, self.head = nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 8)

    def forward(self, x, mask):
        return self.head(self.body(self.embed(x), src_key_padding_mask=mask))


def test_encoder_with_a_padding_mask():
    """Its nested tensors reach no hook; the model's own outputs do not change by it."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(4, 5, 8)
    mask = torch.zeros(4, 5).bool()
    mask[:, 3:] = True
    with torch.no_grad():
        wanted = model(x, mask)
        small, report = ck.compress(model, ck.ranks.share(1.0), (x, mask), goal="size", calibration=[(x, mask)])
        assert torch.equal(model(x, mask), wanted) and torch.backends.mha.get_fastpath_enabled()
        ranks = ck.allocate(model, 0.7, (x, mask), calibration=[(x, mask)])
        small, report = ck.compress(model, ranks, (x, mask), goal="size", calibration=[(x, mask)])
    rows = {row.name: row for row in report.layers}
    assert rows["embed"].rank and rows["head"].rank and report.macs < report.macs_before
    assert float((small(x, mask) - wanted)[:, :3].norm() / wanted[:, :3].norm()) < 0.5


def test_nested_inputs_of_a_layer_count_their_entries():
    parts = [torch.randn(n, 12, dtype=torch.float64) for n in (3, 1, 5)]
    linear = nn.Linear(12, 20).double()
    C = second_moment(linear, torch.cat(parts), "paper")
    for layout in (torch.strided, torch.jagged):
        torch.testing.assert_close(second_moment(linear, torch.nested.nested_tensor(parts, layout=layout), "paper"), C)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.layer(input=x)


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 64), (6272, 64), (64, 4096)])
def test_only_the_shorter_side_is_decomposed(inputs, outputs, monkeypatch):
    """Neither time nor memory is of n x n (4096 -> 64 took 30 s, and 0.05 s now): no more than 64 x 64 is kept."""
    shapes = []
    for name in ("svd", "eigh", "cholesky"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda A, real=real, **k: (shapes.append(A.shape), real(A, **k))[1])
    model, x = nn.Sequential(nn.Linear(inputs, outputs)), torch.randn(40, inputs)
    seen = Calibration(model, ["0"], [(x,)], ["paper"])
    assert seen._moments["0", "paper"].K.shape == (1, 64, 64)
    seen.svd("0", "paper", Layer("0", model[0]).matrix()).factors(8, torch.float32)
    assert shapes and all(min(shape[-2:]) <= 64 and shape[-1] * shape[-2] <= 64 * max(inputs, outputs)
                          for shape in shapes)  # fmt: skip


@pytest.mark.parametrize("scale", [1e-170, 1e-100, 1.0, 1e100])
@pytest.mark.parametrize("count", [1, 3])
def test_few_and_tiny_inputs(scale, count):
    """One input leaves C with rank 1, and 1e-170 squared is zero: both give finite factors of the same matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5).double())
    x = torch.randn(count, 12, dtype=torch.float64)
    M = Layer("0", model[0]).matrix().detach()
    svd = Calibration(model, ["0"], [(x * scale,)], ["paper"]).svd("0", "paper", M)
    assert svd.s.isfinite().all() and (svd.s[:, 1:] <= svd.s[:, :-1]).all()
    torch.testing.assert_close(svd.nearest(5), M)
    if scale > 1e-170:
        torch.testing.assert_close(x @ (svd.nearest(count) - M)[0].mT, x[:, :5] * 0, atol=0.1, rtol=0)


def test_dead_inputs_and_low_rank_weights():
    """Zero columns of M and zero inputs: C and M are singular, and a matrix of the rank is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(20, 3).double() @ torch.randn(3, 30).double())
        model[0].weight[:, 4] = 0
    M, x = Layer("0", model[0]).matrix().detach(), torch.randn(50, 30).double()
    x[:, 7:20] = 0
    svd = Calibration(model, ["0"], [(x,)], ["paper"]).svd("0", "paper", M)
    assert float(svd.s[0, 3]) < 1e-13 * float(svd.s[0, 0])
    torch.testing.assert_close(svd.nearest(3), M, atol=1e-12, rtol=0)


def test_a_layer_called_by_keyword_is_calibrated():
    model, x = Keyword().double(), inputs((2, 3, 9, 8))
    moments = Calibration(model, ["layer"], [{"x": x}], ["paper"])._moments["layer", "paper"]
    assert float(moments.energy) == pytest.approx(float(second_moment(model.layer, x, "paper")[0].trace()))


def test_parts_of_an_encoder_with_a_padding_mask():
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(4, 5, 8)
    mask = torch.arange(5).expand(4, 5) >= 3
    parts = [f"body.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    seen = Calibration(model, parts, [(x, mask)], ["paper"])
    assert set(seen._moments) == {(name, "paper") for name in parts}
    assert all(float(moments.energy) > 0 for moments in seen._moments.values())
