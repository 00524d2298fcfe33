"""Optimizers that move weights in their own way, copies of a ProximalStep, and models that change under it."""

import copy
import pickle
import warnings
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import compaware_kernels as ck
from tests.helpers.optimizer_cases import assert_same_weights, attached, loss_of, network, sgd, train


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- wrappers -------------------------------------------------------------------------------------------------------


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al., arXiv 2010.01412): gradients at weights moved uphill by rho."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=float(0.05 / norm))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure):
        with torch.enable_grad():
            closure()
        self.first_step()
        self.zero_grad()
        with torch.enable_grad():
            closure()
        self.second_step()


def sam_training(kind, step=None):
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    prox = attached(model, optimizer.base_optimizer if kind == "base" else optimizer, every="epoch" if step else 2)
    for i in range(6):
        optimizer.zero_grad()
        if kind == "closure":
            optimizer.step(lambda i=i: loss_of(model, i).backward())
        else:
            loss_of(model, i).backward()
            optimizer.first_step()
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.second_step()
        if step and i % 2:
            prox.step()
    assert (prox.steps, prox.applied) == (6, 3)
    return model


@pytest.mark.parametrize("kind", ["two steps", "base", "closure"])
def test_sharpness_aware_minimization(kind):
    assert_same_weights(sam_training(kind), sam_training("two steps", step=True))


class Lookahead(Optimizer):
    """Lookahead (Zhang et al., arXiv 1907.08610): every second step goes half of the way from the slow weights."""

    def __init__(self, base):  # does not call Optimizer.__init__, as that of timm
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state, self.count = defaultdict(dict), 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self._base_optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


class InitializedLookahead(Lookahead):
    def __init__(self, base):
        Optimizer.__init__(self, base.param_groups, {})
        super().__init__(base)


@pytest.mark.parametrize("kind", [Lookahead, InitializedLookahead])
def test_the_proximal_step_comes_after_what_a_wrapper_does(kind):
    def run(every):
        model = network()
        optimizer = kind(sgd(model))
        prox = attached(model, optimizer, every=every, nuclear=5.0)
        for i in range(6):
            train(model, optimizer, 1, i)
            if every == "epoch" and i % 2:
                prox.step()
        assert (prox.steps, prox.applied) == (6, 3) and prox.report()[0].rank < 6
        return model

    assert_same_weights(run(2), run("epoch"))
    other = kind(sgd(network()))
    other.step()  # another one, without hooks, still works


def test_a_wrapper_whose_step_fails_does_not_stop_the_proximal_steps():
    model = network()
    optimizer = InitializedLookahead(sgd(model))
    prox = attached(model, optimizer, every=1)
    slow, optimizer.slow = optimizer.slow, [None]
    train(model, optimizer, 1)
    with pytest.raises(AttributeError):
        train(model, optimizer, 1)
    optimizer.slow = slow
    train(model, optimizer, 2)
    assert prox.steps == prox.applied == 4


class Unhookable(Optimizer):
    """A wrapper as torch.distributed.optim.PostLocalSGDOptimizer: no Optimizer.__init__, and no hooks."""

    def __init__(self, optim):
        self.optim, self.param_groups = optim, optim.param_groups

    def step(self):
        self.optim.step()

    def zero_grad(self):
        self.optim.zero_grad()


def test_a_wrapper_without_hooks_is_named():
    model = network()
    optimizer = Unhookable(sgd(model))
    with pytest.warns(UserWarning, match="optimizer: Unhookable has no step hooks.*SGD in it"):
        prox = attached(model, optimizer)
    train(model, optimizer)
    assert prox.applied == 3


def test_an_optimizer_with_another_one_of_fewer_parameters_is_no_wrapper_of_it():
    """As the local optimizer of a ZeroRedundancyOptimizer."""
    model = network()
    optimizer = sgd(model)
    optimizer.local = torch.optim.SGD(model[0].parameters(), lr=0.1)
    prox = attached(model, optimizer)
    train(model, optimizer)
    assert prox.optimizer is optimizer and prox.applied == 3


