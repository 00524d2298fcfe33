"""Matrix programs in Triton's interpreter; run with TRITON_INTERPRET=1, on its own.

The truth is fp64. Every matrix is a view of a larger one that is NaN around it, before the run and after.
"""

import copy
import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from compaware_kernels.proximal.cuda import matmul_kernel as kernel
from compaware_kernels.proximal.cuda import matmul_program as host
from compaware_kernels.proximal.cuda.matmul_program import TYPES, Program
from tests.emulation import triton_sim
from tests.emulation.triton_planted import IN_KERNEL, IN_TABLES, plant

pytestmark = pytest.mark.emulation

PROGRAMS = 16  # Triton programs per launch on the CPU
SEEDS = 0, 1, 2, 5, 9, 11  # all programs at a time in order; two, one, five, all and all in random order
SIZES = (1, 15, 16, 17, 64, 65, 130)
LIES = {  # how [M, N] lies in its memory: both strides, and the offset
    "rows": lambda M, N: (N, 1, 16),
    "columns": lambda M, N: (1, M, 16),
    "rows apart": lambda M, N: (N + 8, 1, 16),
    "columns apart": lambda M, N: (1, M + 8, 16),
    "rows askew": lambda M, N: (N + 3, 1, 5),
    "columns askew": lambda M, N: (1, M + 3, 5),
    "every other": lambda M, N: (2 * N + 3, 2, 5),
    "every third, transposed": lambda M, N: (3, 3 * M + 1, 16),
}


class Case(NamedTuple):
    """One product C = alpha A B + beta plus + gamma I, with its dtypes and gate."""

    A: Tensor
    B: Tensor
    C: Tensor
    plus: Tensor | None = None
    coef: Tensor | None = None
    gate: Tensor | None = None
    wide: bool = False
    layer: int = 0


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton_sim, "seed", 0)


def matrix(M, N, dtype=torch.float32, lies="rows", numbers=torch.randn):
    down, across, first = LIES[lies](M, N)
    memory = torch.full((first + M * down + N * across + 8,), math.nan, dtype=dtype)
    return memory.as_strided((M, N), (down, across), first).copy_(numbers(M, N))


def blank(M, N, dtype=torch.float32, lies="rows"):
    return matrix(M, N, dtype, lies, lambda *shape: torch.full(shape, math.nan))


def signs(M, N):
    """Random signs: products of integers are exact in floating point."""
    return torch.randint(-1, 2, (M, N))


def coef(alpha, beta=0.0, gamma=0.0):
    return torch.tensor([alpha, beta, gamma], dtype=torch.float64)


def gate(value):
    return torch.tensor([value], dtype=torch.int32)


def formula(case, dtype=torch.float64):
    """The product in plain torch."""
    A, B, plus = (None if X is None else X.to(dtype) for X in (case.A, case.B, case.plus))
    alpha, beta, gamma = (1, 0, 0) if case.coef is None else case.coef.tolist()
    total = alpha * (A @ B) + gamma * torch.eye(*case.C.shape, dtype=dtype)
    return total + beta * plus if beta else total


def bits(X):
    return X.contiguous().view(torch.uint8)


def around(X):
    """The memory around X, without X itself."""
    memory = X._base.clone()
    memory.as_strided(X.shape, X.stride(), X.storage_offset()).zero_()
    return bits(memory)


def build(stages, **options):
    """Program of these products; each list is a stage."""
    layers = 1 + max(case.layer for case in itertools.chain(*stages))
    program = Program(layers, **options)
    for cases in stages:
        for case in cases:
            program.multiply(case.layer, *case[:3], case.plus, case.coef, case.gate, case.wide)
        program.stage()
    return program.build("cpu")


def run(program, seed=0):
    """Run a program and return its counters; partial sums are NaN before."""
    for X in program.tensors:
        if X.dtype == torch.uint8:
            X.fill_(255)
    triton_sim.seed, counters = seed, torch.zeros(program.counters, dtype=torch.int32)
    with triton_sim.register(*program.tensors):
        program.run(counters)
    tickets, *done = counters.tolist()
    assert tickets == program.tiles + min(program.tiles, PROGRAMS) and sum(done) == program.tiles
    return done


def allowed(case, truth, precision):
    """Error bound: each of K products and a few more operations round once; tf32x3 may lose 2^-20 of a product."""
    sizes = [None if X is None else X.abs() for X in (case.A, case.B, case.C, case.plus, case.coef)]
    most = formula(Case(*sizes))
    half = [X.dtype.itemsize == 2 for X in (case.A, case.B)]
    parts = not case.wide and not all(half) and (any(half) or precision != "ieee")
    rounding, at_end = torch.finfo(torch.float64 if case.wide else torch.float32), torch.finfo(case.C.dtype)
    lost = (case.A.shape[1] + 8) * rounding.eps + 2**-19 * parts
    return lost * most + at_end.eps / 2 * truth.abs() + at_end.tiny * at_end.eps


