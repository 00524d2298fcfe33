"""ProximalStep: thresholds, schedule, all-or-nothing errors, resuming, arguments."""

import math

import pytest
import torch
from torch import nn

import compaware_kernels as ck


def network():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)]).double()


def test_every_k_steps_by_hook_with_the_groups_own_learning_rate():
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    prox = ck.ProximalStep(model, optimizer, nuclear=1.0, every=2)
    wanted = [ck.svt(model[0].weight.detach(), 0.5), ck.svt(model[1].weight.detach(), 0.1), model[2].weight.detach()]
    optimizer.step()  # no gradients: the optimizer itself moves nothing
    assert prox.applied == 0
    optimizer.step()
    assert prox.applied == 1
    for layer, W in zip(model, wanted, strict=False):
        torch.testing.assert_close(layer.weight.detach(), W)


def test_group_lasso_includes_the_bias():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    ck.ProximalStep(model, optimizer, group={"0": 1.0}, every="epoch").step()
    wanted = ck.group_shrink(rows, 0.1 * math.sqrt(7))
    torch.testing.assert_close(torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach(), wanted)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_nan_in_layer_3_of_5_names_it_and_changes_nothing(where):
    """The bias is used by group lasso only, which comes after the nuclear norm has shrunk the clones."""
    model = network()
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), nuclear=0.1, group=0.1, l1=0.1)
    with torch.no_grad():
        getattr(model[2], where)[0] = torch.nan
    before = [p.detach().clone().view(torch.int64) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^2: contains NaN"):
        prox.step()
    assert all(torch.equal(p.detach().view(torch.int64), b) for p, b in zip(model.parameters(), before, strict=True))
    assert prox.applied == 0


def test_warmup_grows_linearly_and_resumes():
    model = network()
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=0.5), l1=0.4, warmup=3, scale_by_lr=False)
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.1)
    prox.step()
    state = prox.state_dict()
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.2)
    prox.load_state_dict(state | {"applied": 9})
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.4)
    prox.load_state_dict(state)
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.2)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
}


def train(model, optimizer, steps, start=0):
    for i in range(start, start + steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_bitwise_identical_to_not_stopping(name, tmp_path):
    def start():
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, ck.ProximalStep(model, optimizer, nuclear=0.5, group=0.1, l1=0.01, every=3, warmup=4)

    model, optimizer, prox = start()
    train(model, optimizer, 7)
    torch.save([x.state_dict() for x in (model, optimizer, prox)], tmp_path / "state.pt")
    train(model, optimizer, 8, 7)
    resumed = start()
    for x, state in zip(resumed, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        x.load_state_dict(state)
    train(*resumed[:2], 8, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True))
    assert resumed[2].state_dict() == prox.state_dict() and (prox.steps, prox.applied) == (15, 5)


def test_frozen_skipped_and_tied_weights_and_those_of_no_optimizer():
    model = network()
    model[0].requires_grad_(False)
    model[4].weight = model[3].weight
    optimizer = torch.optim.SGD([p for m in (model[0], model[2], model[3]) for p in m.parameters()], lr=1.0)
    before = [m.weight.detach().clone() for m in model]
    ck.ProximalStep(model, optimizer, nuclear=0.1, skip=["2"]).step()
    for i in (0, 1, 2):
        assert torch.equal(model[i].weight.detach(), before[i]), "frozen, not in the optimizer, skipped"
    torch.testing.assert_close(model[3].weight.detach(), ck.svt(before[3], 0.1))


def test_order_first_match_and_schedule():
    model = network()
    W = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    strengths = {"nuclear": {"1": 0.4, "*": 0.0}, "l1": {"1": 0.2}}
    prox = ck.ProximalStep(model, optimizer, **strengths, order=("l1", "group", "nuclear"))
    optimizer.step()
    schedule.step()
    prox.step()
    torch.testing.assert_close(model[1].weight.detach(), ck.svt(ck.soft_threshold(W, 0.1), 0.2))
    assert not torch.allclose(model[1].weight.detach(), ck.soft_threshold(ck.svt(W, 0.2), 0.1))


@pytest.mark.parametrize("fold", ck.folds.FOLDS)
def test_grouped_convolutions_are_shrunk_per_group(fold):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 4, 3, groups=4), nn.Conv3d(2, 3, 2)).double()
    before = [m.weight.detach().clone() for m in model]
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), nuclear=0.3, fold=fold)
    prox.step()
    for module, W in zip(model, before, strict=True):
        wanted = ck.svt(ck.folds.to_matrix(W, fold, module.groups), 0.3)
        torch.testing.assert_close(module.weight.detach(), ck.folds.from_matrix(wanted, W.shape, fold))


