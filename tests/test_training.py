"""ProximalStep: thresholds, schedule, all or nothing, resuming."""

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


def test_group_counts_the_bias():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    ck.ProximalStep(model, optimizer, group={"0": 1.0}, every="epoch").step()
    wanted = ck.group_shrink(rows, 0.1 * math.sqrt(7))
    torch.testing.assert_close(torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach(), wanted)


def test_nan_in_layer_3_of_5_names_it_and_changes_nothing():
    model = network()
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), nuclear=0.1, group=0.1, l1=0.1)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = [p.detach().clone().view(torch.int64) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^2: contains NaN"):
        prox.step()
    assert all(torch.equal(p.detach().view(torch.int64), b) for p, b in zip(model.parameters(), before, strict=True))
    assert prox.applied == 0


def test_warmup_grows_linearly_and_resumes():
    model = network()
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), l1=0.4, warmup=3, scale_by_lr=False)
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.1)
    prox.step()
    state = prox.state_dict()
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.2)
    prox.load_state_dict({"steps": 0, "applied": 9})
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.4)
    prox.load_state_dict(state)
    assert prox.thresholds()["0"]["l1"] == pytest.approx(0.2)


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
        ({"every": 0}, "every must be"),
        ({"fold": "crane"}, "got 'crane'"),
        ({"order": ("l1",)}, "order must hold"),
    ],
)
def test_bad_arguments(bad, words):
    model = network()
    with pytest.raises(ValueError, match=words):
        ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), **bad)
