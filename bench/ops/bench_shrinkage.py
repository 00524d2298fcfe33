"""In-place shrinkage of every layer of ResNet-50, fp32, against the plain PyTorch formula, eager and compiled."""

import pytest
import torch
from torch.nn.functional import softshrink

from bench.common import workloads

L1, TAU = 1e-3, 0.4  # of weights of standard deviation 0.02: some rows die, most live


def soft_threshold(W):
    W.copy_(softshrink(W, L1))


def group_shrink(W):
    norm = torch.linalg.vector_norm(W, dim=1, keepdim=True)
    W.mul_((1 - TAU / norm).clamp_min_(0))


def sparse_group_shrink(W):
    soft_threshold(W)
    group_shrink(W)


FORMULAS = {
    "soft_threshold": (soft_threshold, (L1,)),
    "group_shrink": (group_shrink, (TAU,)),
    "sparse_group_shrink": (sparse_group_shrink, (L1, TAU)),
}


@pytest.mark.parametrize("op", FORMULAS)
@torch.no_grad()
def test_resnet50(race, op):
    formula, taus = FORMULAS[op]
    device, compiled = workloads.DEVICE, torch.compile(formula, dynamic=True)
    torch.manual_seed(0)
    source = [0.02 * torch.randn(shape, device=device) for shape in workloads.resnet50()]
    weights = {name: [W.clone() for W in source] for name in ("compaware", "eager", "torch.compile")}
    taus = [torch.full((len(source),), tau, dtype=torch.float64) for tau in taus]

    def reset(name):
        for W, S in zip(weights.get(name, []), source, strict=False):
            W.copy_(S)

    def each(function, name):
        return lambda: [function(W) for W in weights[name]] and None

    def ours():
        getattr(torch.ops.compaware, op + "_")(weights["compaware"], *taus)

    peers = {"eager": each(formula, "eager"), "torch.compile": each(compiled, "torch.compile")}
    for function in (ours, *peers.values()):
        function()
    for name in peers:  # each must compute the same as ours before it is timed
        torch.testing.assert_close(weights[name], weights["compaware"], rtol=1e-5, atol=1e-7)
    flat = torch.cat([W.flatten() for W in source])
    race(op, ours, peers, reset, floor=flat.neg_)
