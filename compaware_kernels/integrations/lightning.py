"""Compression-aware training with Lightning: ``Trainer(callbacks=[CompressionAware(nuclear=2.0)])``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from .common import Compression, first_sample

__all__ = ["CompressionAware"]


def _package() -> str:
    """Name of the Lightning package in use, of its two; each accepts only callbacks derived from its own class."""
    new, old = "lightning.pytorch", "pytorch_lightning"
    if old in sys.modules and new not in sys.modules:
        return old
    try:
        importlib.import_module(new)
        return new
    except ModuleNotFoundError:
        return old


pl = importlib.import_module(_package())


class CompressionAware(Compression, pl.Callback):
    """Callback that takes the proximal steps of :class:`compaware_kernels.ProximalStep` while ``Trainer.fit`` runs:

        ``W <- prox(W, t * strength * ramp)``

    with t the current learning rate. Each optimizer that holds weights of Linear layers or convolutions has its own
    ProximalStep. Optimizer steps are counted: not accumulated batches, and not steps that a GradScaler skips. With
    ``every="epoch"`` the proximal step follows the last batch of each training epoch: before the epoch's validation and
    checkpoints, after schedulers of interval "epoch" (with a learning rate that ends at 0 the last step has no effect).
    An epoch that ends early, as by ``max_steps``, has its proximal step then.

    The state is saved in the Trainer's checkpoints: ``fit(ckpt_path=)`` resumes bitwise reproducibly. Ranks and
    fractions of nonzero rows go to the Trainer's loggers and ``callback_metrics`` (``monitor="rank_share"``), see
    :meth:`compaware_kernels.ProximalReport.scalars`.

    Args:
        every, and the strengths of the penalties, fold, skip, warmup, order and all else of ProximalStep: as there;
            layer names are those in the LightningModule, ``net.0``.
        log_every: ``"epoch"``, a number of optimizer steps, or None for never. Each report computes the singular values
            of all layers.
        save_to: file for the compressed module, written when training ends; None: no compression. The module itself is
            not compressed. ``compaware_kernels.load(save_to, Module())`` loads the file.
        ranks: a rank rule, or rules by layer name, for :func:`compaware_kernels.compress`; default ``energy(0.99)``.
        compress: options of ``compress``: ``{"goal": "size"}``. ``skip`` and ``fold`` are those above by default.
        example_inputs: for ``compress``, positional arguments of the module's ``forward``, or a mapping of keyword
            arguments. Default: the first sample of the first batch; of a sequence its first entry, of a mapping the
            entries that ``forward`` has parameters for.

    Attributes:
        proxes: the ProximalStep objects, one for each optimizer.
        compress_report: the report of ``compress``, on rank 0.

    Raises:
        ValueError, when training starts: a strategy that flattens the weights (FSDP 1, DeepSpeed), no optimizer that
            trains a foldable layer, and all errors of ProximalStep.
        TypeError: unknown options.
        FileNotFoundError, when training starts: the folder of ``save_to`` does not exist.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        flattening = (pl.strategies.FSDPStrategy, pl.strategies.DeepSpeedStrategy)
        if isinstance(trainer.strategy, flattening):
            raise ValueError(f"strategy: wanted one device, DDPStrategy or ModelParallelStrategy; got "
                             f"{type(trainer.strategy).__name__}, which flattens the weights")  # fmt: skip
        self._saved = {}  # may be of a checkpoint that was validated; one to resume from is loaded after setup

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer.strategy.model, trainer.optimizers)
        self._sample = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if self.save_to and self._sample is None:
            self._sample = first_sample(batch)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._log(trainer, self._after_batch(trained=True, epoch_over=trainer.is_last_batch))

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._log(trainer, self._after_batch(trained=False, epoch_over=True))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._detach()
        if trainer.is_global_zero:
            self._finish(pl_module, self._sample)

    def on_exception(self, *_: Any) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        return self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state

    @staticmethod
    def _log(trainer: pl.Trainer, scalars: dict[str, float]) -> None:
        # On every rank: a callback that monitors one of them must decide alike on all ranks.
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: torch.tensor(value, device=device) for name, value in scalars.items()})
        for logger in trainer.loggers if scalars else ():
            logger.log_metrics(scalars, step=trainer.global_step)
