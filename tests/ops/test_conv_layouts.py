"""Low-rank convolutions on which torch's own crash in channels_last: where that is so, they run in NCHW."""

import json
import subprocess
import sys

import torch

import compaware_kernels as ck

CRASHING = [  # of every fold: output pixels see only padding, and in channels_last oneDNN ends the process
    {"x": [3, 32, 5, 1], "O": 32, "r": 1, "k": [8, 1], "fold": "input", "geometry": [[4, 2], [5, 3], [2, 3], 8]},
    {"x": [1, 16, 16, 1], "O": 32, "r": 4, "k": [7, 1], "fold": "input", "geometry": [[2, 3], [2, 7], [1, 2], 8]},
    {"x": [1, 32, 16, 1], "O": 128, "r": 2, "k": [5, 3], "fold": "input", "geometry": [[4, 4], [8, 9], [3, 3], 16]},
    {"x": [2, 16, 5, 1], "O": 64, "r": 4, "k": [4, 2], "fold": "spatial", "geometry": [[1, 2], [6, 5], [1, 2], 8]},
    {"x": [3, 64, 5, 1], "O": 32, "r": 1, "k": [3, 1], "fold": "paper", "geometry": [[4, 3], [9, 2], [2, 2], 8]},
]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lowrank_error(case, dtype, last):
    """Largest error against the fp64 truth, relative to the largest output."""
    (kh, kw), (stride, padding, dilation, groups), C = case["k"], case["geometry"], case["x"][1] // case["geometry"][3]
    V, U = {"paper": ((kh, kw), (1, 1)), "spatial": ((1, kw), (kh, 1)), "input": ((1, 1), (kh, kw))}[case["fold"]]
    rest = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "fold": case["fold"]}
    args = [normal(*case["x"], seed=1), normal(groups * case["r"], C, *V, seed=2),
            normal(case["O"], case["r"], *U, seed=3), normal(case["O"], seed=4)]  # fmt: skip
    args = [A.to(dtype) for A in args]
    truth = ck.lowrank_conv2d(*(A.double() for A in args), **rest)
    if last:
        args[0] = args[0].contiguous(memory_format=torch.channels_last)
    y = ck.lowrank_conv2d(*args, **rest)
    return float((y - truth).abs().max() / truth.abs().max())


def crashing_errors():
    """Per case: fp32 and bf16, as given and in channels_last."""
    kinds = [(dtype, last) for dtype in (torch.float32, torch.bfloat16) for last in (False, True)]
    return [[lowrank_error(case, *kind) for kind in kinds] for case in CRASHING]


def test_convolutions_that_crash_in_channels_last():
    """In a child process. No values of bf16: torch's own are wrong on some machines."""
    code = "from tests.ops.test_conv_layouts import crashing_errors; print(crashing_errors())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert max(error for errors in json.loads(child.stdout) for error in errors[:2]) < 1e-6
