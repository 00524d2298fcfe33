"""Arms of the study: each follows its source, and resumes bit-identically."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compaware_kernels import ranks
from compaware_kernels.nn.discovery import foldable_layers
from compaware_kernels.nn.factorization import singular_values
from compaware_kernels.nn.lowrank import LowRank
from compaware_kernels.study import fit
from compaware_kernels.study.arms import ARMS, Plan, threshold
from compaware_kernels.study.networks import build
from tests.helpers.marks import slow_but
from tests.helpers.study_case import CONFIG, STRENGTHS, key, some_digits

PLAN = Plan(epochs=4, steps=10, examples=200, seed=0, skip=("16",), example=torch.zeros(1, 1, 8, 8))
data = pytest.fixture(scope="module")(some_digits)


def started(arm, **strength):
    """The arm on a fresh network, with its optimizer, and one batch."""
    arm = ARMS[arm](strength, PLAN)
    model = arm.prepare(build("dec", (1, 8, 8), 10, 0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, **arm.options())
    arm.attach(model, optimizer, 0)
    torch.manual_seed(1)
    return arm, model, optimizer, torch.randn(20, 1, 8, 8), torch.randint(10, (20,))


def step(arm, model, optimizer, x, y):
    """Take one training step; returns the gradients that the optimizer got."""
    arm.before()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    arm.after_backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    arm.after_step()
    return grads


def matrices(model):
    return {layer.name: layer.matrix().detach().clone() for layer in foldable_layers(model, PLAN.skip)[0]}


def test_all_arms_are_covered():
    assert set(STRENGTHS) == set(ARMS) and all(set(STRENGTHS[arm]) <= set(kind.knobs) for arm, kind in ARMS.items())


@pytest.mark.parametrize("arm", slow_but(["plain", "nuclear+group", "reload", "variational"], ARMS))
def test_resumed_trainings_are_bit_identical(arm, data, tmp_path, monkeypatch):
    """A training stopped after every epoch equals, bit for bit, one that ran through."""
    monkeypatch.setattr(fit, "SAVE_EVERY", 0)
    whole = fit.fit(CONFIG, key(arm), data, tmp_path / "whole", lambda: None)
    for stop in range(1, CONFIG.epochs + 1):
        seen = []

        def advance(seen=seen, stop=stop):
            seen.append(stop)
            if len(seen) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit.fit(CONFIG, key(arm), data, tmp_path / "part", advance)
        assert torch.load(tmp_path / "part/state.pt", weights_only=True)["run"]["epoch"] == stop
        assert len(list((tmp_path / "part").iterdir())) == 2
    seen = []
    part = fit.fit(CONFIG, key(arm), data, tmp_path / "part", lambda: seen.append(1))
    assert len(seen) == CONFIG.epochs and part.losses == whole.losses and part.ranks == whole.ranks
    assert part.model.state_dict().keys() == whole.model.state_dict().keys()
    assert all(map(torch.equal, part.model.state_dict().values(), whole.model.state_dict().values()))
    assert all(torch.equal(score, whole.arm.scores()[name]) for name, score in part.arm.scores().items())
    assert part.losses[-1] < part.losses[0]


def test_per_step_strengths_add_up_to_an_epoch():
    """In an epoch of ten steps, learning rate x strength is subtracted from the singular values in total."""
    for arm, every in (("nuclear", "epoch"), ("nuclear-steps", 10), ("l1", 1)):
        name = "l1" if arm == "l1" else "nuclear"
        made, *_ = started(arm, **{name: 0.7})
        assert made.prox.every == every
        times = 1 if every == "epoch" else PLAN.steps / every
        for thresholds in made.prox.thresholds().values():
            assert times * thresholds[name] == pytest.approx(0.1 * 0.7)


def test_sparse_group_applies_l1_first():
    arm, *_ = started("sparse-group", group=0.1, l1=0.1)
    assert arm.prox.order.index("l1") < arm.prox.order.index("group")


def test_nuclear_norm_in_the_loss():
    arm, model, *rest = started("nuclear-loss", nuclear=3.0)
    other = copy.deepcopy(model)
    loss = F.cross_entropy(other(rest[1]), rest[2])
    norms = [torch.linalg.matrix_norm(layer.matrix(), "nuc").sum() for layer in foldable_layers(other, PLAN.skip)[0]]
    (loss + 3.0 / PLAN.steps * sum(norms)).backward()
    for name, grad in step(arm, model, *rest).items():
        torch.testing.assert_close(grad, other.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_l2_is_weight_decay():
    _, _, optimizer, *_ = started("l2", l2=0.3)
    assert all(group["weight_decay"] == 0.3 for group in optimizer.param_groups)


def test_trained_rank_pruning():
    """At the first step and every 20th, each layer becomes its truncated SVD; in between it is not constrained."""
    arm, model, *rest = started("trp", energy=0.7)
    before = matrices(model)
    arm.before()
    for name, M in matrices(model).items():
        s, was = singular_values(M)[0], singular_values(before[name])[0]
        r = ranks.energy(0.7)(was)
        assert r < len(was) or len(was) < 4
        torch.testing.assert_close(
            s.float(), torch.cat([was[:r], torch.zeros(len(was) - r)]).float(), rtol=1e-4, atol=1e-5
        )
    now = matrices(model)
    arm.step = 19
    arm.before()
    assert all(torch.equal(M, now[name]) for name, M in matrices(model).items())
    arm.step = 20
    plain = ARMS["plain"]({}, PLAN)
    plain.attach(model, None, 0)
    twin = copy.deepcopy(model)
    other = ARMS["trp"]({"energy": 0.7}, PLAN)
    other.attach(twin, None, 0)
    other.before()
    free, kept = step(plain, twin, rest[0], *rest[1:]), step(arm, model, *rest)
    M = matrices(model)["12"]
    extra = (kept["12.weight"] - free["12.weight"]).flatten(1)
    torch.testing.assert_close(singular_values(extra[None])[0, 0].float(), torch.tensor(3e-4), rtol=1e-2, atol=0)
    assert extra.shape == M.shape[1:]


def test_low_rank_from_scratch():
    arm, model, *rest = started("fixed-rank", share=0.25)
    dense = build("dec", (1, 8, 8), 10, 0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}
    assert len(layers) == 6 and "16" not in layers
    for name, layer in layers.items():
        m, n = dense.get_submodule(name).weight.flatten(1).shape
        assert layer.rank == math.ceil(0.25 * min(m, n))
        W = dense.get_submodule(name).weight.detach().flatten(1).double()
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        got = layer.to_dense().weight.detach().flatten(1).double()
        best = (U * s)[:, : layer.rank] @ Vh[: layer.rank]
        torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-5)
    step(arm, model, *rest)


def test_magnitude_pruning():
    """Cubic schedule over three quarters of all steps; pruned weights stay zero; one threshold for all layers."""
    arm, model, *rest = started("magnitude", sparsity=0.9)
    arm.every = 5
    zero = {}
    for i in range(1, 41):
        step(arm, model, *rest)
        weights = {name: M.flatten() for name, M in matrices(model).items()}
        for name, M in weights.items():
            assert not M[zero.get(name, torch.zeros_like(M, dtype=torch.bool))].any()
        zero = {name: M == 0 for name, M in weights.items()}
        done = min(1, i // 5 * 5 / 30)
        share = float(torch.cat(list(zero.values())).float().mean())
        assert share == pytest.approx(0.9 * (1 - (1 - done) ** 3), abs=1e-3)
    assert len({round(float(z.float().mean()), 2) for z in zero.values()}) > 3
    assert not (model[16].weight == 0).any()


def test_pruning_threshold_is_global():
    scores = {"a": torch.arange(6.0), "b": torch.arange(6.0, 10.0)}
    for share, level in ((0, -1), (0.1, 0), (0.5, 4), (0.7, 6)):
        assert threshold(scores, share) == level
        assert sum(int((s > level).sum()) for s in scores.values()) == 10 - 10 * share


def test_variational_gradients():
    """Equal to the gradients of loss + cost KL / N by autograd through sampled weights, with the optimal prior held
    fixed."""
    arm, model, optimizer, x, y = started("variational", cost=2.0)
    for rho in arm.log_deviations:
        rho.add_(0.3 * torch.randn_like(rho))
    means = [layer.weight.detach().clone().requires_grad_() for layer in arm.layers]
    rhos = [rho.clone().requires_grad_() for rho in arm.log_deviations]
    arm.before()
    noise = [n / rho.exp() for n, rho in zip(arm.noise, arm.log_deviations, strict=True)]
    drawn = {f"{layer.name}.weight": mean + e * rho.exp()
             for layer, mean, rho, e in zip(arm.layers, means, rhos, noise, strict=True)}  # fmt: skip
    loss = F.cross_entropy(torch.func.functional_call(model, drawn, x), y)
    for mean, rho in zip(means, rhos, strict=True):
        center = mean.detach().mean()
        variance = ((2 * rho.detach()).exp() + (mean.detach() - center) ** 2).mean()
        kl = variance.log() / 2 - rho + ((mean - center) ** 2 + (2 * rho).exp() - variance) / (2 * variance)
        loss = loss + 2.0 / PLAN.examples * kl.sum()
    loss.backward()
    F.cross_entropy(model(x), y).backward()
    arm.adam.step = lambda: None
    arm.after_backward()
    for layer, rho, mean, free in zip(arm.layers, arm.log_deviations, means, rhos, strict=True):
        torch.testing.assert_close(layer.weight.grad, mean.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rho.grad, free.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.weight, mean)


def test_variational_description_and_scores():
    arm, *_ = started("variational", cost=1.0)
    for layer in arm.layers:
        nn.init.normal_(layer.weight, 0.3, 2.0)
    for rho in arm.log_deviations:
        rho.fill_(math.log(0.02))
    count = sum(layer.weight.numel() for layer in arm.layers)
    assert arm.facts()["description_bytes"] == pytest.approx(count * math.log2(2.0 / 0.02) / 8, rel=0.02)
    arm.log_deviations[0].view(-1)[0] = math.log(2.0)
    score, weight = arm.scores()["0"].flatten(), arm.layers[0].weight.flatten()
    torch.testing.assert_close(score[:2], weight[:2].detach().abs() / torch.tensor([2.0, 0.02]))


def test_reload(data, tmp_path):
    """At half of the epochs the network is replaced by a smaller one, on which no penalty acts."""
    run, plain = (fit.fit(CONFIG, key(arm), data, tmp_path / arm, lambda: None) for arm in ("reload", "plain"))
    count = [sum(p.numel() for p in r.model.parameters()) for r in (run, plain)]
    assert any(isinstance(module, LowRank) for module in run.model.modules()) and count[0] < count[1]
    assert run.arm.prox is None and len(run.ranks["0"]) == CONFIG.epochs


@pytest.mark.parametrize("arm", ["nuclear", "nuclear-steps", "nuclear-loss", "trp", "nuclear+group"])
def test_penalties_reduce_ranks(arm, data, tmp_path):
    """Rank: the number of singular values that hold 99 % of the energy."""
    ends = [fit.fit(CONFIG, key(a), data, tmp_path / a, lambda: None) for a in ("plain", arm)]
    count = [sum(ranks.energy(0.99)(singular_values(M)) for M in matrices(run.model).values()) for run in ends]
    assert count[1] < 0.9 * count[0]


@pytest.mark.parametrize(("arm", "share"), [("l1", 0.05), ("sparse-group", 0.05), ("magnitude", 0.75)])
def test_penalties_produce_zeros(arm, share, data, tmp_path):
    run = fit.fit(CONFIG, key(arm), data, tmp_path, lambda: None)
    weights = torch.cat([M.flatten() for M in matrices(run.model).values()])
    assert float((weights == 0).float().mean()) > share


def test_divergence_is_reported(data, tmp_path):
    from dataclasses import replace

    with pytest.raises(fit.Diverged, match="became nan"):
        fit.fit(replace(CONFIG, lr=1e4), key("plain"), data, tmp_path, lambda: None)