def test_lbfgs_counts_its_steps_not_its_evaluations():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    prox = attached(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert (prox.steps, prox.applied) == (4, 2)


def test_one_optimizer_per_parameter_inside_backward():
    model = network()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    proxes = [
        attached(model, optimizers[layer.weight], group=0.0, every=1, nuclear=3.0) for layer in (model[0], model[2])
    ]

    def update(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    for i in range(5):
        loss_of(model, i).backward()
    assert [prox.applied for prox in proxes] == [5, 5]
    assert all(entry.rank < 6 for entry in proxes[0].report())


# --- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "deepcopy of all"])
def test_a_copy_is_attached_to_its_own_optimizer(way):
    model = network()
    optimizer = sgd(model)
    prox = attached(model, optimizer)
    train(model, optimizer, 3)
    if way == "deepcopy of all":
        _, other, again = copy.deepcopy([model, optimizer, prox])
        assert again.optimizer is other
    else:
        again = copy.deepcopy(prox) if way == "deepcopy" else pickle.loads(pickle.dumps(prox))
    assert again.model is not model and again.optimizer is not optimizer
    before = [p.detach().clone() for p in model.parameters()]
    train(again.model, again.optimizer, 3, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and prox.applied == 1
    train(model, optimizer, 3, 3)
    assert (again.steps, again.applied) == (prox.steps, prox.applied) == (6, 3)
    assert_same_weights(again.model, model)
    assert again.state_dict() == prox.state_dict()


def test_a_shallow_copy_on_the_same_optimizer_warns():
    model = network()
    prox = attached(model, sgd(model))
    with pytest.warns(UserWarning, match="another ProximalStep on it shrinks 0, 2 by the same penalties"):
        copy.copy(prox).remove()


def test_a_copy_of_a_removed_one_is_removed():
    model = network()
    prox = attached(model, sgd(model))
    prox.remove()
    prox.remove()
    again = copy.deepcopy(prox)
    train(again.model, again.optimizer)
    assert again.steps == 0
    again.step()
    assert again.applied == 1


# --- two on one optimizer -------------------------------------------------------------------------------------------


def test_a_second_one_with_the_same_penalties_warns():
    model = network()
    optimizer = sgd(model)
    first = attached(model, optimizer, nuclear={"0": 0.5})
    attached(model, optimizer, nuclear={"2": 0.5}, group=0.0).remove()
    attached(model, optimizer, nuclear=0.0, group=0.0, l1=0.1).remove()
    with pytest.warns(UserWarning, match="another ProximalStep on it shrinks 0 by the same penalties"):
        attached(model, optimizer, group=0.0).remove()
    first.remove()
    attached(model, optimizer)


# --- models that change ---------------------------------------------------------------------------------------------


def test_a_replaced_layer_is_shrunk_and_the_one_it_replaced_is_not():
    model = network()
    optimizer = sgd(model, momentum=0.0)
    prox = attached(model, optimizer, nuclear={"2": 0.5, "0": 0.1}, group=0.0)
    train(model, optimizer, 2)
    orphan, model[2] = model[2], nn.Linear(8, 6).double()
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    before = orphan.weight.detach().clone(), model[2].weight.detach().clone()
    assert prox.thresholds()["2"]["nuclear"] == 0.1
    optimizer.zero_grad()
    optimizer.step()
    optimizer.step()
    assert prox.applied == 2 and prox.layers[1].module is model[2]
    assert torch.equal(orphan.weight, before[0])
    torch.testing.assert_close(model[2].weight.detach(), ck.svt(before[1], 0.1))
    model.append(nn.Linear(6, 6).double())
    optimizer.add_param_group({"params": model[3].parameters()})
    assert [entry.name for entry in prox.report()] == ["0", "2", "3"]


def test_a_skipped_layer_may_go():
    model = network()
    optimizer = sgd(model)
    prox = attached(model, optimizer, skip=["2"])
    del model[2]
    prox.step()
    assert [layer.name for layer in prox.layers] == ["0"] and not prox.skipped


def overwritten(model, optimizer):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def frozen(model, optimizer):
    model.requires_grad_(False)


def only_biases(model, optimizer):
    optimizer.param_groups[0]["params"] = [model[0].bias, model[2].bias]


@pytest.mark.parametrize("change", [overwritten, frozen, only_biases])
def test_a_step_that_changes_no_layer_warns_once(change):
    model = network()
    optimizer = sgd(model)
    prox = attached(model, optimizer)
    train(model, optimizer, 2)
    change(model, optimizer)
    with pytest.warns(UserWarning, match="proximal step: no layer was changed; the optimizer trains none") as found:
        for _ in range(4):
            optimizer.step()
    assert len(found) == 1 and prox.applied == 3


def test_a_step_with_a_learning_rate_or_strengths_of_zero_does_not_warn():
    model = network()
    optimizer = sgd(model, lr=0.0)
    prox = attached(model, optimizer)
    prox.step()
    ck.ProximalStep(model, optimizer).step()
    assert prox.applied == 1


def test_only_layers_without_a_penalty_are_trained():
    model = network()
    optimizer = sgd(model)
    prox = attached(model, optimizer, nuclear={"0": 0.1}, group=0.0)
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="trains only layers without a penalty"):
        prox.step()
