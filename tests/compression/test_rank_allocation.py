"""Rank allocation: budgets are kept and used up, and the ranks are optimal."""

import itertools

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels import ranks
from compaware_kernels.compression import rank_allocation
from compaware_kernels.demo.networks import small_convnet
from compaware_kernels.nn.discovery import foldable_layers
from compaware_kernels.nn.factorization import singular_values

X = (torch.zeros(1, 1, 8, 8),)


def network(seed=0):
    """Network whose layers have different spectra."""
    torch.manual_seed(seed)
    model = small_convnet()
    for i, layer in enumerate(foldable_layers(model)[0]):
        U, s, Vh = torch.linalg.svd(layer.matrix().detach(), full_matrices=False)
        s = (1 + i) * torch.exp(-torch.arange(s.shape[-1]) / (2.0 + 5 * i))
        layer.set_rows(((U * s) @ Vh).reshape(layer.rows.shape))
    return model


def spent(model, rules, of):
    """Fraction of the dense cost of all layers, as compress reports it."""
    _, report = ck.compress(model, rules, X, goal="size", remove_dead=False)
    return getattr(report, of) / getattr(report, f"{of}_before")


@pytest.mark.parametrize("by", ["relative", "absolute", "equal", "greedy", "share"])
@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.05, 0.2, 0.4, 0.75, 1.0])
def test_budget_is_kept_and_used(by, of, budget):
    model = network()
    rules = ck.allocate(model, budget, X, of=of, by=by)
    share = spent(model, rules, of)
    # Biases are parameters that no rank saves; the largest step is one rank of one layer, or from factors to dense.
    assert share <= budget + (0.01 if of == "params" else 1e-9)
    if by in ("relative", "absolute", "greedy"):
        assert share > budget - 0.06
    assert set(rules) == {layer.name for layer in foldable_layers(model)[0]}


def lost(model, rules):
    """(absolute, relative) loss of energy by layer."""
    found = []
    for layer in foldable_layers(model)[0]:
        squares = singular_values(layer.matrix()).square().sum(0)
        cut = squares[rules[layer.name](squares) :].sum()
        found.append((float(cut), float(cut / squares.sum())))
    return found


@pytest.mark.parametrize(("by", "column"), [("absolute", 0), ("relative", 1), ("greedy", 1)])
def test_loss_is_minimal(by, column):
    """Against all combinations of ranks of two layers; up to the one rank that no Lagrange multiplier reaches."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 12))
    with torch.no_grad():
        model[0].weight.mul_(3)
    sizes, x = [(16, 20), (12, 16)], (torch.zeros(1, 20),)

    def choices(m, n):
        cheap = [(r, r * (m + n)) for r in range(1, min(m, n) + 1) if r * (m + n) < m * n]
        return [*cheap, (min(m, n), m * n)]

    spectra = [singular_values(layer.matrix())[0].square() for layer in foldable_layers(model)[0]]
    scale = [1.0, 1.0] if column == 0 else [float(s.sum()) for s in spectra]
    for budget in (0.25, 0.4, 0.6, 0.9):
        best = min(
            sum(float(s[r:].sum()) / w for s, (r, _), w in zip(spectra, both, scale, strict=True))
            for both in itertools.product(*(choices(m, n) for m, n in sizes))
            if sum(cost for _, cost in both) <= budget * (16 * 20 + 12 * 16)
        )
        found = ck.allocate(model, budget, x, by=by)
        got = sum(values[column] for values in lost(model, found))
        assert best - 1e-9 <= got <= 1.12 * best + 1e-9


def test_equal_allocation_loses_equally():
    model = network()
    rules = ck.allocate(model, 0.3, X, by="equal")
    worst = max(relative for _, relative in lost(model, rules))
    for layer in foldable_layers(model)[0]:  # one rank less would lose more than the worst layer does
        squares = singular_values(layer.matrix()).square().sum(0)
        r = rules[layer.name](squares)
        m, n = layer.matrix().shape[1:]
        r = min(r, ranks.break_even(m, n) + 1)
        assert r == 1 or float(squares[r - 1 :].sum() / squares.sum()) > worst or r > ranks.break_even(m, n)


def test_methods_differ():
    model = network()
    found = {by: {k: str(v) for k, v in ck.allocate(model, 0.3, X, by=by).items()} for by in rank_allocation._WAYS}
    assert found["relative"] != found["absolute"] != found["equal"] != found["relative"]


def test_groups_strides_and_folds():
    """Costs are those of the factors as they run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(16, 32, 3))
    x = (torch.zeros(1, 8, 16, 16),)
    for fold in ("paper", "spatial", "input"):
        rules = ck.allocate(model, 0.5, x, fold=fold)
        _, report = ck.compress(model, rules, x, goal="size", fold=fold)
        assert 0.4 < report.macs / report.macs_before <= 0.5


def test_skipped_layers_stay_dense():
    rules = ck.allocate(network(), 0.3, X, skip=["11"])
    assert "11" not in rules and rules


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0}, "above 0 and up to 1; got 0"),
        ({"budget": 1.5}, "got 1.5"),
        ({"budget": float("nan")}, "got nan"),
        ({"budget": 1e-4}, r"rank 1 everywhere needs 0\.0"),
        ({"of": "bytes"}, "of='bytes'"),
        ({"by": "luck"}, "by='luck'"),
        ({"fold": "crane"}, "got 'crane'"),
    ],
    ids=str,
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        ck.allocate(network(), **({"budget": 0.5, "example_inputs": X} | options))