def check(*stages, seed=0, precision="tf32x3", program=None, **options):
    """Run products and compare each with its operands after the run: no later product may have changed them."""
    program = program or build(stages, precision=precision, **options)
    cases = [case._replace(plus=None if case.plus is None else case.plus.clone()) for case in itertools.chain(*stages)]
    before = [(around(case.C), case.C.clone()) for case in cases]
    inputs = [X for case in itertools.chain(*stages) for X in (case.A, case.B)]
    inputs = [(X, bits(X._base).clone()) for X in inputs if not any(X is case.C for case in cases)]
    done = run(program, seed)
    for case, (outside, old) in zip(cases, before, strict=True):
        truth = formula(case)
        name = f"{list(case.A.shape)} {case.A.dtype} {case.A.stride()}, {case.B.dtype} {case.B.stride()}"
        assert torch.equal(around(case.C), outside), f"{name}: something around C is written"
        if case.gate is not None and not case.gate.item():
            assert torch.equal(bits(case.C), bits(old)), f"{name}: C is written, its gate is shut"
        else:
            wrong = ~((case.C.double() - truth).abs() <= allowed(case, truth, precision))
            assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()} numbers are wrong"
    assert all(torch.equal(bits(X._base), as_was) for X, as_was in inputs)
    return done


# --- values -----------------------------------------------------------------------------------------------------------


KINDS = [("ieee", False, TYPES), ("tf32x3", False, TYPES), ("ieee", True, TYPES)]


@pytest.mark.parametrize("precision, wide, factors", KINDS)
def test_dtypes(precision, wide, factors):
    """All combinations in one launch: each product must find its own loop and epilogue."""
    lies, sizes = itertools.cycle(LIES), itertools.cycle([(17, 40, 24), (66, 33, 48), (40, 16, 37)])
    cases = []
    for a, b, c in itertools.product(factors, factors, TYPES):
        M, N, K = next(sizes)
        ends = (matrix(M, N, c, next(lies)), coef(-0.7, 1.3, 0.9)) if len(cases) % 2 else ()
        A, B = matrix(M, K, a, next(lies)), matrix(K, N, b, next(lies))
        cases.append(Case(A, B, blank(M, N, c, next(lies)), *ends, wide=wide))
    check(cases, precision=precision)


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
def test_sizes(wide):
    lies, K = itertools.cycle(LIES), itertools.cycle((*SIZES[:-1], 33, 32))
    shapes = [(M, N, next(K)) for M, N in itertools.product(SIZES, repeat=2) if M * N < 65 * 130]
    check([
        Case(matrix(M, K, lies=next(lies)), matrix(K, N, lies=next(lies)), blank(M, N, lies=next(lies)), wide=wide)
        for M, N, K in shapes
    ])  # fmt: skip


@pytest.mark.parametrize("M, N, K", [(40, 24, 48), (33, 20, 17)], ids=["whole vectors", "not"])
def test_strides(M, N, K):
    """Strides of A with all of B, then those of C with all of plus; NaN around the matrices stays."""
    bf16, lies = torch.bfloat16, itertools.cycle(LIES)
    cases = []
    for one, other in itertools.product(LIES, repeat=2):
        cases.append(Case(matrix(M, K, bf16, one), matrix(K, N, lies=other), blank(M, N, lies=next(lies))))
        A, B = matrix(M, 16, lies=next(lies)), matrix(16, N, lies=next(lies))
        cases.append(Case(A, B, blank(M, N, bf16, one), matrix(M, N, bf16, other), coef(1, -1)))
    check(cases)


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
def test_epilogues(wide):
    """Also in place; and with beta = 0, NaN in plus does not reach C."""
    cases = []
    for (M, N), lies in itertools.product([(66, 70), (20, 66), (70, 3)], ["rows", "columns apart", "rows askew"]):
        A, B = matrix(M, 20), matrix(20, N)
        C, D = matrix(M, N, lies=lies), matrix(M, N, lies=lies)
        cases += [
            Case(A, B, C, C, coef(0.3, -0.7, 1.1), wide=wide),
            Case(A, B, D.mT.mT, D.mT.mT, coef(0, 1, -0.3), wide=wide),
            Case(A, B, blank(M, N, lies=lies), blank(M, N), coef(-2, 0, 0.5), wide=wide),
            Case(A, B, blank(M, N, lies=lies), None, coef(3), wide=wide),
        ]
    check(cases)


