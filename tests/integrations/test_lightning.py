"""Lightning callback: weights of a plain training loop, order of hooks, resuming, logging, the compressed module."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch.utils.data import DataLoader

import compaware_kernels as ck
from compaware_kernels.integrations.lightning import CompressionAware
from tests.helpers.trainer_cases import (
    EPOCHS,
    STRENGTHS,
    batches,
    network,
    optimizer_of,
    plain_loop,
    same,
    same_state,
    scalars_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")  # about small loaders and logging intervals
STEPS = 6  # optimizer steps per epoch


@pytest.fixture(autouse=True)
def clean_process():
    """Remove the process group and the environment variables that the DDP strategy leaves behind."""
    with mock.patch.dict(os.environ):
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Digits(L.LightningModule):
    """Takes its batches by index: a resumed Trainer restarts its loader, but not its batch index."""

    def __init__(self, schedule=False):
        super().__init__()
        self.net, self.data, self.schedule = network(), batches(), schedule

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = self.data[batch_idx]
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = optimizer_of(self.net)
        return ([optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]) if self.schedule else optimizer


def loader():
    return DataLoader(batches(), batch_size=None)


def trainer(folder, *callbacks, max_epochs=EPOCHS, **options):
    options = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    } | options
    return L.Trainer(max_epochs=max_epochs, accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder,
                     enable_progress_bar=False, enable_model_summary=False, **options)  # fmt: skip


def fit(folder, *callbacks, module=None, **options):
    module = module or Digits()
    trainer(folder, *callbacks, **options).fit(module, loader())
    return module


@pytest.mark.parametrize("every", ["epoch", 2])
@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}, {"accumulate": 4, "clip": 0.1}),
        ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
        ({"strategy": "ddp", "devices": 1}, {}),
    ],
    ids=["plain", "accumulated", "bf16", "ddp"],
)
def test_same_weights_as_a_plain_loop(every, options, loop, tmp_path):
    callback = CompressionAware(every=every, **STRENGTHS)
    module = fit(tmp_path, callback, module=Digits(schedule=True), **options)
    model = Digits()
    optimizer = optimizer_of(model)
    prox = ck.ProximalStep(model, optimizer, every=every, **STRENGTHS)
    plain_loop(model, prox, schedule=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), **loop)
    assert same(module, model) and not same(Digits(), model)
    assert same_state(callback.proxes[0], prox) and prox.applied > 0


class Watch(Callback):
    """Proximal steps taken before each validation and each checkpoint of a run."""

    def __init__(self, callback):
        self.callback, self.validated, self.saved = callback, [], []

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(self.callback.proxes[0].applied)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        (state,) = checkpoint["callbacks"]["CompressionAware"]["proxes"]
        weight = checkpoint["state_dict"]["net.2.weight"]
        self.saved.append((state["applied"], int(ck.ranks.numerical_rank(torch.linalg.svdvals(weight), weight.dtype))))


@pytest.mark.parametrize(
    "options",
    [{}, {"save_on_train_epoch_end": True}, {"every_n_train_steps": STEPS}],
    ids=["validated", "end", "steps"],
)
def test_validation_and_checkpoint_of_an_epoch_come_after_its_proximal_step(options, tmp_path):
    callback = CompressionAware(nuclear=60.0)
    watch = Watch(callback)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, **options)
    trainer(tmp_path, saver, watch, callback).fit(Digits(), loader(), loader())
    assert watch.validated == [1, 2, 3]
    assert [applied for applied, _ in watch.saved] == [1, 2, 3]
    assert all(rank < 48 for _, rank in watch.saved), "before the proximal step it is 96"


@pytest.mark.parametrize("every", [3, "epoch"])
def test_resuming_is_bitwise_identical_to_not_stopping(every, tmp_path):
    """From checkpoints in the middle of an epoch, at its last step, and at its validation."""

    def run(*others, resume=None):
        module, callback = Digits(), CompressionAware(every=every, **STRENGTHS)
        started = trainer(tmp_path, callback, *others)
        started.fit(module, loader(), loader(), ckpt_path=resume, weights_only=True)
        assert started.global_step == EPOCHS * STEPS
        return module, callback.proxes[0]

    steps = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    epochs = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, prox = run(steps, epochs)
    for name in ("step=1", "step=5", "step=6", "step=8", "step=12", "epoch=0", "epoch=1"):
        again, resumed = run(resume=tmp_path / f"{name}.ckpt")
        assert same(module, again) and same_state(prox, resumed), name
        assert resumed.applied == EPOCHS * (1 if every == "epoch" else 2)


def test_fit_after_validating_a_checkpoint_does_not_resume_from_it(tmp_path):
    fit(tmp_path, CompressionAware(nuclear=1.0), ModelCheckpoint(tmp_path, "it"))
    callback = CompressionAware(nuclear=1.0)
    run = trainer(tmp_path, callback)
    module = Digits()
    run.validate(module, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    run.fit(module, loader())
    assert callback.proxes[0].applied == EPOCHS


def test_steps_that_the_scaler_skips_do_not_count(tmp_path):
    class Overflows(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 3 else 1.0)

    callback = CompressionAware(nuclear=1.0, every=1)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fit(tmp_path, callback, module=Overflows(), plugins=[precision], max_epochs=1)
    assert callback.proxes[0].steps == callback.proxes[0].applied == STEPS - 1


@pytest.mark.parametrize(("options", "applied"), [({"max_steps": 8}, 2), ({"limit_train_batches": 4}, 3)], ids=str)
def test_shortened_epochs_end_with_a_proximal_step(options, applied, tmp_path):
    callback = CompressionAware(nuclear=1.0)
    fit(tmp_path, callback, **options)
    assert callback.proxes[0].applied == applied


@pytest.mark.parametrize(("log_every", "steps"), [("epoch", [6, 12, 18]), (4, [4, 8, 12, 16]), (None, None)])
def test_ranks_are_logged_to_tensorboard_but_not_to_the_progress_bar(log_every, steps, tmp_path):
    callback = CompressionAware(log_every=log_every, nuclear=20.0)
    run = trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path))
    run.fit(Digits(), loader(), loader())
    found = scalars_of(tmp_path)
    assert not any("rank" in name for name in run.progress_bar_metrics)
    wanted = callback.proxes[0].report().scalars()
    if steps is None:
        assert not found.keys() & wanted.keys()
        return
    assert wanted.keys() <= found.keys() and "rank/net.0" in wanted
    assert all([step for step, _ in found[tag]] == steps for tag in wanted)
    if log_every == "epoch":
        assert {tag: found[tag][-1][1] for tag in wanted} == pytest.approx(wanted)
        assert wanted["rank_share"] < 0.9


def test_a_checkpoint_callback_can_monitor_the_rank(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="rank_share", mode="min")
    callback = CompressionAware(nuclear=20.0)
    trainer(tmp_path, saver, callback).fit(Digits(), loader(), loader())
    assert float(saver.best_model_score) == pytest.approx(callback.proxes[0].report().scalars()["rank_share"])


@pytest.mark.parametrize("compiled", [False, True])
def test_the_compressed_module_is_saved_and_the_module_is_not_changed(compiled, tmp_path):
    path = tmp_path / "small.safetensors"
    options = {"nuclear": 20.0, "skip": ["net.4"]}
    callback = CompressionAware(save_to=path, ranks=ck.ranks.fixed(3), compress={"goal": "size"}, **options)
    module = Digits()
    given = torch.compile(module, backend="eager") if compiled else module
    trainer(tmp_path, callback).fit(given, loader())
    assert same(fit(tmp_path, CompressionAware(**options)), module)
    clean, x = Digits(), batches()[0][0]
    clean.load_state_dict(module.state_dict())
    small, report = ck.compress(clean, ck.ranks.fixed(3), (x[:1],), goal="size", skip=["net.4"])
    assert str(report) == str(callback.compress_report) and report.params < report.params_before
    with torch.no_grad():
        torch.testing.assert_close(ck.load(path, Digits())(x), small(x), rtol=0, atol=0)


class TwoOptimizers(Digits):
    """Manual optimization: an optimizer for the network, twice a batch, and one for the rest, foldable or not."""

    def __init__(self, scales=False):
        super().__init__()
        self.automatic_optimization, self.gain = False, torch.nn.PReLU(10)
        self.head = torch.nn.Identity() if scales else torch.nn.Linear(10, 10)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second, first):
            optimizer.zero_grad()
            x, y = self.data[batch_idx]
            self.manual_backward(F.cross_entropy(self.head(self.gain(self.net(x))), y))
            optimizer.step()

    def configure_optimizers(self):
        rest = [*self.gain.parameters(), *self.head.parameters()]
        return torch.optim.SGD(self.net.parameters(), 0.1), torch.optim.SGD(rest, 0.01)


def test_one_proximal_step_object_for_each_optimizer_that_trains_foldable_layers(tmp_path):
    callback = CompressionAware(nuclear=1.0, every=2)
    fit(tmp_path, callback, ModelCheckpoint(tmp_path, "two"), module=TwoOptimizers())
    steps = [(prox.steps, len(prox.thresholds())) for prox in callback.proxes]
    assert steps == [(2 * STEPS * EPOCHS, 3), (STEPS * EPOCHS, 1)]
    one = CompressionAware(nuclear=1.0, every=2)
    module = fit(tmp_path, one, module=TwoOptimizers(scales=True))
    assert len(one.proxes) == 1 and one.proxes[0].steps == 2 * STEPS * EPOCHS
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]["CompressionAware"]
    one.load_state_dict(state)
    with pytest.raises(ValueError, match="one ProximalStep state for each of 1 optimizers; got 2"):
        one._attach(module, module.configure_optimizers())


def test_no_proximal_step_is_taken_after_training_or_a_failure(tmp_path):
    class Fails(Digits):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    callback = CompressionAware(nuclear=1.0, every=1)
    with pytest.raises(ArithmeticError):
        fit(tmp_path, callback, module=Fails())
    callback.proxes[0].optimizer.step()
    assert callback.proxes[0].steps == 2
    fit(tmp_path, callback, max_epochs=1)
    callback.proxes[0].optimizer.step()
    assert callback.proxes[0].steps == STEPS


def test_errors(tmp_path):
    with pytest.raises(TypeError, match="nuclaer"):
        CompressionAware(nuclaer=1.0)
    with pytest.raises(TypeError, match="gaol"):
        CompressionAware(compress={"gaol": "size"})
    with pytest.raises(ValueError, match=r"log_every: wanted 'epoch'.*got 0"):
        CompressionAware(log_every=0)
    with pytest.raises(FileNotFoundError, match=r"save_to: wanted a file in an existing folder; got .*absent"):
        fit(tmp_path, CompressionAware(save_to=tmp_path / "absent" / "x"))
    with pytest.raises(ValueError, match="FSDPStrategy, which flattens"):
        CompressionAware().setup(SimpleNamespace(strategy=FSDPStrategy()), Digits(), "fit")
    module = Digits()
    module.configure_optimizers = lambda: None
    with pytest.raises(ValueError, match="nothing to shrink"):
        fit(tmp_path, CompressionAware(nuclear=1.0), module=module)


ALONE = """
import sys
import compaware_kernels.integrations
assert not {"lightning", "pytorch_lightning", "transformers", "accelerate"} & sys.modules.keys(), "imported too early"
sys.modules["lightning"] = None  # makes its import fail
import pytorch_lightning as pl, torch
from compaware_kernels.integrations.lightning import CompressionAware
class Module(pl.LightningModule):
    def __init__(self): super().__init__(); self.net = torch.nn.Linear(4, 4)
    def training_step(self, batch, batch_idx): return self.net(batch).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)
callback = CompressionAware(nuclear=0.1)
pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
           callbacks=[callback]).fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 4)))
print("applied", callback.proxes[0].applied)
"""


@pytest.mark.slow
def test_pytorch_lightning_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert "applied 2" in done.stdout, done.stderr[-2000:]
