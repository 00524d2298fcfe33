"""ProximalStep with wrapped models and optimizers: torch.compile, checkpointing, DDP, averages, GradScaler."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import compaware_kernels as ck

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method")
STEPS = 8


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend="aot_eager")


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    return nn.Sequential(body, nn.Tanh(), nn.Linear(8, 6)).double()


def backward(model, i):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    (model(x) - x).square().mean().backward()


def train(model, optimizer, step=None, steps=STEPS):
    for i in range(steps):
        optimizer.zero_grad()
        backward(model, i)
        (step or optimizer.step)()


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | more)


def attached(model, optimizer, **more):
    return ck.ProximalStep(model, optimizer, **{"nuclear": 0.5, "group": 0.1, "l1": 0.01, "every": 3} | more)


def assert_same_weights(model, wanted):
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)


# --- models ---------------------------------------------------------------------------------------------------------


def wrapping_submodules(wrap):
    def change(model):
        model[0][2], model[2] = wrap(model[0][2]), wrap(model[2])
        model[0] = wrap(model[0])
        return model

    return change


def in_place(model):
    model[0][2].compile(backend="aot_eager")
    model.compile(backend="aot_eager")
    return model


WRAPS = {
    "compiled": compiled,
    "compiled inside": wrapping_submodules(compiled),
    "compiled in place": in_place,
    "checkpointed inside": wrapping_submodules(checkpoint_wrapper),
    "checkpointed, compiled": wrapping_submodules(lambda module: compiled(checkpoint_wrapper(module))),
    "compiled, checkpointed": wrapping_submodules(lambda module: checkpoint_wrapper(compiled(module))),
    "DataParallel, compiled": lambda model: compiled(DataParallel(model)),
    "DistributedDataParallel": DistributedDataParallel,
    "compiled, DistributedDataParallel": lambda model: DistributedDataParallel(compiled(model)),
    "DistributedDataParallel, compiled": lambda model: compiled(DistributedDataParallel(model)),
    "AveragedModel": AveragedModel,
    "AveragedModel, compiled": lambda model: AveragedModel(compiled(model)),
}


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_trains_like_the_model_itself(wrap, process_group):
    """Same layer names in patterns, ``skipped`` and state; bitwise identical weights and state."""
    plain, wrapped = network(), WRAPS[wrap](network())
    by = {"nuclear": {"0.*": 0.5, "2": 0.2}, "skip": ["0.0"]}
    optimizers = sgd(plain), sgd(wrapped)
    wanted, got = attached(plain, optimizers[0], **by), attached(wrapped, optimizers[1], **by)
    train(plain, optimizers[0])
    train(wrapped, optimizers[1])
    assert wanted.applied == got.applied == 2 and got.skipped == wanted.skipped == {"0.0": "skipped by name"}
    assert [layer.name for layer in got.layers] == ["0.2", "2"] and str(got.report()) == str(wanted.report())
    assert_same_weights(wrapped, plain)
    assert got.state_dict() == wanted.state_dict()


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_a_wrapped_layer_with_a_parametrized_weight_is_listed_once(wrap):
    """The wrapper forwards attributes: it must not count as a layer, too."""
    model = nn.Sequential(wrap(weight_norm(nn.Linear(6, 6))), wrap(spectral_norm(nn.Linear(6, 6))))
    prox = attached(model, sgd(model))
    assert [layer.name for layer in prox.layers] == ["0"] and list(prox.skipped) == ["1"]


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models_are_compressed_and_saved_without_their_wrappers(wrap, process_group, tmp_path):
    wrapped, plain, x = WRAPS[wrap](network()), network(), torch.randn(4, 6, dtype=torch.float64)
    wrapped(x)
    keys = list(wrapped.state_dict())
    wanted, plan = ck.compress(plain, ck.ranks.fixed(2), (x,), goal="size")
    small, report = ck.compress(wrapped, ck.ranks.fixed(2), (x,), goal="size")
    assert str(report) == str(plan) and "2/8" in str(report)
    assert list(small.state_dict()) == list(wanted.state_dict()) and torch.equal(small(x), wanted(x))
    assert list(wrapped.state_dict()) == keys, "the model itself has changed"
    ck.save(small, tmp_path / "small")
    ck.save(wrapped, tmp_path / "dense")
    for path, model in (("small", small), ("dense", plain)):
        for template in (network(), WRAPS[wrap](network())):
            assert torch.equal(ck.load(tmp_path / path, template)(x), model(x))


# --- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw, fused, tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), fused=True),
    "adam, tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adam, capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), capturable=True),
    "adagrad, fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def compiled_caller(optimizer):
    """A compiled function that calls ``optimizer.step``."""

    def function():
        optimizer.step()

    return compiled(function)


def compiled_step(optimizer):
    return compiled(optimizer.step)


COMPILED = [
    ("sgd", compiled_step),
    ("sgd", compiled_caller),
    ("adamw, fused, tensor lr", compiled_step),
    ("adam, capturable", compiled_caller),
]


@pytest.mark.parametrize(
    ("name", "compiling"), [*((name, None) for name in OPTIMIZERS if "capturable" not in name), *COMPILED]
)
def test_the_hook_runs_after_every_third_step_of_any_optimizer(name, compiling):
    """Same number and result as explicit calls of ``step``; compiled optimizers like eager ones."""

    def run(every, compiling):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        prox = attached(model, optimizer, every=every)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        step = compiling(optimizer) if compiling else optimizer.step
        for i in range(STEPS):
            train(model, optimizer, step, 1)
            if every == "epoch" and i % 3 == 2:
                prox.step()
            schedule.step()
        assert (prox.steps, prox.applied) == (STEPS, STEPS // 3)
        return model

    hooked = run(3, compiling)
    assert_same_weights(hooked, run("epoch", compiling))
    if compiling and "capturable" not in name:  # compiled, it may round differently; eager capturable needs CUDA
        torch.testing.assert_close(hooked.state_dict(), run(3, None).state_dict(), rtol=1e-5, atol=1e-5)


def test_attached_to_a_compiled_optimizer_and_detached_again():
    model, plain = network(), network()
    optimizer, wanted = sgd(model), sgd(plain)
    step = compiled(optimizer.step)
    train(model, optimizer, step, 2)
    train(plain, wanted, None, 2)
    prox, reference = attached(model, optimizer), attached(plain, wanted)
    train(model, optimizer, step)
    train(plain, wanted)
    assert prox.applied == reference.applied == 2
    assert_same_weights(model, plain)
    prox.remove()
    train(model, optimizer, step)
    assert prox.steps == STEPS


def test_a_compiled_function_takes_a_proximal_step():
    model, plain = network(), network()
    prox, wanted = attached(model, sgd(model)), attached(plain, sgd(plain))
    torch._dynamo.utils.counters.clear()
    compiled(lambda: prox.step())()
    wanted.step()
    assert_same_weights(model, plain)
    assert not torch._dynamo.utils.counters["stats"], "compiling the step takes half a minute, and is never reused"


def test_compiled_steps_are_compiled_once():
    model = network()
    optimizer = sgd(model)
    attached(model, optimizer, every=2)
    step = compiled(optimizer.step)
    train(model, optimizer, step, 4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, optimizer, step)


def test_capturing_optimizer_steps_in_a_cuda_graph_is_an_error(monkeypatch):
    """A replay runs no hooks: without an error the proximal steps would silently be missing."""
    model = network()
    optimizer = sgd(model)
    prox = attached(model, optimizer, every=2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"every: wanted 'epoch' .*CUDA graph"):
        optimizer.step()
    prox.every = "epoch"
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "sgd, fused", "adamw, fused, tensor lr", "adam, foreach", "adagrad, fused"])
@pytest.mark.parametrize("unscale", [False, True])
def test_steps_that_a_grad_scaler_skips_do_not_count(name, unscale):
    model = network().float()
    optimizer = OPTIMIZERS[name](model.parameters())
    prox = attached(model, optimizer, every=2)
    scaler, counted = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for i in range(6):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
        scaler.scale((model(x) - x).square().mean()).backward()
        if i in (1, 2):
            model[2].weight.grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        counted.append((prox.steps, prox.applied))
        if i in (1, 2):
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert counted == [(1, 0), (1, 0), (1, 0), (2, 1), (3, 1), (4, 2)]


# --- averages -------------------------------------------------------------------------------------------------------


def test_an_average_of_weights_has_full_rank_and_is_compressed_to_the_given_ranks():
    model = network()
    optimizer = sgd(model)
    prox = attached(model, optimizer, group=0.0, l1=0.0, nuclear=2.0, every=1)
    average = AveragedModel(model)
    seen = []
    for _ in range(3):
        train(model, optimizer, None, 1)
        average.update_parameters(model)
        seen.append(model[2].weight.detach().clone())
    torch.testing.assert_close(average.module[2].weight.detach(), sum(seen) / 3)
    ranks = {entry.name: ck.ranks.fixed(entry.rank) for entry in prox.report()}
    x = torch.randn(4, 6, dtype=torch.float64)
    own, _ = ck.compress(model, ranks, (x,), goal="size", remove_dead=False)
    small, report = ck.compress(average, ranks, (x,), goal="size", remove_dead=False)
    assert {r.name: r.rank for r in report.layers} == {r.name: r.rank for r in prox.report()}
    full = min(average.module[2].weight.shape)
    assert torch.linalg.matrix_rank(average.module[2].weight) == full > report.layers[-1].rank
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in own.parameters())
