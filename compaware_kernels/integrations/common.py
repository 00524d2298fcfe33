"""What the callbacks share and no trainer is needed for: when to step, what to log, the state, the compressed model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..compression.checkpoint import save
from ..compression.compress import CompressReport, RankRule
from ..compression.compress import compress as compress_model
from ..nn.discovery import foldable_layers
from ..nn.unwrap import plain_name, unwrapped
from ..ranks import energy
from ..training.proximal_step import ProximalStep


class Compression:
    """Proximal steps while a trainer trains, and a compressed model when it is done; the callbacks say when."""

    def __init__(
        self,
        *,
        every: int | str = "epoch",
        log_every: int | str | None = "epoch",
        save_to: str | Path | None = None,
        ranks: RankRule | Mapping[str, RankRule] | None = None,
        compress: Mapping[str, Any] | None = None,
        example_inputs: Sequence[object] | None = None,
        **options: Any,
    ):
        if not (log_every in ("epoch", None) or (isinstance(log_every, int) and log_every >= 1)):
            raise ValueError(f"log_every must be 'epoch', a number of optimizer steps >= 1 or None; got {log_every!r}")
        self.options, self.log_every = {"every": every, **options}, log_every
        self.save_to, self.ranks, self.example_inputs = save_to, ranks or energy(0.99), example_inputs
        self.compress_options = {"fold": options.get("fold", "paper"), **(compress or {})}
        # Misspelt options are to show before training, not after it.
        inspect.signature(ProximalStep).bind(None, None, **self.options)
        inspect.signature(compress_model).bind(None, None, None, **self.compress_options)
        self.proxes: list[ProximalStep] = []
        self.compress_report: CompressReport | None = None
        self._saved: dict[str, Any] = {}  # loaded before there was anything to load it into
        self._open = False  # whether an epoch has trained and not yet ended
        self._logged = 0

    def _attach(self, model: nn.Module, optimizers: Sequence[Optimizer], **more: Any) -> None:
        """One ProximalStep for each optimizer that holds weights of layers that fold."""
        self._detach()
        if self.save_to and not Path(self.save_to).parent.is_dir():
            raise FileNotFoundError(f"save_to: no such folder: {Path(self.save_to).parent}")
        if self.save_to and any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise ValueError("save_to: wanted whole weights on every rank; got DTensors. Compress the gathered model")
        layers, _ = foldable_layers(unwrapped(model), self.options.get("skip", ()), training=True)
        weights = {id(p) for layer in layers for p in layer.parameters}
        training = [o for o in optimizers if any(id(p) in weights for g in o.param_groups for p in g["params"])]
        self.proxes = [ProximalStep(model, o, **more | self.options) for o in training or optimizers]
        if self._saved:
            if len(self._saved["proxes"]) != len(self.proxes):
                raise ValueError(f"the checkpoint has states of {len(self._saved['proxes'])} ProximalStep; "
                                 f"wanted {len(self.proxes)}, one for each optimizer")  # fmt: skip
            for prox, state in zip(self.proxes, self._saved["proxes"], strict=True):
                prox.load_state_dict(state)
        self._saved, self._open, self._logged = {}, False, self.proxes[0].steps

    def _detach(self) -> None:
        for prox in self.proxes:
            prox.remove()

    def _state(self) -> dict[str, Any]:
        return {"proxes": [prox.state_dict() for prox in self.proxes]} if self.proxes else self._saved

    def _after(self, *, trained: bool, epoch_over: bool) -> dict[str, float]:
        """Take the proximal step that is due at an epoch's end; returns what is to be logged now."""
        self._open |= trained
        ended = self._open and epoch_over
        if ended:
            self._open = False
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
        """Compress a copy of the model and save it."""
        if not self.save_to or not self.proxes:
            return
        model = copy.deepcopy(unwrapped(model))
        # Trainers put a compiled or autocast forward on the object, bound to the one that was copied.
        vars(model).pop("forward", None)
        skipped = {name for name, reason in self.proxes[0].skipped.items() if reason == "skipped by name"}
        options = {"skip": [name for name, _ in model.named_modules() if plain_name(name) in skipped]}
        device = next(model.parameters()).device
        inputs = tree_map_only(Tensor, lambda x: x.to(device), tuple(self.example_inputs or positional(model, batch)))
        small, self.compress_report = compress_model(model, self.ranks, inputs, **options | self.compress_options)
        save(small, self.save_to)


def sample(batch: object) -> object:
    """The first sample of a batch, a copy: all that is kept of it."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map_only(Tensor, lambda x: (x[:1] if x.ndim else x).detach().clone(), batch)


def positional(model: nn.Module, batch: object) -> tuple:
    """The model's positional inputs in a batch: of a mapping what ``forward`` names, of a sequence the first entry.
    Raises ValueError where there are none."""
    if not isinstance(batch, Mapping):
        return (batch[0],) if isinstance(batch, (tuple, list)) and batch else (batch,)
    signature = inspect.signature(model.forward)
    named = [name for name in signature.parameters if name in batch]
    if not named:
        raise ValueError(f"example_inputs: forward takes {', '.join(signature.parameters)}; the batch has "
                         f"{', '.join(map(str, batch))}")  # fmt: skip
    bound = signature.bind_partial(**{name: batch[name] for name in named})
    bound.apply_defaults()
    return bound.args[: 1 + list(signature.parameters).index(named[-1])]
