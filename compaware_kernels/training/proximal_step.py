"""ProximalStep: proximal operators on the weights of a model, run with any torch optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .._utils.uninterrupted import uninterrupted
from ..distributed.dtensor import distribute_bias
from ..folds import row_axes
from ..nn.discovery import Layer, foldable_layers
from ..nn.unwrap import data_parallel_group, optimizer_chain, reshard, unwrapped
from ..proximal.error_feedback import HALF
from ..proximal.warm_state import WarmState, from_text, to_text
from .coordinator import Coordinator
from .layer_finder import LayerFinder, Strength
from .layer_record import LayerRecord, center_weight, write_back
from .optimizer_hooks import StepHooks, attached
from .penalties import PENALTIES, Settings, thresholds
from .replicas import MODES
from .report import ProximalReport, layer_spectrum
from .residuals import Residuals
from .schedule_free import Average, average_of, is_schedule_free

__all__ = ["ProximalStep"]

NO_CHANGE = "no weight was changed"


class ProximalStep:
    """Compression-aware training: proximal steps after optimizer steps shrink the weights toward low rank and few rows.

    Minimizes ``loss + sum_l nuclear_l ||W_l||_* + group_l sum_n sqrt(P_l) ||w_l^n||_2 + l1_l ||W_l||_1`` by alternating
    the optimizer's steps on the loss with proximal steps on the penalties, one penalty after the other:

        ``W <- prox(W, t * strength * ramp)``

    with t the current learning rate of W's parameter group (or 1), and ramp the warm-up factor. A neuron's group is
    its weights and, if that is trained, its bias; ``P_l`` is their number. With plain SGD this is the proximal gradient
    method of the source; with momentum or an adaptive optimizer the step is decoupled from the optimizer's metric, like
    weight decay in AdamW.

    An average of the weights (``AveragedModel``) has full rank: compress it to the ranks of the weights themselves,
    ``ck.compress(ema, {r.name: ck.ranks.fixed(r.rank) for r in prox.report()}, ...)``; on digits its accuracy
    was then 97.7 %, that of the average 97.8 % and that of the weights 97.2 % (held-out images, means of 6 runs).

    Under a schedule-free optimizer the proximal step shrinks the average that its ``eval()`` shows
    (:mod:`compaware_kernels.training.schedule_free`): call that before :meth:`report` and ``ck.compress``. Wrappers of
    optimizers (SAM, Lookahead) may be given as they are. ``copy.deepcopy`` and pickle give a copy that is attached to
    its own optimizer.

    Args:
        model: its Linear layers, convolutions and transposed convolutions are shrunk; other layers are listed in
            ``skipped``. A weight that several layers share is shrunk once, a parametrized weight through the right
            inverse of its parametrization. The model may be wrapped (torch.compile, DistributedDataParallel,
            AveragedModel); names are those without the parts that torch.compile and activation checkpointing add.
        optimizer: any torch optimizer over the model's parameters. Parameters that it does not hold and parameters with
            ``requires_grad=False`` are not changed; both are looked up at every step, as are modules that have been
            replaced or added. A step that finds no layer to change warns, once. Steps that a GradScaler skips do
            not count.
        nuclear, group, l1, firm: strengths >= 0 of the penalties: one number, or numbers by layer name pattern
            (``{"features.*": 0.1, "head": 0.0}``, first match wins, no match is 0).
        gamma: of the firm penalty (minimax concave, see :func:`compaware_kernels.firm_svt`), > 1: singular values above
            gamma times the threshold are not shrunk, so that it has no bias there, as the nuclear norm has.
        every: ``"epoch"``: you call :meth:`step` at the end of each epoch, as in the paper. An int k: a hook takes a
            proximal step after every k optimizer steps. The strength is per proximal step: more steps shrink more.
        scale_by_lr: whether thresholds are multiplied by the current learning rate (the proximal gradient method).
        order: of the penalties, all that have a strength (default: nuclear, firm, group, l1). L1 after nuclear can
            raise the rank again; scaling rows cannot.
        fold: how convolutions become matrices for the nuclear norm, see :mod:`compaware_kernels.folds`.
        skip: name patterns (``fnmatch``) of layers not to shrink.
        warmup: the thresholds of the first ``warmup`` proximal steps grow linearly to their full size.
        center: a model of the same architecture, with weights C: the penalty is ``nuclear_l ||W_l - C_l||_*``, so that
            fine-tuning learns an update of low rank (see :func:`export_lora`). The report is then that of ``W - C``.
        process_group: ranks with the same weights (default: those of the DistributedDataParallel around the model).
            Their weights stay bitwise identical.
        division: how the layers are partitioned over these ranks: ``"owner"``: one rank shrinks each layer and
            broadcasts it; ``"replicated"``: every rank shrinks all layers; ``"auto"``: the faster of both, measured.
            Sharded weights (DTensor: FSDP2's ``fully_shard``, tensor parallel) are shrunk without gathering, by small
            all-reduces; with ``"owner"``, one rank gathers each layer, shrinks it and scatters it back.
        error_feedback: bf16 and fp16 weights keep what rounding cuts off of each proximal step and get it back in the
            next one, so that small steps accumulate as in fp32 instead of vanishing. It takes two bytes per such
            weight, kept in :meth:`state_dict`, four more during a step, and on a CPU 5 to 20 ns of one core; replicas
            then exchange results in fp32. Without it a step that is too small for the dtype warns, once. Not under a
            schedule-free optimizer, whose average would need it, too: keep its weights in fp32.

    Attributes:
        layers: the layers that are shrunk.  skipped: name -> reason, for all others that have weights.
        steps: optimizer steps counted.  applied: proximal steps taken.
        warm: warm start of the singular value thresholding of each layer, see :class:`WarmState`.
        residuals: int16, of the weights and biases in half precision, see
            :mod:`compaware_kernels.proximal.error_feedback`. They count in ulps of the present weights: those of
            weights that were loaded since change them by at most half an ulp (parametrized weights: eight).

    Raises:
        ValueError: negative or infinite strength, unknown fold, order or division, gamma <= 1, every < 1, warmup < 0, a
            pattern that matches no layer, an optimizer that trains no foldable layer of the model, a center of another
            architecture or together with ``group`` or ``l1``.

    Source: Alvarez & Salzmann, NIPS 2017 (arXiv 1711.02638), section 3; NIPS 2016 for the group term.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        nuclear: Strength = 0.0,
        group: Strength = 0.0,
        l1: Strength = 0.0,
        firm: Strength = 0.0,
        gamma: float = 3.0,
        every: int | str = "epoch",
        scale_by_lr: bool = True,
        order: Sequence[str] | None = None,
        fold: str = "paper",
        skip: Sequence[str] = (),
        warmup: int = 0,
        center: nn.Module | None = None,
        process_group: dist.ProcessGroup | None = None,
        division: str = "auto",
        error_feedback: bool = True,
    ):
        if not (every == "epoch" or (isinstance(every, int) and every >= 1)):
            raise ValueError(f"every: wanted 'epoch' or a number of optimizer steps >= 1; got {every!r}")
        if not (isinstance(gamma, float | int) and 1 < gamma < math.inf):
            raise ValueError(f"gamma: wanted a finite number > 1; got {gamma!r}")
        if not (isinstance(warmup, int) and warmup >= 0):
            raise ValueError(f"warmup: wanted a number of proximal steps >= 0; got {warmup!r}")
        if division not in MODES:
            raise ValueError(f"division: wanted one of {', '.join(MODES)}; got {division!r}")
        row_axes(fold, 2)
        self.optimizer, self.every, self.scale_by_lr = optimizer_chain(optimizer)[-1], every, scale_by_lr
        self.order, self.fold, self.warmup = tuple(PENALTIES if order is None else order), fold, warmup
        self.model, self.center = unwrapped(model), center
        self._reshard()
        self._finder = LayerFinder(self.model, skip, {"nuclear": nuclear, "firm": firm, "group": group, "l1": l1})
        self._finder.check_order(self.order)
        self._find_layers()
        if not self._trained():
            reasons = "".join(f"; {name}: {reason}" for name, reason in list(self.skipped.items())[:3])
            raise ValueError("optimizer: wanted the weight of a Linear or convolution of this model; got none: nothing "
                             f"to shrink{reasons}")  # fmt: skip
        self.steps = self.applied = self._steps_at_last = 0
        self.warm, self.error_feedback, self.residuals = WarmState(), error_feedback, Residuals()
        ranks, settings = process_group or data_parallel_group(model), Settings(self.order, gamma)
        self._coordinator = Coordinator(ranks, division, settings)
        self._coordinator.warn_if_not_distributed(self.layers)
        self._warn_of_others()
        if is_schedule_free(self.optimizer):
            half = any(layer.weight.dtype in HALF for layer, _, _ in self._trained())
            small = "; weights in half precision have no error feedback under it: keep them in fp32" if half else ""
            warnings.warn(f"optimizer: what {type(self.optimizer).__name__}.eval() shows is an average, whose small "
                          f"singular values vanish only as 1 / steps: choose ranks by energy{small}",
                          stacklevel=2)  # fmt: skip
        self._outer, self._warned = optimizer, False
        self._hooks: StepHooks | None = self._attach()

    def _attach(self) -> StepHooks:
        return StepHooks(self._outer, self, self._counts, self._after_optimizer_step)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_hooks": self._hooks is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, of copies of the model and the optimizer, is attached to that optimizer if the original is."""
        vars(self).update(state)
        self._hooks = None
        if state["_hooks"]:
            self._warn_of_others()  # copy.copy keeps the optimizer
            self._hooks = self._attach()

    def _find_layers(self) -> None:
        """Find the layers, again if modules of the model have been replaced or added."""
        if self._finder.is_current():
            return
        self.layers, self.skipped, self.strengths = self._finder.find()
        self.centers = None if self.center is None else _centers(unwrapped(self.center), self.layers, self.strengths)

    def _warn_of_others(self) -> None:
        """Warn of other ProximalSteps on the optimizer that have the same penalties on the same weights."""
        for other in attached(self.optimizer):
            mine, theirs = self._penalized(), other._penalized()
            if both := sorted({mine[key] for key in mine.keys() & theirs.keys()}):
                warnings.warn(f"optimizer: another ProximalStep on it shrinks {', '.join(both)} by the same penalties, "
                              "so it is done twice: remove() the other one if this one replaces it",
                              stacklevel=3)  # fmt: skip

    def _penalized(self) -> dict[tuple[int, str], str]:
        """Name of the layer by weight and penalty."""
        return {(id(p), penalty): layer.name for layer in self.layers for p in layer.parameters
                for penalty, strength in self.strengths[layer.name].items() if strength}  # fmt: skip

    def _counts(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> bool:
        """Whether a step of the optimizer has moved weights."""
        overflow = getattr(optimizer, "found_inf", None)  # set by GradScaler; fused optimizers skip the step themselves
        if overflow is not None and bool(overflow):
            return False
        # torch.distributed.checkpoint initializes an optimizer's state by such a step; no weight changes
        return kwargs != {"closure": None} or any(group["lr"] for group in optimizer.param_groups)

    def _after_optimizer_step(self) -> None:
        """Count an optimizer step, and take the proximal step after every k of them."""
        if self.every != "epoch" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"every: wanted 'epoch' and calls of step(), because a CUDA graph replays "
                               f"optimizer steps without their hooks; got {self.every}")  # fmt: skip
        self.steps += 1
        if self.every != "epoch" and self.steps % self.every == 0:
            self.step()

    def _reshard(self) -> None:
        """Reshard FSDP2 modules of the model and the center left unsharded after forward."""
        for model in (self.model, self.center):
            if model is not None:
                reshard(model)

    def remove(self) -> None:
        """Remove the hooks from the optimizer: its steps are no longer counted and take no proximal steps."""
        if self._hooks:
            self._hooks.remove()
            self._hooks = None

    @torch.compiler.disable
    @uninterrupted
    @torch.no_grad()
    def step(self) -> None:
        """Take one proximal step on every layer; a collective call where weights are sharded or replicated.

        All or nothing: on an error no weight is changed. Signals, as that of Ctrl-C, are handled when the step has
        ended; a second one does not end it sooner. On a GPU nothing is synchronized: the device finds NaN or Inf
        and then changes no weight, and a later step raises.

        Raises:
            ValueError: NaN or Inf in a weight, or a parametrization that cannot represent the result, with the layer's
                name; on all ranks of sharded or replicated weights, whichever rank found it.
            RuntimeError: another rank has exited. A rank that fails while it shrinks a sharded layer but does not exit
                leaves the others waiting until the timeout of the process group.
        """
        self._reshard()
        self._find_layers()
        records = self._records()
        if not records:
            self._warn_of_no_change()
        before = self.warm.state_dict()
        try:
            self._coordinator.shrink(records, self.warm)
            write_back(records)
        except BaseException as error:
            self.warm.load_state_dict(before)
            if isinstance(error, RuntimeError) and dist.is_available() and dist.is_initialized():
                raise RuntimeError(
                    f"proximal step: failed here, or lost another process; {NO_CHANGE}: {error}"
                ) from error
            raise
        self.applied += 1
        self._steps_at_last = self.steps

    def _records(self) -> list[LayerRecord]:
        """Records of the layers that the next proximal step changes: trained, with a threshold > 0."""
        records = []
        for layer, bias, lr in self._trained():
            rows, center = layer.rows.detach(), (self.centers or {}).get(layer.name)
            average = None if layer.is_parametrized else self._average(layer.weight)
            share = average.share if average else 1.0
            taus = {penalty: tau * share for penalty, tau in self._taus(layer.name, rows, bias, lr).items() if tau > 0}
            if taus:
                bias = bias if any(PENALTIES[penalty].with_bias for penalty in taus) else None
                residuals = self.residuals if self.error_feedback else None
                averages = average, None if bias is None or average is None else self._average(bias)
                records.append(LayerRecord.of(layer, rows, bias, center, self.fold, taus, residuals, *averages))
        return records

    def _average(self, p: Tensor) -> Average | None:
        return average_of(self.optimizer, p, self.steps - self._steps_at_last)

    def _warn_of_no_change(self) -> None:
        """Warn, once, of a step that changes no layer, unless that is because the learning rates are 0 for now."""
        trained = self._trained()
        penalized = any(any(by.values()) for by in self.strengths.values())
        if self._warned or not penalized or any(any(self.strengths[layer.name].values()) for layer, _, _ in trained):
            return
        self._warned = True
        why = ("the optimizer trains only layers without a penalty" if trained else
               "the optimizer trains none of the model's weights: they are frozen, or were replaced after it was made "
               "(as by model.double() under torch.__future__.set_overwrite_module_params_on_conversion)")  # fmt: skip
        warnings.warn(f"proximal step: no layer was changed; {why}", stacklevel=3)

    def thresholds(self) -> dict[str, dict[str, float]]:
        """Thresholds of the next proximal step, layer -> penalty -> tau, for the current learning rates."""
        self._reshard()
        self._find_layers()
        return {layer.name: self._taus(layer.name, layer.rows, bias, lr) for layer, bias, lr in self._trained()}

    def _taus(self, name: str, rows: Tensor, bias: Tensor | None, lr: float) -> dict[str, float]:
        """Thresholds of a layer by penalty: strength x learning rate x ramp x the penalty's scale; bias: if trained."""
        parameters = rows.shape[1:].numel() + (bias is not None)
        step = min(1.0, (self.applied + 1) / (self.warmup + 1)) * (lr if self.scale_by_lr else 1.0)
        return thresholds(self.strengths[name], step, parameters)

    def _trained(self) -> list[tuple[Layer, Tensor | None, float]]:
        """(layer, its bias if trained, learning rate) of the layers whose parameters the optimizer trains now."""
        lr = {
            id(p): float(group["lr"])
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        }
        layers = [layer for layer in self.layers if all(id(p) in lr for p in layer.parameters)]
        biases = (layer.module.bias if id(layer.module.bias) in lr else None for layer in layers)
        return [(layer, bias, lr[id(layer.parameters[0])]) for layer, bias in zip(layers, biases, strict=True)]

    @torch.no_grad()
    def report(self) -> ProximalReport:
        """Rank, nuclear and spectral norm, and fraction of nonzero rows of every layer, now.

        The rank is the numerical rank in the weight's dtype (:func:`compaware_kernels.ranks.numerical_rank`). Computes
        the singular values of every layer. A collective call if weights are sharded.
        """
        self._reshard()
        thresholds = self.thresholds()
        report = ProximalReport()
        for layer in self.layers:
            rows = layer.rows if self.centers is None else layer.rows - center_weight(layer, self.centers[layer.name])
            report.append(layer_spectrum(layer.name, rows, self.fold, layer.groups, thresholds.get(layer.name, {})))
        return report

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, besides those of the model and the optimizer: resuming is then bitwise reproducible.

        Two numbers, a text, and with weights in half precision their residuals: for ``torch.save`` (loads with
        ``weights_only=True``) and, if the ProximalStep itself is in the dictionary, for
        ``torch.distributed.checkpoint``. A copy that later steps do not change, equal on all ranks (residuals of
        sharded weights: DTensors), and loadable with any number of ranks. A collective call if sharded weights have
        owners.
        """
        self._coordinator.collect_bases(self.warm)
        state = {"steps": self.steps, "applied": self.applied, "warm": to_text(self.warm.state_dict())}
        self._reshard()
        self._find_layers()
        for layer, bias, _ in self._trained() if self.error_feedback else ():  # a template has those of every layer
            rows, strengths = layer.rows.detach(), self.strengths[layer.name]
            used = [PENALTIES[penalty] for penalty, strength in strengths.items() if strength]
            if used:
                self.residuals.of(f"{layer.name}.weight", rows)
            if bias is not None and any(penalty.with_bias for penalty in used):
                self.residuals.of(f"{layer.name}.bias", distribute_bias(bias.detach(), rows))
        residuals = self.residuals.saved(self.layers)
        return state | ({"residuals": residuals} if residuals else {})

    @uninterrupted
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. Residuals that are missing, as in a state of fp32 weights, start at 0.

        Raises:
            ValueError: ``state`` has other entries or types, negative numbers, or residuals of other layers or shapes;
                nothing has changed.
        """
        wanted = {"steps": int, "applied": int, "warm": str}
        if (
            not isinstance(state, Mapping)
            or state.keys() - {"residuals"} != wanted.keys()
            or any(not isinstance(state[key], kind) or isinstance(state[key], bool) for key, kind in wanted.items())
            or not all(0 <= state[key] < 1 << 63 for key in ("steps", "applied"))
        ):
            raise ValueError(f"state: wanted a ProximalStep state with {', '.join(wanted)}; got {state!r:.200}")
        self._reshard()
        self._find_layers()
        residuals = Residuals.loaded(state.get("residuals", {}), self.layers)
        self.warm.load_state_dict(from_text(state["warm"]))
        self.steps, self.applied, self.residuals = state["steps"], state["applied"], residuals


def _centers(center: nn.Module, layers: list[Layer], strengths: Mapping[str, Mapping[str, float]]) -> dict[str, Layer]:
    """Layers of ``center`` by name; raises ValueError if they do not match the model's or a penalty has no center."""
    fixed = [name for name, penalty in PENALTIES.items() if not penalty.can_be_centered]
    if any(by[name] for by in strengths.values() for name in fixed):
        raise ValueError(
            f"center: wanted {' = '.join(fixed)} = 0; got a strength: only singular values can be centered"
        )
    found = {layer.name: layer for layer in foldable_layers(center, training=True)[0]}
    for layer in layers:
        other = found.get(layer.name)
        if other is None or other.weight.shape != layer.weight.shape:
            got = "none" if other is None else list(other.weight.shape)
            raise ValueError(f"center: wanted a weight {list(layer.weight.shape)} for {layer.name}; got {got}")
        if any(p is q for p in layer.parameters for q in other.parameters):
            raise ValueError(f"center: wanted a copy made before training; got the model's own weight for {layer.name}")
    return found
