"""The kernels of every instruction set this machine has, each in a process of its own: COMPAWARE_ISA is read once."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compaware_kernels.ops import library

pytestmark = pytest.mark.skipif(bool(library.missing), reason=f"no C++ kernel: {library.missing}")


def check_values():
    """small_svd, wide_product and the low-rank ops against fp64; how one matrix was packed tells the kernels apart."""
    from tests.helpers import lowrank_checks as checks

    ops, generator = torch.ops.compaware, torch.Generator().manual_seed(0)
    for name in checks.CONV:
        checks.check_conv2d(name, "paper", residual=True, activation="relu6")
    for name in checks.LINEAR:
        checks.check_linear(name, residual=True)
    for shape in ((35, 9, 6), (3, 5, 17), (1, 1, 1)):
        W = checks.values(shape, generator)
        for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
            U, s, V = (A.double() for A in ops.small_svd(W.to(dtype)))
            torch.testing.assert_close((U * s[:, None]) @ V.mT, W, rtol=0, atol=tol * s.max().item())
            torch.testing.assert_close(V.mT @ V, torch.eye(s.shape[1]).double().expand_as(V.mT @ V), rtol=0, atol=tol)
    for m, n, p in ((17, 600, 25), (1, 3, 1), (40, 9, 8)):
        X, Y = checks.values((m, n), generator).float(), checks.values((n, p), generator)
        torch.testing.assert_close(ops.wide_product(X, Y), X.double() @ Y, rtol=1e-13, atol=1e-12)
    packed = ops.lowrank_pack(checks.values((65, 3), generator).float(), torch.ones(4, 65), 1)
    return hashlib.sha256(packed[16:].numpy().tobytes()).hexdigest()  # behind the header


def run(isa):
    code = "import json, test_isa; print(json.dumps(test_isa.check_values()))"
    env = {**os.environ, "COMPAWARE_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True
    )


def test_every_instruction_set():
    level = {"AVX512": 2, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 0)
    wanted, layouts = ("baseline", "avx2", "avx512")[: level + 1], []
    for isa in wanted:
        done = run(isa)
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        layouts.append(json.loads(done.stdout))
    assert len(set(layouts)) == len(wanted), "each ran another kernel"
    assert run("").stdout == done.stdout, "the best is the default"


def test_what_there_is_not_is_refused():
    done = run("neon")
    assert "COMPAWARE_ISA: wanted baseline, avx2 or avx512, and one that this machine has; got neon" in done.stderr
