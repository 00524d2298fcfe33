"""CPU kernels of every instruction set of this machine, each in its own process: COMPAWARE_ISA is read once."""

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
LEVEL = {"AVX512": 2, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 0)


def digests():
    """What tells the instruction sets apart: a packed factor, whose layout follows the width of the vectors, and rows
    with norms in fp64, which AVX-512 sums with fused multiply-adds."""
    from tests.helpers import lowrank_checks as checks

    ops, generator = torch.ops.compaware, torch.Generator().manual_seed(0)
    packed = ops.lowrank_pack(checks.values((65, 3), generator).float(), torch.ones(4, 65), 1)[16:]  # behind the header
    shrunk = ops.group_shrink(checks.values((1000, 400), generator), torch.tensor(10.0))
    return [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in (packed, shrunk)]


def check_values():
    """The CPU ops against fp64."""
    from tests.helpers import lowrank_checks as checks
    from tests.helpers import shrink_checks

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
            U, _, V = (A.double() for A in ops.small_svd(W.to(dtype), True))
            torch.testing.assert_close(U @ V.mT, W, rtol=0, atol=tol * s.max().item())
    for X in (checks.values((37, 20), generator), checks.values((9, 30), generator).float()):
        w, V, _ = ops.gram_eigh([X], torch.tensor([1.0], dtype=torch.float64))
        G, V = X.double() @ X.double().mT if len(X) == 9 else X.mT @ X, V.view(w.shape[1], -1)[w[0] > 0]
        torch.testing.assert_close(V @ G, w[0, : len(V), None] * V, rtol=0, atol=1e-13 * float(G.trace()))
        assert len(V) == int((torch.linalg.eigvalsh(G) > 1).sum())
    for m, n, p in ((17, 600, 25), (1, 3, 1), (40, 9, 8)):
        X, Y = checks.values((m, n), generator).float(), checks.values((n, p), generator)
        torch.testing.assert_close(ops.wide_product(X, Y), X.double() @ Y, rtol=1e-13, atol=1e-12)
    for name in shrink_checks.OPS:
        for dtype in shrink_checks.DTYPES:
            shrink_checks.check_values(name, dtype, "cpu")
        shrink_checks.check_in_place(name, "cpu")
        shrink_checks.check_special_values(name, "cpu")
    shrink_checks.neuron_values("cpu")
    return digests()


def check_refusals():
    """Every op that has a C++ kernel reads COMPAWARE_ISA."""
    ops, x, tau = torch.ops.compaware, torch.ones(2, 3), torch.ones(1)
    for op, *args in (
        (ops.lowrank_linear, x, torch.ones(2, 3), torch.ones(4, 2), None, None, None, "none"),
        (ops.small_svd, x[None]),
        (ops.gram_eigh, [x], torch.ones(1, dtype=torch.float64)),
        (ops.wide_product, x, x.mT.double()),
        (ops.sum_of_squares, x),
        (ops.subspace_step, x, torch.ones(3, 1), 0.0),
        (ops.soft_threshold, x, tau),
        (ops.group_shrink, x, tau),
        (ops.sparse_group_shrink_, [x], tau, tau),
        (ops.neuron_shrink_, [x], [x[:, 0].clone()], tau),
    ):
        with pytest.raises(RuntimeError, match="wanted baseline, avx2 or avx512, and one that this machine has; got n"):
            op(*args)
    return "refused"


def run(isa, check):
    code = f"import json; from tests.ops import test_isa; print(json.dumps(test_isa.{check.__name__}()))"
    env = {**os.environ, "COMPAWARE_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True
    )


@pytest.mark.slow
def test_every_instruction_set():
    wanted, packed, shrunk = ("baseline", "avx2", "avx512")[: LEVEL + 1], [], []
    for isa in wanted:
        done = run(isa, check_values)
        assert done.returncode == 0, f"{isa}: {done.stderr}"
        for found, digest in zip((packed, shrunk), json.loads(done.stdout), strict=True):
            found.append(digest)
    assert len(set(packed)) == len(wanted), "each ran another kernel"
    assert len(set(shrunk)) == 1 + (LEVEL == 2), "the shrinkage ops, too"
    assert run("", digests).stdout == done.stdout, "the best is the default"


@pytest.mark.skipif(LEVEL == 0, reason="this machine has one instruction set")
def test_the_instruction_set_is_taken():
    done = run("baseline", digests)
    assert done.returncode == 0 and json.loads(done.stdout)[0] != digests()[0], done.stderr


def test_what_there_is_not_is_refused():
    done = run("neon", check_refusals)
    assert done.stdout == '"refused"\n', done.stderr
