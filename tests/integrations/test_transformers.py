"""Callback for transformers: weights of a plain training loop, order of hooks, resuming, logging, compression."""

import os
import shutil
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.training_args import ParallelMode

import compaware_kernels as ck
from compaware_kernels.integrations import common
from compaware_kernels.integrations import transformers as integration
from compaware_kernels.integrations.transformers import STATE_FILE, CompressionAware
from tests.helpers.trainer_cases import (
    EPOCHS,
    STRENGTHS,
    images,
    network,
    optimizer_of,
    plain_loop,
    same,
    same_state,
    scalars_of,
)

STEPS = 6  # optimizer steps per epoch
SAMPLES = [{"x": x, "labels": y} for x, y in zip(*images(), strict=True)]


class Classifier(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.net, self.dropout = network(), nn.Dropout(dropout)

    def forward(self, x, labels=None):
        logits = self.net(self.dropout(x))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Ordered(Trainer):
    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, 32, collate_fn=self.data_collator))


def trainer(folder, *callbacks, kind=Ordered, model=None, optimizer=None, schedule=None, data=SAMPLES, **options):
    options = {"num_train_epochs": EPOCHS, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none",
               "save_strategy": "no", "per_device_train_batch_size": 32, "disable_tqdm": True,
               "logging_strategy": "no"} | options  # fmt: skip
    arguments = TrainingArguments(output_dir=folder, use_cpu=True, **options)
    model = model or Classifier()
    return kind(model, arguments, train_dataset=data, eval_dataset=SAMPLES, callbacks=list(callbacks),
                optimizers=(optimizer or optimizer_of(model), schedule))  # fmt: skip


def train(folder, *callbacks, resume=None, **options):
    run = trainer(folder, *callbacks, **options)
    run.train(resume_from_checkpoint=resume)
    return run.model


ACCUMULATED = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.1}


@pytest.mark.parametrize("every", ["epoch", 2])
@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        (ACCUMULATED, {"accumulate": 4, "clip": 0.1, "shares": [4, 4, 4, 4, 2, 2]}),
        ({"bf16": True}, {"dtype": torch.bfloat16}),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, {}),
    ],
    ids=["plain", "accumulated", "bf16", "compiled"],
)
def test_same_weights_as_a_plain_loop(every, options, loop, tmp_path):
    callback = CompressionAware(every=every, **STRENGTHS)
    model = train(tmp_path, callback, **options)
    plain = Classifier()
    prox = ck.ProximalStep(plain, optimizer_of(plain), every=every, **STRENGTHS)
    plain_loop(plain, prox, **loop)
    assert same(model, plain) and not same(Classifier(), plain)
    assert same_state(callback.proxes[0], prox) and prox.applied > 0


class Watch(TrainerCallback):
    """Proximal steps taken before each evaluation and checkpoint, and thresholds at the end of each epoch."""

    def __init__(self, callback):
        self.callback, self.evaluated, self.saved, self.thresholds = callback, [], [], []

    def on_evaluate(self, *args, **kwargs):
        self.evaluated.append(self.callback.proxes[0].applied)

    def on_save(self, args, state, control, **kwargs):
        folder = integration._checkpoint(args, state)
        weight = load_file(folder / "model.safetensors")["net.2.weight"]
        (proximal,) = torch.load(folder / STATE_FILE, weights_only=True)["proxes"]
        rank = int(ck.ranks.numerical_rank(torch.linalg.svdvals(weight), weight.dtype))
        self.saved.append((proximal["applied"], rank))

    def on_epoch_end(self, *args, **kwargs):
        self.thresholds.append(self.callback.proxes[0].thresholds()["net.2"]["nuclear"])


@pytest.mark.parametrize("when", [{"strategy": "epoch"}, {"strategy": "steps", "steps": STEPS}], ids=str)
def test_evaluation_and_checkpoint_of_an_epoch_come_after_its_proximal_step(when, tmp_path):
    callback = CompressionAware(nuclear=60.0)
    watch = Watch(callback)
    model = Classifier()
    optimizer = optimizer_of(model)
    options = {f"{what}_{name}": value for what in ("eval", "save") for name, value in when.items()}
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, STEPS, 0.5)
    train(tmp_path, callback, watch, model=model, optimizer=optimizer, schedule=schedule, **options)
    assert watch.evaluated == [1, 2, 3]
    assert [applied for applied, _ in watch.saved] == [1, 2, 3]
    assert all(rank < 80 for _, rank in watch.saved), "before the proximal step it is 96"
    assert watch.thresholds == pytest.approx([0.6, 0.3, 0.15]), "the current learning rate"


