"""A small network, its training, and a ProximalStep on its optimizer: for tests of optimizers."""

import torch
from torch import nn

import compaware_kernels as ck


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()


def loss_of(model, i):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return (model(x) - x).square().mean()


def train(model, optimizer, steps=6, start=0):
    for i in range(start, start + steps):
        model.zero_grad()  # that of the optimizer would patch its class, and hide a missing hook
        loss_of(model, i).backward()
        optimizer.step()


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | more)


def attached(model, optimizer, **more):
    return ck.ProximalStep(model, optimizer, **{"nuclear": 0.5, "group": 0.1, "every": 2} | more)


def assert_same_weights(model, wanted):
    for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)
