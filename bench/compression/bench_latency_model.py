"""Latency model: is what ck.compress(goal="speed") returns ever slower than the dense model?

Random networks at the ranks that users ask for: widths 8 to 512, kernels 1 to 7, strides, groups, batches 1 to 8,
inputs of 8 to 56 pixels. Each is compressed twice, choosing layers by the latency model and by measurement, and timed
against the dense network, both in the given memory format and in channels_last.
"""

import copy
import math
import random

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from bench.nn.inference_tables import planner_rows
from compaware_kernels.compression import latency_model

RULES = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2}


def random_network(seed: int) -> tuple[nn.Module, torch.Tensor]:
    rng = random.Random(seed)
    widths = [8, 16, 24, 48, 64, 96, 128, 256, 512]
    size, inputs = rng.choice([8, 14, 28, 56]), rng.choice(widths[:6])
    x, layers = torch.randn(rng.choice([1, 2, 8]), inputs, size, size), []
    for _ in range(rng.randint(2, 6)):
        outputs, kernel = rng.choice(widths), rng.choice([1, 1, 3, 3, 5, 7])
        stride = rng.choice([1, 1, 2]) if size >= 8 else 1
        groups = rng.choice([1, 1, 1, math.gcd(math.gcd(inputs, outputs), 4)])
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups), nn.ReLU()]
        inputs, size = outputs, -(-size // stride)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, rng.choice([10, 1000]))]
    return nn.Sequential(*layers, *head).eval(), x


@pytest.mark.parametrize("measure", [False, True], ids=["predicted", "measured"])
@pytest.mark.parametrize("seed", range(30))
def test_random_networks(seed, measure):
    torch.manual_seed(seed)
    dense, x = random_network(seed)
    share = random.Random(seed).choice(list(RULES))
    rule = ck.ranks.share(RULES[share])
    small, report = ck.compress(dense, rule, (x,), measure=measure)
    assert all(layer.reason for layer in report.layers)
    with torch.no_grad():  # reference: the same function with the factors multiplied out
        truth = ck.to_dense(small).double()(x.double())
        assert (small(x) - truth).abs().max() <= 1e-5 * truth.abs().max()
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        times = latency_model.seconds([lambda: dense(x), lambda: last(x), lambda: small(x)], x.device)
    factorized = sum(layer.rank is not None for layer in report.layers)
    planner_rows.append((seed, "measured" if measure else "predicted", share, factorized, len(report.layers), *times))
