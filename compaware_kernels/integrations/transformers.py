"""Compression-aware training with transformers: ``Trainer(callbacks=[CompressionAware(nuclear=2.0)])``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode

from .._utils.atomic_write import atomic_write
from .common import Compression, sample

STATE_FILE = "compaware_kernels.pt"


class CompressionAware(Compression, TrainerCallback):
    """Takes the proximal steps of :class:`compaware_kernels.ProximalStep` while ``Trainer.train`` runs:

        ``W <- prox(W, t * strength * ramp)``

    with t the learning rate now. Counted are optimizer steps, so neither accumulated batches nor steps that a
    GradScaler skips. With ``every="epoch"`` the step follows the last optimizer step of each epoch: before the epoch's
    evaluation and its checkpoint, after the scheduler. The Trainer's default schedule ends at 0, and so makes the last
    such step none: prefer ``every=10``, or another schedule. An epoch cut short, by ``max_steps`` say, has its proximal
    step when it ends.

    The state lies in each checkpoint folder as ``compaware_kernels.pt``; ``train(resume_from_checkpoint=)`` goes on as
    if it had never stopped. Ranks and shares of live rows (:meth:`compaware_kernels.ProximalReport.scalars`) go to
    ``state.log_history``, and to the Trainer's reporters if the callback knows the Trainer::

        trainer.add_callback(CompressionAware(trainer, nuclear=2.0, every=10))

    Args:
        trainer: whose reporters (TensorBoard and others) get the ranks; its progress bar does not. The Trainer calls
            no callback with a way to them.
        every, nuclear, group, l1, fold, skip, warmup, order, scale_by_lr, center: as for ProximalStep.
        log_every: ``"epoch"``, a number of optimizer steps, or None for never. Each time costs the singular values of
            all layers.
        save_to: where to save the compressed model when training ends; None: nowhere. The model stays as trained.
            ``compaware_kernels.load(save_to, Model(config))`` gives it back.
        ranks: a rank rule, or rules by layer name, for :func:`compaware_kernels.compress`; default ``energy(0.99)``.
        compress: options of ``compress``: ``{"goal": "size"}``. Layers of ``skip`` are left alone, the fold is kept.
        example_inputs: for ``compress``, positional inputs of the model's ``forward``. Default: what ``forward`` names
            of the first training sample.
        resume_from: the checkpoint folder, where it is neither ``args.resume_from_checkpoint`` nor in
            ``args.output_dir``: the Trainer does not tell its callbacks.

    Attributes:
        proxes: the ProximalStep, in a list.
        compress_report: what ``compress`` did, on the process of rank 0.

    Raises:
        ValueError, as training starts: FSDP 1 or DeepSpeed, which hide the weights; the checkpoint resumed from is not
            found, or of another run; all that ProximalStep refuses.
        TypeError, at once: unknown options.  FileNotFoundError, as training starts: ``save_to`` in no folder.
    """

    def __init__(self, trainer: Trainer | None = None, *, resume_from: str | Path | None = None, **options: Any):
        super().__init__(**options)
        self.trainer, self.resume_from = trainer, resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *,
        model: nn.Module, optimizer: Optimizer, **_: Any,
    ) -> None:  # fmt: skip
        accelerator = AcceleratorState()
        kind, plugin = accelerator.distributed_type, getattr(accelerator, "fsdp_plugin", None)
        if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and plugin.fsdp_version == 1):
            raise ValueError(f"{kind.value} flattens and splits the weights: they are no matrices any more; "
                             "wanted one device, DistributedDataParallel or FSDP 2")  # fmt: skip
        self._saved = self._read(args, state) if state.global_step else {}
        self._attach(model, [optimizer], process_group=_process_group(args, model))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Here, not in on_epoch_end: what is saved or evaluated every so many steps may fall on an epoch's last one.
        self._log(args, state, control, self._after(trained=True, epoch_over=float(state.epoch).is_integer()))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log(args, state, control, self._after(trained=False, epoch_over=True))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_hyper_param_search or args.save_only_model:
            return
        saved = {"global_step": state.global_step, **self._state()}  # on every rank: it may take all to gather
        if args.should_save:
            with atomic_write(_checkpoint(args, state) / STATE_FILE) as new:
                torch.save(saved, new)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *,
        model: nn.Module, train_dataloader: DataLoader, **_: Any,
    ) -> None:  # fmt: skip
        self._detach()
        if self.save_to and state.is_world_process_zero:
            self._finish(model, None if self.example_inputs else _first_sample(train_dataloader))

    def _read(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """The state in the checkpoint that training resumes from."""
        folders = [Path(p) for p in (self.resume_from, args.resume_from_checkpoint, _checkpoint(args, state)) if p]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise ValueError(f"training resumes at step {state.global_step}, but not from "
                             f"{' or '.join(map(str, folders))}: wanted CompressionAware(resume_from=)")  # fmt: skip
        if not (folder / STATE_FILE).is_file():
            warnings.warn(f"{folder} was saved without CompressionAware: its counts start at 0", stacklevel=2)
            return {}
        saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        if saved["global_step"] != state.global_step:
            raise ValueError(f"{folder / STATE_FILE} is of step {saved['global_step']}; training resumes at step "
                             f"{state.global_step}: wanted CompressionAware(resume_from=)")  # fmt: skip
        return saved

    def _log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, scalars: dict[str, float]
    ) -> None:
        if not scalars:
            return
        state.log_history.append({**scalars, "epoch": state.epoch, "step": state.global_step})
        for callback in self.trainer.callback_handler.callbacks if self.trainer else ():
            if not isinstance(callback, (PrinterCallback, DEFAULT_PROGRESS_CALLBACK, CompressionAware)):
                callback.on_log(args, state, control, logs=dict(scalars), model=self.trainer.model)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _first_sample(loader: DataLoader) -> object:
    """As a batch. Not taken from the loader: on several processes all would have to ask it."""
    data = loader.dataset
    return sample(loader.collate_fn([next(iter(data)) if isinstance(data, IterableDataset) else data[0]]))


def _process_group(args: TrainingArguments, model: nn.Module) -> dist.ProcessGroup | None:
    """Who holds the same weights: callbacks get the model without its DistributedDataParallel. DTensors know it."""
    divided = any(hasattr(p, "full_tensor") for p in model.parameters())
    return dist.group.WORLD if args.parallel_mode is ParallelMode.DISTRIBUTED and not divided else None