def test_other_errors():
    with pytest.raises(TypeError, match=r"wanted a tuple of the model's inputs, \(x,\); got a tensor"):
        ck.allocate(network(), 0.5, X[0])
    with pytest.raises(ValueError, match="got 'half'"):
        ck.allocate(network(), "half", X)
    broken = network()
    with torch.no_grad():
        broken[5].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="5: contains NaN"):
        ck.allocate(broken, 0.5, X)


@pytest.mark.parametrize("by", ["relative", "absolute", "equal", "greedy", "share"])
def test_only_layers_that_can_become_two_factors_count(by):
    """An encoder layer reads its weights directly: they cost nothing here, and compress keeps the budget without
    them."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model, x = nn.Sequential(nn.Linear(32, 32), encoder, nn.Linear(32, 32)), (torch.zeros(1, 5, 32),)
    rules = ck.allocate(model, 0.5, x, by=by)
    _, report = ck.compress(model, rules, x, goal="size")
    now = {r.name: (r.macs, r.macs_before) for r in report.layers if r.name in rules}
    assert set(now) == {"0", "2"} and sum(a for a, _ in now.values()) <= 0.5 * sum(b for _, b in now.values())
    assert ck.allocate(encoder, 0.5, x, by=by) == {}


@pytest.mark.parametrize("of", ["macs", "params"])
@pytest.mark.parametrize("fold", ["paper", "spatial", "input"])
@pytest.mark.parametrize("budget", [0.4, 0.9])
def test_factors_must_save_both_parameters_and_multiply_adds(of, fold, budget):
    """With strides and padding, and transposed, factors may save parameters but no multiply-adds, or the reverse."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=2, bias=False), nn.Conv2d(32, 32, 1, 2, bias=False),
                          nn.ConvTranspose2d(32, 16, 3, 2, bias=False))  # fmt: skip
    x = (torch.zeros(1, 16, 12, 12),)
    for by in ("relative", "share", "equal"):
        try:
            rules = ck.allocate(model, budget, x, of=of, by=by, fold=fold)
        except ValueError as error:
            assert "rank 1 everywhere needs" in str(error)
            continue
        _, report = ck.compress(model, rules, x, goal="size", fold=fold, remove_dead=False)
        assert getattr(report, of) <= budget * getattr(report, f"{of}_before")


def test_a_layer_with_several_names_counts_once():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    model = nn.Sequential(nn.Sequential(layer), nn.ReLU(), nn.Sequential(layer), nn.Linear(32, 10))
    x = (torch.zeros(1, 32),)
    rules = ck.allocate(model, 0.5, x, by="share")
    _, report = ck.compress(model, rules, x, goal="size")
    assert set(rules) == {"0.0", "3"} and report.macs <= 0.5 * report.macs_before == 0.5 * (2 * 1024 + 320)


def test_names_are_not_patterns():
    model = nn.Sequential()
    model.add_module("fc[0]", nn.Linear(32, 32))
    x = (torch.zeros(1, 32),)
    _, report = ck.compress(model, ck.allocate(model, 0.5, x), x, goal="size")
    assert report.layers[0].rank == 8


def test_model_is_not_changed():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ck.allocate(model, 0.3, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.3, 0.45, 0.6, 0.8])
def test_equal_allocation_is_minimal(budget):
    """If all layers lost less than the worst one does now, the budget would be exceeded."""
    model = network()
    rules = ck.allocate(model, budget, X, of="params", by="equal")
    worst, needed, dense = max(relative for _, relative in lost(model, rules)), 0, 0
    for layer in foldable_layers(model)[0]:
        squares = singular_values(layer.matrix()).square().sum(0)
        left = 1 - squares.cumsum(0) / squares.sum()
        m, n = layer.matrix().shape[1:]
        needed += min(m * n, (m + n) * (1 + int((left >= worst * (1 - 1e-9)).sum())))
        dense += m * n
    assert needed > budget * dense


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6, 0.9])
def test_share_is_maximal(budget):
    """The next larger share would exceed the budget."""
    model = network()
    rules = ck.allocate(model, budget, X, of="params", by="share")
    layers = {layer.name: layer.matrix().shape[1:] for layer in foldable_layers(model)[0]}
    kept = {name: (rules[name](torch.ones(min(m, n))), m, n) for name, (m, n) in layers.items()}
    factorized = [(r, m, n) for r, m, n in kept.values() if r * (m + n) < m * n]
    low = max((r - 1) / min(m, n) for r, m, n in factorized)
    high = min(r / min(m, n) for r, m, n in factorized)
    assert low < high
    more = [min(m * n, (m + n) * (int(high * min(m, n) + 1e-9) + 1)) for m, n in layers.values()]
    assert sum(more) > budget * sum(m * n for m, n in layers.values())


def test_calibration_gives_ranks_to_layers_whose_inputs_need_them():
    """Two equal layers on one input, the first of which reads only channels that are nearly zero."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(30, 30), nn.Linear(30, 30)

        def forward(self, x):
            return self.a(1e-3 * x) + self.b(x)

    model, x = Two(), torch.randn(200, 30)
    rules = ck.allocate(model, 0.5, (x[:1],), by="absolute", calibration=[(x,)])
    assert rules["a"](torch.ones(30)) == 1 and rules["b"](torch.ones(30)) > 10


def test_all_groups_count():
    """The first group of the first layer needs rank 1, its second group full rank; the second layer is small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(32, 32, 1, groups=2, bias=False), nn.Conv1d(32, 32, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:16] = 1e-3
        nn.init.orthogonal_(model[0].weight[16:, :, 0])
        model[1].weight.mul_(0.1)
    rules = ck.allocate(model, 0.4, (torch.zeros(1, 32, 4),), by="absolute")
    assert rules["0"](torch.ones(16)) > 4 > rules["1"](torch.ones(32))