def test_empty_sums():
    """K = 0: C = 0, gamma I or beta plus; and C without rows or columns, which has no tiles."""
    cases, nothing = [], blank(3, 0, torch.float64)
    for M, N in ((1, 1), (70, 40), (40, 66), (0, 5), (5, 0), (0, 0)):
        A, B, C = blank(M, 0, torch.float64), blank(0, N, torch.float64), matrix(M, N)
        cases += [Case(A, B, blank(M, N)), Case(A, B, blank(M, N), None, coef(1, 0, 2))]
        cases += [Case(A, B, blank(M, N, torch.float16), blank(M, N, torch.float16).fill_(3), coef(1, 0.5, 2))]
        cases += [Case(A, B, C, C, coef(1, -1), wide=True), Case(matrix(M, 3), matrix(3, N), blank(M, N))]
    check(cases)
    check([Case(nothing.mT, nothing, blank(0, 0))])


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_as_accurate_as_plain_torch(dtype, precision):
    """At most twice the error of torch, plus 2^-21 for tf32x3; in fp64 if that is the dtype, else in fp32."""
    wide = dtype == torch.float64
    case = Case(matrix(130, 200, dtype), matrix(200, 70, dtype), blank(130, 70, dtype), wide=wide)
    exact = np.matmul(*(X.double().numpy().astype(np.longdouble) for X in (case.A, case.B)))
    plain = formula(case, torch.float64 if wide else torch.float32).to(dtype)
    share = 2**-21 * (dtype == torch.float32 and precision == "tf32x3")
    spare = share * formula(case._replace(A=case.A.abs(), B=case.B.abs())).numpy()
    run(build([[case]], precision=precision))
    for size in (np.linalg.norm, lambda error: abs(error).max()):
        error, bound = (size((X.double().numpy() - exact).astype(float)) for X in (case.C, plain))
        assert error <= 2 * bound + size(spare), f"{error:.1e}, {bound:.1e} in plain torch"


# --- order ------------------------------------------------------------------------------------------------------------


def test_gates_and_awake():
    cases = [Case(matrix(70, 40), matrix(40, 33), matrix(70, 33), gate=gate(n)) for n in (0, 1, 0, 7, -1)]
    check(cases)
    before, awake, counters = [case.C.clone() for case in cases], gate(0), torch.zeros(2, dtype=torch.int32)
    program = build([cases], awake=awake)
    with triton_sim.register(*program.tensors):
        program.run(counters)
    assert counters.tolist() == [PROGRAMS, 0] and program.tiles == 20
    assert all(torch.equal(case.C, C) for case, C in zip(cases, before, strict=True))
    awake.fill_(1)
    check(cases, program=program)


def test_counters():
    sizes = [(70, 33, 5), (16, 16, 16), (8, 8, 1100)]
    cases = [Case(matrix(M, K), matrix(K, N), blank(M, N), layer=i) for i, (M, N, K) in enumerate(sizes)]
    assert check(cases) == [4, 1, 3]


def products(open, sizes):
    """Integer matrices in layers of four stages: a product that starts early reads or overwrites wrong values."""
    stages = [[] for _ in range(4)]
    for layer, n in enumerate(sizes):
        A, B, T, S, G, V = (matrix(n, n, numbers=signs) for _ in range(6))
        of = {"layer": layer}
        stages[0] += [Case(A, B, T, **of), Case(B, A.mT, S, **of)]
        stages[1] += [Case(T.mT, T, G, gate=gate(open), **of), Case(T, S.mT, V, **of)]
        stages[2] += [Case(A, A, T, **of), Case(S, A, V, V, coef(-1, 2), **of)]
        stages[3] += [Case(V, G, blank(n, n, torch.float64), wide=True, **of), Case(T, T, S, **of)]
    return stages


def check_chain(seed=0, open=1, sizes=(33, 16, 8)):
    stages = products(open, sizes)
    in_order = copy.deepcopy(stages)
    for case in itertools.chain(*in_order):
        if case.gate is None or case.gate:
            case.C.copy_(formula(case))
    done = run(build(stages, precision="ieee"), seed)
    for case, exact in zip(itertools.chain(*stages), itertools.chain(*in_order), strict=True):
        assert torch.equal(case.C, exact.C), f"layer {case.layer} is wrong"
    return done


@pytest.mark.parametrize("open", [0, 1], ids=["shut", "open"])
def test_dependent_products(open):
    assert len({tuple(check_chain(seed, open)) for seed in SEEDS}) == 1