@pytest.mark.parametrize("fold", ck.folds.FOLDS)
def test_firm_penalty(fold):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(9, 7)).double()
    before = [m.weight.detach().clone() for m in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    prox = ck.ProximalStep(model, optimizer, firm=0.6, gamma=1.8, fold=fold)
    assert prox.thresholds()["0"]["firm"] == 0.3 and prox.thresholds()["0"]["nuclear"] == 0
    prox.step()
    for module, W in zip(model, before, strict=True):
        wanted = ck.firm_svt(ck.folds.to_matrix(W, fold, getattr(module, "groups", 1)), 0.3, 1.8)
        torch.testing.assert_close(module.weight.detach(), ck.folds.from_matrix(wanted, W.shape, fold))


def test_the_order_may_name_a_subset():
    first, second = network(), network()
    for model, order in ((first, ("l1", "nuclear")), (second, ("l1", "group", "nuclear"))):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        ck.ProximalStep(model, optimizer, nuclear=0.3, l1=0.05, order=order).step()
    wanted = ck.svt(ck.soft_threshold(network()[0].weight.detach(), 0.05), 0.3)
    torch.testing.assert_close(first[0].weight.detach(), wanted)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_remove_detaches_from_the_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prox = ck.ProximalStep(model, optimizer, nuclear=0.1, every=1)
    prox.remove()
    optimizer.step()
    assert prox.applied == prox.steps == 0


def test_an_optimizer_of_another_model_is_an_error():
    with pytest.raises(ValueError, match="nothing to shrink"):
        ck.ProximalStep(network(), torch.optim.SGD(network().parameters(), lr=1.0))


@pytest.mark.parametrize("state", [{}, {"steps": 1, "warm": {}}, {"steps": 1.5, "applied": 0, "warm": {}}, None])
def test_bad_state(state):
    model = network()
    with pytest.raises(ValueError, match="wanted a ProximalStep state"):
        ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0)).load_state_dict(state)


def test_report():
    model = network()
    with torch.no_grad():
        model[0].weight[3:] = 0
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0))
    entry = prox.report()[0]
    s = torch.linalg.svdvals(model[0].weight.detach())
    assert (entry.rank, entry.full_rank, entry.rows_alive) == (3, 6, 0.5)
    assert entry.sigma_sum == pytest.approx(float(s.sum())) and entry.sigma_max == pytest.approx(float(s[0]))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"nuclear": -1.0}, "strength >= 0"),
        ({"group": math.inf}, "finite strength"),
        ({"nuclear": {"head": 1.0}}, "'head' matches no layer"),
        ({"every": 0}, "every: wanted"),
        ({"fold": "crane"}, "got 'crane'"),
        ({"order": ("l1", "l1")}, "each at most once"),
        ({"gamma": 1.0}, "gamma: wanted"),
        ({"order": ("l1", "trace")}, "order: wanted some of"),
        ({"nuclear": 1.0, "order": ("l1",)}, "order: wanted nuclear in it"),
    ],
)
def test_bad_arguments(bad, words):
    model = network()
    with pytest.raises(ValueError, match=words):
        ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), **bad)
