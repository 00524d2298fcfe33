"""Cost of proximal steps in training: fp32, SGD with momentum; ResNet-18 with 128 images of 3 x 32 x 32 per step and
50,000 per epoch; ResNet-50 and ViT-B/16 with 8 images of 3 x 224 x 224 and ImageNet's 1,281,167.

Weights, in units of tau: ``full rank``: those of an untrained network at tau = 0.05, whose singular values all exceed
it; ``first step``: the same, without a warm state; ``low rank``: an eighth of the full rank, drifted since the last
proximal step as measured in training (:mod:`workloads`). Every result is compared with the fp64 truth. The shares of
the step fall as batches and images grow, which do not affect the proximal step.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

import compaware_kernels as ck
from bench.common import networks, workloads

EVERY = 10
TAU, SHARE, WARMUP = 0.05, 0.125, 3


class Full:
    """Regime: the same full-rank weights before every proximal step."""

    def __init__(self, prox):
        self.prox, self.weights = prox, [layer.weight.detach().flatten(1) / TAU for layer in prox.layers]

    def next(self):
        return self.weights


class First(Full):
    def next(self):
        self.prox.warm = ck.WarmState()
        return self.weights


class Drift:
    """Regime: low-rank weights that drift between proximal steps."""

    def __init__(self, prox):
        self.prox = prox
        self.bases = workloads.low_rank([layer.weight.flatten(1).shape for layer in prox.layers], SHARE)
        write(prox, workloads.shrunk(self.bases))

    def next(self):
        return workloads.drifted([layer.weight.detach().flatten(1) for layer in self.prox.layers], self.bases)


@torch.no_grad()
def write(prox, weights):
    for layer, W in zip(prox.layers, weights, strict=True):
        layer.weight.copy_(W.view_as(layer.weight))


REGIMES = pytest.mark.parametrize(("regime", "kind"), [("first step", First), ("full rank", Full), ("low rank", Drift)])


@REGIMES
def test_resnet18(training_race, regime, kind):
    race(training_race, regime, kind, networks.resnet18, 128, 32, 50_000, 9)


@REGIMES
@pytest.mark.parametrize("network", ["resnet50", "vit_b"])
def test_imagenet(training_race, regime, kind, network):
    race(training_race, f"{network}, {regime}", kind, getattr(networks, network), 8, 224, 1_281_167, 3)


def race(training_race, regime, kind, network, batch, side, images, rounds):
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
    trained, model = network(), network()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9)
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), nuclear=1.0)
    source = kind(prox)

    def step():
        optimizer.zero_grad()
        cross_entropy(trained(x), y).backward()
        optimizer.step()

    for _ in range(WARMUP):
        step()
        weights = source.next()
        write(prox, weights)
        prox.step()
    results = [layer.weight.detach().flatten(1).clone() for layer in prox.layers]
    training_race(regime, results, [truth(W) for W in weights], step, lambda: write(prox, source.next()), prox.step,
                  images // batch, EVERY, rounds)  # fmt: skip


def truth(W):
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U * (s - 1).clamp_min(0) @ Vh