@pytest.mark.parametrize("every", [3, "epoch"])
def test_resuming_is_bitwise_identical_to_not_stopping(every, tmp_path):
    """From checkpoints in the middle of an epoch, at its last step, and before a proximal step."""

    def run(resume=None, **options):
        torch.manual_seed(0)
        callback = CompressionAware(every=every, log_every=4, **STRENGTHS)
        shuffling = {"kind": Trainer, "model": Classifier(dropout=0.2), "lr_scheduler_type": "linear"}
        started = trainer(tmp_path, callback, **shuffling, **options)
        started.train(resume_from_checkpoint=resume)
        logged = [entry["step"] for entry in started.state.log_history if "rank_share" in entry]
        return started.model, callback.proxes[0], logged

    model, prox, _ = run(save_strategy="steps", save_steps=1)
    for step in (5, 6, 8, 12):
        again, resumed, logged = run(str(tmp_path / f"checkpoint-{step}"))
        assert same(model, again) and same_state(prox, resumed), step
        assert resumed.applied == EPOCHS * (1 if every == "epoch" else 2)
        assert logged == [4, 8, 12, 16]


def test_folders_searched_for_the_state(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    train(there, CompressionAware(nuclear=1.0), save_strategy="epoch", save_total_limit=1)
    last = there / "checkpoint-18"
    assert os.listdir(there) == [last.name] and not [name for name in os.listdir(last) if name.startswith(".")]
    callback = CompressionAware(nuclear=1.0)
    train(there, callback, resume=True, num_train_epochs=4)
    assert callback.proxes[0].applied == 4
    with pytest.raises(ValueError, match=r"resume_from: wanted .*step 18; got none in .*here.checkpoint-18"):
        train(here, CompressionAware(nuclear=1.0), resume=str(last))
    callback = CompressionAware(nuclear=1.0, resume_from=last)
    train(here, callback, resume=str(last), num_train_epochs=4)
    assert callback.proxes[0].applied == 4
    shutil.copytree(last, there / "checkpoint-6")
    torch.save(torch.load(last / STATE_FILE) | {"global_step": 6}, last / STATE_FILE)
    with pytest.raises(ValueError, match=r"wanted the checkpoint folder of step 18; got .* of step 6"):
        train(there, CompressionAware(nuclear=1.0), resume=str(last))
    (last / STATE_FILE).unlink()
    callback = CompressionAware(nuclear=1.0)
    with pytest.warns(UserWarning, match="saved without CompressionAware"):
        train(there, callback, resume=str(last), num_train_epochs=4)
    assert callback.proxes[0].applied == 1


def test_a_failed_save_leaves_no_file(tmp_path, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    (tmp_path / "checkpoint-3").mkdir()
    monkeypatch.setattr(torch, "save", full)
    arguments = SimpleNamespace(output_dir=tmp_path, save_only_model=False, should_save=True)
    with pytest.raises(OSError, match="no space left"):
        CompressionAware().on_save(arguments, SimpleNamespace(global_step=3, is_hyper_param_search=False), None)
    assert not os.listdir(tmp_path / "checkpoint-3")


def test_steps_that_the_scaler_skips_do_not_count(tmp_path):
    class Overflows(Classifier):
        def forward(self, x, labels=None):
            out, self.seen = super().forward(x, labels), getattr(self, "seen", 0) + 1
            return {"loss": out["loss"] * (torch.inf if self.seen == 3 else 1.0)}

    callback = CompressionAware(nuclear=1.0, every=1)
    run = trainer(tmp_path, callback, model=Overflows(), num_train_epochs=1)
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    run.train()
    assert callback.proxes[0].steps == callback.proxes[0].applied == STEPS - 1
    callback.proxes[0].optimizer.step()
    assert callback.proxes[0].steps == STEPS - 1, "training is over"


def test_an_epoch_that_ends_early_ends_with_a_proximal_step(tmp_path):
    callback = CompressionAware(nuclear=1.0)
    train(tmp_path, callback, max_steps=8)
    assert callback.proxes[0].applied == 2


@pytest.mark.parametrize(("log_every", "steps"), [("epoch", [6, 12, 18]), (4, [4, 8, 12, 16])])
@pytest.mark.parametrize("quiet", [True, False])
def test_ranks_are_logged_to_tensorboard_but_not_to_the_terminal(log_every, steps, quiet, tmp_path, capsys):
    run = trainer(tmp_path, report_to=["tensorboard"], disable_tqdm=quiet)
    callback = CompressionAware(run, nuclear=20.0, log_every=log_every)
    run.add_callback(callback)
    run.train()
    assert "rank" not in "".join(capsys.readouterr())
    found, wanted = scalars_of(tmp_path), callback.proxes[0].report().scalars()
    assert "rank/net.0" in wanted and all([step for step, _ in found[f"train/{tag}"]] == steps for tag in wanted)
    history = [entry for entry in run.state.log_history if "rank_share" in entry]
    assert [entry["step"] for entry in history] == steps
    if log_every == "epoch":
        last = {tag: found[f"train/{tag}"][-1][1] for tag in wanted}
        assert last == pytest.approx(wanted) and {tag: history[-1][tag] for tag in wanted} == wanted
        assert wanted["rank_share"] < 0.95


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.parametrize("kind", [list, Stream])
def test_the_compressed_model_is_saved_and_the_model_is_not_changed(kind, tmp_path):
    path = tmp_path / "small.safetensors"
    data = kind([{"pixel_values": s["x"].reshape(1, 8, 8), "labels": s["labels"]} for s in SAMPLES])
    options = {"kind": Trainer, "data": data, "bf16": True, "max_steps": 12}
    shrink = {"nuclear": 5.0, "skip": ["classifier", "*.projection"], "every": 3}
    callback = CompressionAware(save_to=path, ranks=ck.ranks.fixed(3), compress={"goal": "size"}, **shrink)
    model = train(tmp_path, callback, model=vit(), **options)
    assert same(model, train(tmp_path, CompressionAware(**shrink), model=vit(), **options))
    clean, x = vit(), SAMPLES[0]["x"].reshape(1, 1, 8, 8)
    clean.load_state_dict(model.state_dict())
    small, report = ck.compress(clean, ck.ranks.fixed(3), (x,), goal="size", skip=shrink["skip"])
    assert str(report) == str(callback.compress_report) and report.params < report.params_before
    with torch.no_grad():
        torch.testing.assert_close(ck.load(path, vit())(x).logits, small.eval()(x).logits, rtol=0, atol=0)


def test_positional_inputs_from_a_batch():
    class Model(nn.Module):
        def forward(self, x, mask=None, y=None, *, more=None):
            return x

    x, y = torch.randn(4, 2), torch.randn(4)
    first = common.positional_inputs(Model(), common.first_sample({"y": y, "other": x, "x": x}))
    torch.testing.assert_close(first, (x[:1], None, y[:1]))
    torch.testing.assert_close(common.positional_inputs(Model(), common.first_sample([x, y])), (x[:1],))
    torch.testing.assert_close(common.positional_inputs(Model(), common.first_sample(x)), (x[:1],))
    with pytest.raises(ValueError, match="wanted a batch with one of x, mask, y, more; got pixels"):
        common.positional_inputs(Model(), {"pixels": x})


def test_process_group_of_ranks_with_the_same_weights(tmp_path):
    model, distributed = Classifier(), SimpleNamespace(parallel_mode=ParallelMode.DISTRIBUTED)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert integration._process_group(distributed, model) is dist.group.WORLD
        assert integration._process_group(SimpleNamespace(parallel_mode=ParallelMode.NOT_DISTRIBUTED), model) is None
        mesh = dist.init_device_mesh("cpu", (1,))
        dist.tensor.parallel.parallelize_module(model.net[0], mesh, dist.tensor.parallel.ColwiseParallel())
        assert integration._process_group(distributed, model) is None
    finally:
        dist.destroy_process_group()


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="nuclaer"):
        CompressionAware(nuclaer=1.0)
    with pytest.raises(FileNotFoundError, match=r"save_to: wanted a file in an existing folder; got .*absent"):
        train(tmp_path, CompressionAware(save_to=tmp_path / "absent" / "x"))
    with pytest.raises(ValueError, match="'absent' matches no layer"):
        train(tmp_path, CompressionAware(skip=["absent"]))
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        run = trainer(tmp_path, CompressionAware())
        state = SimpleNamespace(distributed_type=kind, fsdp_plugin=SimpleNamespace(fsdp_version=1))
        monkeypatch.setattr(integration, "AcceleratorState", lambda state=state: state)
        with pytest.raises(ValueError, match=f"{kind.value}, which flattens"):
            run.train()
