"""ck_shrink emulated on the CPU: all checks of the shrinkage ops; races and bounds of the kernel."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.emulation import emulator, shrink_emulated
from tests.helpers.shrink_checks import DTYPES, reference, weight

ROOT = Path(__file__).parents[2]
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # DType of csrc/core/shrink.h
JOBS = 341
pytestmark = [pytest.mark.emulation, pytest.mark.skipif(bool(emulator.missing), reason=emulator.missing)]


@pytest.fixture(scope="module")
def found():
    """Errors by case, from a process that has no other C++ kernels for the CPU."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, shrink_emulated.__file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("case", shrink_emulated.cases())
def test_ops(case, found):
    assert found[case] == ""


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_races_and_nothing_out_of_bounds(sanitizer):
    """One block per row, one warp per row, and an elementwise job of two blocks."""
    cases = [((2, 1100), 1100), ((3, 10, 65), 65), ((3, 1500), 4096)]
    weights = [weight(shape, dtype, "cpu") for (shape, _), dtype in zip(cases, DTYPES, strict=False)]
    l1, tau = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([1.0, 2.0]).double()
    biases = [weight((*W.shape[:-1], 1), W.dtype, "cpu", 5)[..., 0].contiguous() for W in weights[:2]]
    rows = [torch.cat([W, b[..., None]], -1) for W, b in zip(weights, biases, strict=False)]
    shrunk = [reference("sparse_group_shrink")(R, a, t) for R, a, t in zip(rows, l1, tau, strict=False)]
    wanted = [R[..., :-1] for R in shrunk]
    wanted.append(reference("soft_threshold")(weights[2], l1[2]))
    table, first = b"", 0
    for i, (W, (_, span)) in enumerate(zip(weights, cases, strict=True)):
        matrices, size = W[..., 0, 0].numel(), W[0].numel() if W.ndim == 3 else W.numel()
        thresholds = (l1[i].data_ptr(), 0, tau[i].data_ptr() if i < 2 else 0, 0)
        data = W.data_ptr()
        bias = biases[i].data_ptr() if i < 2 else 0
        table += struct.pack("<q11q", TYPES.index(W.dtype), data, data, matrices, size, span, *thresholds, bias, first)
        spans = matrices * -(-size // span)
        first += -(-spans // 8) if span <= 1024 else spans
    jobs = struct.pack("<q", len(weights)) + table.ljust(96 * JOBS, b"\0")
    emulator.sanitize(sanitizer, [emulator.Launch("ck_shrink", first, 256, 0, [jobs])], [*weights, *biases, l1, tau])
    for W, P in zip([*weights, *biases], [*wanted, *(R[..., -1] for R in shrunk)], strict=True):
        assert torch.allclose(W.double(), P.double(), rtol=1e-2 if W.dtype == torch.bfloat16 else 1e-6, atol=1e-12)
