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
from .common import Compression, first_sample

__all__ = ["STATE_FILE", "CompressionAware"]

STATE_FILE = "compaware_kernels.pt"


class CompressionAware(Compression, TrainerCallback):
    """Callback that takes the proximal steps of :class:`compaware_kernels.ProximalStep` while ``Trainer.train`` runs:

        ``W <- prox(W, t * strength * ramp)``

    with t the current learning rate. Optimizer steps are counted: not accumulated batches, and not steps that a
    GradScaler skips. With ``every="epoch"`` the proximal step follows the last optimizer step of each epoch: before the
    epoch's evaluation and checkpoint, after the scheduler. The Trainer's default schedule ends at 0, so that the last
    proximal step has no effect: prefer ``every=10``, or another schedule. An epoch that ends early, as by
    ``max_steps``, has its proximal step then.

    The state is saved as ``compaware_kernels.pt`` in each checkpoint folder; ``train(resume_from_checkpoint=)`` resumes
    bitwise reproducibly. Ranks and fractions of nonzero rows (:meth:`compaware_kernels.ProximalReport.scalars`) go to
    ``state.log_history``, and to the Trainer's reporters if the callback is given the Trainer::

        trainer.add_callback(CompressionAware(trainer, nuclear=2.0, every=10))

    Args:
        trainer: the Trainer whose reporters (TensorBoard and others, not the progress bar) get the ranks. The Trainer
            does not pass itself to its callbacks.
        every, and the strengths of the penalties, fold, skip, warmup, order and all else of ProximalStep: as there.
        log_every: ``"epoch"``, a number of optimizer steps, or None for never. Each report computes the singular values
            of all layers.
        save_to: file for the compressed model, written when training ends; None: no compression. The model itself is
            not compressed. ``compaware_kernels.load(save_to, Model(config))`` loads the file.
        ranks: a rank rule, or rules by layer name, for :func:`compaware_kernels.compress`; default ``energy(0.99)``.
        compress: options of ``compress``: ``{"goal": "size"}``. ``skip`` and ``fold`` are those above by default.
        example_inputs: for ``compress``, positional arguments of the model's ``forward``, or a mapping of keyword
            arguments. Default: the entries of the first training sample that ``forward`` has parameters for.
        resume_from: checkpoint folder to resume from, if it is neither ``args.resume_from_checkpoint`` nor in
            ``args.output_dir``; the Trainer does not pass it to its callbacks.

    Attributes:
        proxes: the ProximalStep, in a list.
        compress_report: the report of ``compress``, on rank 0.

    Raises:
        ValueError, when training starts: FSDP 1 or DeepSpeed, which flatten the weights; the checkpoint to resume from
            is not found, or of another step; all errors of ProximalStep.
        TypeError: unknown options.
        FileNotFoundError, when training starts: the folder of ``save_to`` does not exist.
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
            raise ValueError("distributed_type: wanted one device, DistributedDataParallel or FSDP 2; got "
                             f"{kind.value}, which flattens the weights")  # fmt: skip
        self._saved = self._read(args, state) if state.global_step else {}
        self._attach(model, [optimizer], process_group=_process_group(args, model))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Not in on_epoch_end: saving or evaluating every k steps may come at the last step of an epoch, before that.
        self._log(args, state, control, self._after_batch(trained=True, epoch_over=float(state.epoch).is_integer()))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log(args, state, control, self._after_batch(trained=False, epoch_over=True))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_hyper_param_search or args.save_only_model:
            return
        saved = {"global_step": state.global_step, **self._state()}  # on every rank: it may be a collective call
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
        """State from the checkpoint folder that training resumes from; empty, with a warning, if it has none."""
        folders = [Path(p) for p in (self.resume_from, args.resume_from_checkpoint, _checkpoint(args, state)) if p]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise ValueError(f"resume_from: wanted the checkpoint folder of step {state.global_step}; got none in "
                             f"{' or '.join(map(str, folders))}")  # fmt: skip
        if not (folder / STATE_FILE).is_file():
            warnings.warn(f"{folder} was saved without CompressionAware: its step counts start at 0", stacklevel=2)
            return {}
        saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        if saved["global_step"] != state.global_step:
            raise ValueError(f"resume_from: wanted the checkpoint folder of step {state.global_step}; got "
                             f"{folder / STATE_FILE} of step {saved['global_step']}")  # fmt: skip
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
    """The Trainer's checkpoint folder of the current step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _first_sample(loader: DataLoader) -> object:
    """First sample as a batch of one; from the data set, since several ranks must iterate the loader together."""
    data = loader.dataset
    return first_sample(loader.collate_fn([next(iter(data)) if isinstance(data, IterableDataset) else data[0]]))


def _process_group(args: TrainingArguments, model: nn.Module) -> dist.ProcessGroup | None:
    """Ranks with the same weights, since callbacks get the model without its DDP wrapper; None for DTensors."""
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    return dist.group.WORLD if args.parallel_mode is ParallelMode.DISTRIBUTED and not sharded else None
