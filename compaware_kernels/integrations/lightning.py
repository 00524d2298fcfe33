"""Compression-aware training with Lightning: ``Trainer(callbacks=[CompressionAware(nuclear=2.0)])``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from .common import Compression, sample


def _package() -> str:
    """Of the two names that Lightning goes by, the one in use: a callback made from the other's class is refused."""
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
    """Takes the proximal steps of :class:`compaware_kernels.ProximalStep` while ``Trainer.fit`` runs:

        ``W <- prox(W, t * strength * ramp)``

    with t the learning rate now. One ProximalStep for each optimizer that holds weights of Linear layers or
    convolutions, however many the module configures; counted are optimizer steps, so neither accumulated batches nor
    steps that a GradScaler skips. With ``every="epoch"`` the step follows the last batch of each training epoch: before
    the epoch's validation and its checkpoints, after schedulers of interval "epoch" (a learning rate that ends at 0
    makes the last step none). An epoch cut short, by ``max_steps`` say, has its proximal step when it ends.

    The state travels in the Trainer's checkpoints: ``fit(ckpt_path=)`` goes on as if it had never stopped. Ranks and
    shares of live rows go to the Trainer's loggers and ``callback_metrics`` (``monitor="rank_share"``), see
    :meth:`compaware_kernels.ProximalReport.scalars`.

    Args:
        every, nuclear, group, l1, fold, skip, warmup, order, scale_by_lr, center: as for ProximalStep; names are those
            in the LightningModule, ``net.0``.
        log_every: ``"epoch"``, a number of optimizer steps, or None for never. Each time costs the singular values of
            all layers.
        save_to: where to save the compressed module when training ends; None: nowhere. The module stays as trained.
            ``compaware_kernels.load(save_to, Module())`` gives it back.
        ranks: a rank rule, or rules by layer name, for :func:`compaware_kernels.compress`; default ``energy(0.99)``.
        compress: options of ``compress``: ``{"goal": "size"}``. Layers of ``skip`` are left alone, the fold is kept.
        example_inputs: for ``compress``, positional inputs of the module's ``forward``. Default: the first sample of
            the first batch; of a sequence its first entry, of a mapping what ``forward`` names.

    Attributes:
        proxes: the ProximalStep objects, one for each optimizer.
        compress_report: what ``compress`` did, on the process of rank 0.

    Raises:
        ValueError, as training starts: a strategy that hides the weights from the optimizer (FSDP 1, DeepSpeed), no
            optimizer that trains a layer that folds, and all that ProximalStep refuses.
        TypeError, at once: unknown options.  FileNotFoundError, as training starts: ``save_to`` in no folder.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        hiding = (pl.strategies.FSDPStrategy, pl.strategies.DeepSpeedStrategy)
        if isinstance(trainer.strategy, hiding):
            raise ValueError(f"{type(trainer.strategy).__name__} flattens and splits the weights: they are no matrices "
                             "any more; wanted one device, DDPStrategy or ModelParallelStrategy")  # fmt: skip
        self._saved = {}  # of a checkpoint that was validated, perhaps; one to resume from is loaded after this

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(trainer.strategy.model, trainer.optimizers)
        self._sample = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if self.save_to and self._sample is None:
            self._sample = sample(batch)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._log(trainer, self._after(trained=True, epoch_over=trainer.is_last_batch))

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._log(trainer, self._after(trained=False, epoch_over=True))

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
        # On every rank: a callback that monitors one of them has to decide the same everywhere.
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: torch.tensor(value, device=device) for name, value in scalars.items()})
        for logger in trainer.loggers if scalars else ():
            logger.log_metrics(scalars, step=trainer.global_step)
