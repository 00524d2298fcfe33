"""Study arms: training methods (this project's, the paper's, competing ones), each an addition to the same SGD.

Penalty strengths are per epoch: a penalty applied every step, or every tenth, uses its share, so that in every proximal
arm one epoch shrinks by learning rate times strength. A penalty in the loss passes through the optimizer's momentum,
which multiplies it by 1 / (1 - momentum): ten times as much at 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ranks
from ..compression.compress import compress
from ..folds import from_matrix
from ..nn.discovery import Layer, foldable_layers
from ..nn.module_surgery import replace
from ..nn.registry import low_rank_type
from ..training.proximal_step import ProximalStep

__all__ = [
    "ARMS",
    "L1",
    "L2",
    "Arm",
    "FixedRank",
    "Group",
    "Magnitude",
    "Nuclear",
    "NuclearGroup",
    "NuclearLoss",
    "NuclearSteps",
    "Plan",
    "Reload",
    "SparseGroup",
    "TrainedRankPruning",
    "Variational",
    "threshold",
]


@dataclass(frozen=True)
class Plan:
    """Training plan that an arm depends on: length, layers to leave unchanged, an example input."""

    epochs: int
    steps: int  # in an epoch
    examples: int
    seed: int
    skip: tuple[str, ...]
    example: Tensor


class Arm:
    """Plain training; what it becomes is decided by the compression alone (truncated SVD: Denton et al., NIPS 2014).

    Attributes:
        title: in plots.  knobs: what its strengths may name.  shares: whether these are shares, between 0 and 1.
    """

    title: ClassVar[str] = "plain"
    knobs: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[bool] = False

    def __init__(self, strength: Mapping[str, float], plan: Plan):
        self.strength, self.plan, self.step = dict(strength), plan, 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Network to train, from a freshly initialized dense one."""
        return model

    def options(self) -> dict[str, float]:
        """Additional optimizer options."""
        return {}

    def attach(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
        """Hook before ``epoch`` 0, the first after a resume, or the first of a replaced network."""
        self.layers = foldable_layers(model, self.plan.skip)[0]

    def before(self) -> None:
        """Hook before the forward pass of a batch."""

    def after_backward(self) -> None:
        """Hook after the backward pass."""

    def after_step(self) -> None:
        """Hook after the optimizer step."""
        self.step += 1

    def after_epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Hook after an epoch; returns the network to continue with."""
        return model

    def scores(self) -> dict[str, Tensor]:
        """Importance of each weight, by layer: sparse compression prunes the smallest."""
        return {layer.name: layer.weight.detach().abs() for layer in self.layers}

    def facts(self) -> dict[str, float]:
        """Additional results of the trained network, for its record."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


# --- proximal steps -------------------------------------------------------------------------------------------------


class Nuclear(Arm):
    """The nuclear norm by a proximal step after every epoch (Alvarez & Salzmann, NIPS 2017, algorithm 1)."""

    title = "nuclear norm, per epoch (paper)"
    knobs = ("nuclear",)
    every: ClassVar[int] = 0  # optimizer steps between proximal ones; 0: an epoch
    order: ClassVar[tuple[str, ...]] = ("nuclear", "group", "l1")

    def attach(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
        super().attach(model, optimizer, epoch)
        parts = self.every / self.plan.steps if self.every else 1
        strengths = {name: value * parts for name, value in self.strength.items()}
        self.prox = ProximalStep(
            model, optimizer, **strengths, every=self.every or "epoch", order=self.order, skip=self.plan.skip
        )

    def after_epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        if not self.every:
            self.prox.step()
        return model

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"prox": self.prox.state_dict()} if self.prox else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.prox:
            self.prox.load_state_dict(state["prox"])


class NuclearSteps(Nuclear):
    """The nuclear norm by a proximal step after every tenth step of the optimizer."""

    title = "nuclear norm, per step"
    every = 10


class NuclearGroup(Nuclear):
    """Nuclear norm, then group lasso, after every epoch (Alvarez & Salzmann, NIPS 2017, section 3.2)."""

    title = "nuclear norm + group lasso (paper)"
    knobs = ("nuclear", "group")


class Group(Nuclear):
    """Group lasso over neurons after every epoch (Alvarez & Salzmann, NIPS 2016)."""

    title = "group lasso"
    knobs = ("group",)


class SparseGroup(Nuclear):
    """L1, then group lasso over neurons, after every epoch (Alvarez & Salzmann, NIPS 2016, section 3)."""

    title = "sparse group lasso"
    knobs = ("group", "l1")
    order = ("nuclear", "l1", "group")


class L1(Nuclear):
    """Sum of absolute values by soft-thresholding at every step (Duchi & Singer, FOBOS, JMLR 2009)."""

    title = "L1"
    knobs = ("l1",)
    every = 1


class Reload(Nuclear):
    """The paper's "reload": the penalties up to half of the epochs, then the network is factorised and trained on.

    Source: Alvarez & Salzmann, NIPS 2017, section 4. Ranks keep 99 % of the spectral energy.
    """

    title = "nuclear norm + group lasso, reload (paper)"
    knobs = ("nuclear", "group")

    @property
    def reload(self) -> int:
        """Epoch before which the network is factorized."""
        return max(1, self.plan.epochs // 2)

    def attach(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
        self.prox = None
        (super() if epoch < self.reload else super(Nuclear, self)).attach(model, optimizer, epoch)

    def after_epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        if not self.prox:
            return model
        super().after_epoch(model, epoch)
        if epoch + 1 < self.reload:
            return model
        return compress(model, ranks.energy(0.99), (self.plan.example,), goal="size", skip=self.plan.skip)[0]


# --- other additions to the loss ------------------------------------------------------------------------------------


class L2(Arm):
    """Weight decay: ``l2 / 2 ||W||^2`` in the loss (Krogh & Hertz, NIPS 1991); this strength is per step.

    It acts on all parameters, as weight decay is commonly used: also on the classifier, biases and norms, which the
    other arms leave alone (but for biases of group lasso's neurons).
    """

    title = "L2"
    knobs = ("l2",)

    def options(self) -> dict[str, float]:
        return {"weight_decay": self.strength["l2"]}


class NuclearLoss(Arm):
    """The nuclear norm in the loss: its subgradient ``U V^T`` at every step.

    It goes through momentum as the loss does, so that the same strength shrinks 1 / (1 - momentum) times as much as in
    the proximal arms.
    """

    title = "nuclear norm in the loss"
    knobs = ("nuclear",)

    def after_backward(self) -> None:
        for layer in self.layers:
            U, s, Vh = _svd(layer)
            layer.weight.grad.add_(_weight(layer, U, Vh), alpha=self.strength["nuclear"] / self.plan.steps)


class TrainedRankPruning(Arm):
    """Every 20 steps the weights are cut to the rank that keeps a share of their energy, and trained on.

    At those steps the nuclear norm's subgradient, of the kept part, joins the gradient (strength 3e-4, as there).

    Source: Xu et al., Trained Rank Pruning for Efficient Deep Neural Networks, IJCAI 2020 (TRP+Nu).
    """

    title = "trained rank pruning (TRP)"
    knobs = ("energy",)
    shares = True
    every: ClassVar[int] = 20

    @torch.no_grad()
    def before(self) -> None:
        self.kept = []
        if self.step % self.every:
            return
        for layer in self.layers:
            U, s, Vh = _svd(layer)
            r = ranks.energy(self.strength["energy"])(s)
            self.kept.append((layer, U[..., :r], Vh[..., :r, :]))
            layer.set_rows(_weight(layer, U[..., :r] * s[..., None, :r], Vh[..., :r, :]))

    def after_backward(self) -> None:
        for layer, U, Vh in self.kept:
            layer.weight.grad.add_(_weight(layer, U, Vh), alpha=3e-4)


class FixedRank(Arm):
    """Low rank from scratch: every layer starts as two factors of a share of its full rank, its initial weight's SVD.

    Source: Khodak et al., Initialization and Regularization of Factorized Neural Layers, ICLR 2021 (spectral
    initialisation).
    """

    title = "low rank from scratch"
    knobs = ("share",)
    shares = True

    def prepare(self, model: nn.Module) -> nn.Module:
        for layer in foldable_layers(model, self.plan.skip)[0]:
            m, n = layer.matrix().shape[1:]
            rank = math.ceil(self.strength["share"] * min(m, n))
            if rank <= ranks.break_even(m, n):
                replace(model, layer.name, low_rank_type(layer.module).from_dense(layer.module, rank))
        return model


class Magnitude(Arm):
    """The smallest weights of the whole network are set to zero, more and more of them, and held there.

    Which ones is decided anew every 20 steps, just after the optimizer has moved all weights, so that a cut one may, in
    rare cases, come back.

    Source: Han et al., NIPS 2015; the cubic schedule of Zhu & Gupta, 2017 (arXiv 1710.01878), over three quarters of
    the training; one threshold for all layers, as Blalock et al., MLSys 2020, find best.
    """

    title = "magnitude pruning"
    knobs = ("sparsity",)
    shares = True
    every: ClassVar[int] = 20

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        done = min(1.0, self.step / (0.75 * self.plan.epochs * self.plan.steps))
        if self.step % self.every == 0:
            sparsity = self.strength["sparsity"] * (1 - (1 - done) ** 3)
            scores = self.scores()
            level = threshold(scores, sparsity)
            self.masks = {name: score > level for name, score in scores.items()}
        if self.step >= self.every:
            for layer in self.layers:
                layer.weight.mul_(self.masks[layer.name])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"masks": getattr(self, "masks", {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.masks = state["masks"]


class Variational(Arm):
    """A Gaussian over the weights, trained to the shortest description: loss + ``cost`` x KL to a prior / N.

    Each weight has a mean and a deviation; every batch draws weights; each layer's prior is the Gaussian that fits best
    (closed form). Weights are pruned by their signal-to-noise ratio |mean| / deviation.

    Source: Graves, Practical Variational Inference for Neural Networks, NIPS 2011 (sections 4, 5.2, 6.1). The gradient
    of the deviations is the pathwise one (Blundell et al., ICML 2015), unbiased, where Graves takes squared gradients
    of single examples.
    """

    title = "variational inference"
    knobs = ("cost",)
    start: ClassVar[float] = 0.05  # initial standard deviation

    def attach(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
        super().attach(model, optimizer, epoch)
        self.log_deviations = [torch.full_like(layer.weight.detach(), math.log(self.start)) for layer in self.layers]
        self.adam = torch.optim.Adam(self.log_deviations, lr=5e-3)

    @torch.no_grad()
    def before(self) -> None:
        source = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
        self.means = [layer.weight.detach().clone() for layer in self.layers]
        self.noise = [torch.randn(mean.shape, generator=source).to(mean.device) * rho.exp()
                      for mean, rho in zip(self.means, self.log_deviations, strict=True)]  # fmt: skip
        for layer, noise in zip(self.layers, self.noise, strict=True):
            layer.weight.add_(noise)

    @torch.no_grad()
    def after_backward(self) -> None:
        cost = self.strength["cost"] / self.plan.examples
        for layer, mean, noise, rho in zip(self.layers, self.means, self.noise, self.log_deviations, strict=True):
            layer.weight.copy_(mean)
            center, variance = _prior(mean, rho)
            rho.grad = layer.weight.grad * noise + cost * ((2 * rho).exp() / variance - 1)
            layer.weight.grad.add_(mean - center, alpha=cost / float(variance))
        self.adam.step()

    def scores(self) -> dict[str, Tensor]:
        pairs = zip(self.layers, self.log_deviations, strict=True)
        return {layer.name: layer.weight.detach().abs() / rho.exp() for layer, rho in pairs}

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        nats = 0.0
        for layer, rho in zip(self.layers, self.log_deviations, strict=True):
            _, variance = _prior(layer.weight, rho)
            nats += float((variance.log() / 2 - rho).sum())  # the quadratic terms sum to zero at the best prior
        return {"description_bytes": nats / math.log(2) / 8}

    def state_dict(self) -> dict[str, Any]:
        state = {"log_deviations": self.log_deviations, "adam": self.adam.state_dict()}
        return super().state_dict() | state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for rho, saved in zip(self.log_deviations, state["log_deviations"], strict=True):
            rho.copy_(saved)
        self.adam.load_state_dict(state["adam"])


ARMS: dict[str, type[Arm]] = {
    "plain": Arm,
    "nuclear": Nuclear,
    "nuclear-steps": NuclearSteps,
    "nuclear+group": NuclearGroup,
    "reload": Reload,
    "group": Group,
    "sparse-group": SparseGroup,
    "l1": L1,
    "l2": L2,
    "nuclear-loss": NuclearLoss,
    "trp": TrainedRankPruning,
    "fixed-rank": FixedRank,
    "magnitude": Magnitude,
    "variational": Variational,
}


def threshold(scores: Mapping[str, Tensor], sparsity: float) -> float:
    """Quantile of all scores: a share ``sparsity`` of the weights does not exceed it."""
    every = torch.cat([score.flatten() for score in scores.values()])
    count = round(sparsity * every.numel())
    return float(every.kthvalue(count).values) if count else -1.0


def _svd(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of the layer's matrix, cut to its numerical rank.  Raises LinAlgError for NaN or Inf."""
    U, s, Vh = torch.linalg.svd(layer.matrix().detach(), full_matrices=False)
    if not s.isfinite().all():  # LAPACK may return NaN, which would become rank 0
        raise torch.linalg.LinAlgError(f"{layer.name}: singular values contain NaN or Inf")
    rank = int((s > 1e-6 * s[..., :1]).sum(-1).max())
    return U[..., :rank], s[..., :rank], Vh[..., :rank, :]


def _weight(layer: Layer, U: Tensor, Vh: Tensor) -> Tensor:
    """Product ``U Vh`` in the shape of the layer's weight."""
    return from_matrix(U @ Vh, layer.rows.shape)


def _prior(mean: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the Gaussian prior of least description length of a layer's weights."""
    center = mean.mean()
    return center, ((2 * rho).exp() + (mean - center).square()).mean()