def sums():
    """Long sums that are split: in fp32, in fp64, in half types, behind a closed gate; then a product of two of
    them."""
    torch.manual_seed(0)
    half, K = torch.bfloat16, 16 * 64
    rows, columns = matrix(20, 700, lies="rows askew"), matrix(700, 33, lies="columns askew")
    first = Case(rows, columns, blank(20, 33))
    second = Case(matrix(66, K, half), matrix(K, 20, half, "columns"), blank(66, 20, half), None, coef(-1, 0, 1))
    third = Case(matrix(8, 500), matrix(500, 16), blank(8, 16), wide=True)
    shut = Case(rows, columns, matrix(20, 33), gate=gate(0))
    return [first, shut, second, third], [Case(second.C, first.C, matrix(66, 33))]


def check_sums(seed=0):
    """Run twice: the second run finds the counters of the first. Results are equal, whichever program arrives last."""
    stages, found = sums(), []
    program = build(stages)
    assert program.tiles > build(stages, at_once=1).tiles
    for again in (0, 1):
        check(*stages, program=program, seed=seed and seed + again)
        found.append([case.C.clone() for case in itertools.chain(*stages) if case.gate is None])
        for case in itertools.chain(*stages):
            case.C.fill_(math.nan)
    assert all(map(torch.equal, *found)), "the second run is wrong"
    return found[0]


def test_split_sums():
    first, *others = (check_sums(seed) for seed in SEEDS)
    assert all(torch.equal(C, D) for other in others for C, D in zip(first, other, strict=True))


def test_number_of_parts():
    """Split into one, some, and as many parts as possible."""
    for at_once in (1, 40, 10**6):
        check(*sums(), at_once=at_once)


def test_a_program_holds_all_tensors_its_tables_point_to():
    """Without any one of them, the simulator reports an access out of bounds; kernel arguments are not needed."""
    C = matrix(20, 33)
    case = Case(matrix(20, 800), matrix(800, 33), C, matrix(20, 33), coef(1, 1), gate(1))
    program = build([[case]])
    *pointed, awake = program.tensors
    assert len(pointed) == 8 and awake is program._awake
    for i in range(len(pointed)):
        with triton_sim.register(*pointed[:i], *pointed[i + 1 :]), pytest.raises(Exception, match="out of bounds"):
            program.run(torch.zeros(2, dtype=torch.int32))
        program.tensors[-2].zero_()  # arrival counters


# --- injected bugs ----------------------------------------------------------------------------------------------------


def check_ragged(seed=0):
    """Ragged sizes: tiles at all edges, and a last step of K that is not full."""
    cases = [
        Case(matrix(66, 40, lies=a), matrix(40, 37, lies=b), blank(66, 37, lies=c), None, coef(1, 0, 2))
        for a, b, c in itertools.product(["rows", "columns"], repeat=3)
    ]
    check(cases, [Case(matrix(20, 36), matrix(36, 64), blank(20, 64), blank(20, 64), coef(1))], seed=seed)


def check_vectors(seed=0):
    """Rows that hold whole vectors in one matrix and not in another."""
    cases = [
        Case(matrix(24, 40, lies=a), matrix(40, 24, lies=b), blank(24, 24), matrix(24, 24, lies=a), coef(1, 1))
        for a, b in itertools.product(["rows", "columns apart", "rows askew", "columns askew"], repeat=2)
    ]
    check(cases, seed=seed)


SHOWN_BY = {
    "chain": check_chain,
    "short chain": lambda seed: check_chain(seed, sizes=[16]),
    "two layers": lambda seed: check_chain(seed, sizes=[8, 9]),
    "shut chain": lambda seed: check_chain(seed, open=0),
    "ragged": check_ragged,
    "vectors": check_vectors,
    "sums": check_sums,
    "types": lambda seed: test_dtypes("ieee", False, TYPES[:3]),
    "strides": lambda seed: test_strides(40, 40, 16),
}


def red(check):
    with pytest.raises(Exception, match=r"(is|are) wrong|out of bounds|wait for each other|is written"):
        for seed in (*SEEDS[::-1], 12, 24, 25, 38):
            check(seed)


@pytest.mark.parametrize("bug", IN_KERNEL)
def test_an_injected_bug_is_detected(bug, tmp_path, monkeypatch):
    check, *replaced = IN_KERNEL[bug]
    monkeypatch.setattr(kernel, "run", plant(kernel, tmp_path, *replaced).run)
    red(SHOWN_BY[check])


@pytest.mark.parametrize("bug", IN_TABLES)
def test_a_bug_injected_into_the_tables_is_detected(bug, tmp_path, monkeypatch):
    check, *replaced = IN_TABLES[bug]
    monkeypatch.setitem(globals(), "Program", plant(host, tmp_path, *replaced).Program)
    red(SHOWN_BY[check])


@pytest.mark.parametrize("check", SHOWN_BY)
def test_checks_pass_without_bugs(check):
    SHOWN_BY[check](SEEDS[-1])
