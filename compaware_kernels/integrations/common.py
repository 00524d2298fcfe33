"""Base class of the trainer callbacks: schedule of proximal steps, logging, state, and saving the compressed model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..compression.arguments import ExampleInputs, RankRule
from ..compression.checkpoint import save
from ..compression.compress import CompressReport
from ..compression.compress import compress as compress_model
from ..distributed.dtensor import is_dtensor
from ..nn.discovery import foldable_layers
from ..nn.unwrap import name_without_wrappers, unwrapped
from ..ranks import energy
from ..training.proximal_step import ProximalStep

__all__ = ["Compression", "first_sample", "positional_inputs"]


class Compression:
    """Proximal steps during training and compression after it; the callback of each trainer calls the methods.

    Args: those of :class:`.lightning.CompressionAware`; ``options`` are those of ProximalStep.

    Raises:
        TypeError: an option that ProximalStep or ``compress`` does not have.
        ValueError: ``log_every``.
    """

    def __init__(
        self,
        *,
        every: int | str = "epoch",
        log_every: int | str | None = "epoch",
        save_to: str | Path | None = None,
        ranks: RankRule | Mapping[str, RankRule] | None = None,
        compress: Mapping[str, Any] | None = None,
        example_inputs: ExampleInputs | None = None,
        **options: Any,
    ):
        if not (log_every in ("epoch", None) or (isinstance(log_every, int) and log_every >= 1)):
            raise ValueError(f"log_every: wanted 'epoch', a number of optimizer steps >= 1 or None; got {log_every!r}")
        self.options, self.log_every = {"every": every, **options}, log_every
        self.save_to, self.ranks, self.example_inputs = save_to, ranks or energy(0.99), example_inputs
        self.compress_options = {"fold": options.get("fold", "paper"), **(compress or {})}
        # A misspelled option shall fail before training, not after it.
        inspect.signature(ProximalStep).bind(None, None, **self.options)
        inspect.signature(compress_model).bind(None, None, None, **self.compress_options)
        self.proxes: list[ProximalStep] = []
        self.compress_report: CompressReport | None = None
        self._saved: dict[str, Any] = {}  # state loaded before the ProximalSteps exist
        self._epoch_open = False  # whether an epoch has had a batch and has not ended yet
        self._logged = 0  # optimizer steps at the last log

    def _attach(self, model: nn.Module, optimizers: Sequence[Optimizer], **more: Any) -> None:
        """Create one ProximalStep for each optimizer that holds weights of foldable layers, and restore a loaded state.

        Raises:
            FileNotFoundError: no folder for ``save_to``.
            ValueError: ``save_to`` with DTensors, a state of another number of optimizers, and all that ProximalStep
                raises.
        """
        self._detach()
        if self.save_to and not Path(self.save_to).parent.is_dir():
            raise FileNotFoundError(f"save_to: wanted a file in an existing folder; got {self.save_to}")
        if self.save_to and any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError("save_to: wanted whole weights on every rank; got DTensors: compress the gathered model")
        layers, _ = foldable_layers(unwrapped(model), self.options.get("skip", ()), training=True)
        weights = {id(p) for layer in layers for p in layer.parameters}
        training = [o for o in optimizers if any(id(p) in weights for g in o.param_groups for p in g["params"])]
        self.proxes = [ProximalStep(model, o, **more | self.options) for o in training or optimizers]
        if self._saved:
            if len(self._saved["proxes"]) != len(self.proxes):
                raise ValueError(f"checkpoint: wanted one ProximalStep state for each of {len(self.proxes)} "
                                 f"optimizers; got {len(self._saved['proxes'])}")  # fmt: skip
            for prox, state in zip(self.proxes, self._saved["proxes"], strict=True):
                prox.load_state_dict(state)
        self._saved, self._epoch_open, self._logged = {}, False, self.proxes[0].steps

    def _detach(self) -> None:
        """Remove the hooks from the optimizers."""
        for prox in self.proxes:
            prox.remove()

    def _state(self) -> dict[str, Any]:
        """State for the trainer's checkpoint: that of every ProximalStep, or the loaded one before training.

        Without the residuals of sharded weights, of which the rank that saves has only a part: they start at 0 again.
        """
        return {"proxes": [_on_one_rank(prox.state_dict()) for prox in self.proxes]} if self.proxes else self._saved

    def _after_batch(self, *, trained: bool, epoch_over: bool) -> dict[str, float]:
        """Take the proximal step that is due at the end of an epoch; returns the scalars to log now.

        Args:
            trained: whether a batch of the epoch has been trained since the last call.
            epoch_over: whether the epoch has ended; several calls may say so of one epoch.
        """
        self._epoch_open |= trained
        ended = self._epoch_open and epoch_over
        if ended:
            self._epoch_open = False
            if self.options["every"] == "epoch":
                for prox in self.proxes:
                    prox.step()
        steps, every = self.proxes[0].steps, self.log_every
        due = ended if every == "epoch" else every is not None and steps // every > self._logged // every
        if not due:
            return {}
        self._logged = steps
        return self.proxes[0].report().scalars()

    def _finish(self, model: nn.Module, batch: object) -> None:
        """Compress a copy of the model and save it, if ``save_to`` is given; batch: for the example inputs."""
        if not self.save_to or not self.proxes:
            return
        model = copy.deepcopy(unwrapped(model))
        # Trainers set a compiled or autocast ``forward`` on the object; the copy's is still bound to the original.
        vars(model).pop("forward", None)
        skipped = {name for name, reason in self.proxes[0].skipped.items() if reason == "skipped by name"}
        options = {"skip": [name for name, _ in model.named_modules() if name_without_wrappers(name) in skipped]}
        device = next(model.parameters()).device
        inputs = self.example_inputs or positional_inputs(model, batch)
        inputs = dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs)
        inputs = tree_map_only(Tensor, lambda x: x.to(device), inputs)
        small, self.compress_report = compress_model(model, self.ranks, inputs, **options | self.compress_options)
        save(small, self.save_to)


def _on_one_rank(state: dict[str, Any]) -> dict[str, Any]:
    """State of a ProximalStep without DTensors."""
    whole = {key: E for key, E in state.get("residuals", {}).items() if not is_dtensor(E)}
    return {key: value for key, value in state.items() if key != "residuals"} | ({"residuals": whole} if whole else {})


def first_sample(batch: object) -> object:
    """Copy of the first sample of a batch, as a batch of one: every tensor ``[B, ...]`` -> ``[1, ...]``."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map_only(Tensor, lambda x: (x[:1] if x.ndim else x).detach().clone(), batch)


def positional_inputs(model: nn.Module, batch: object) -> tuple:
    """Positional arguments of ``model.forward`` from a batch.

    Args:
        batch: a mapping gives the entries that ``forward`` has parameters for, a sequence its first entry.

    Raises:
        ValueError: a mapping without such an entry.
    """
    if not isinstance(batch, Mapping):
        return (batch[0],) if isinstance(batch, (tuple, list)) and batch else (batch,)
    signature = inspect.signature(model.forward)
    named = [name for name in signature.parameters if name in batch]
    if not named:
        raise ValueError(f"example_inputs: wanted a batch with one of {', '.join(signature.parameters)}; got "
                         f"{', '.join(map(str, batch))}")  # fmt: skip
    bound = signature.bind_partial(**{name: batch[name] for name in named})
    bound.apply_defaults()
    return bound.args[: 1 + list(signature.parameters).index(named[-1])]
