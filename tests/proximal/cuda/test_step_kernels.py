"""ck_begin, ck_orth, and whole steps of a network, emulated: against fp64, races and bounds."""

import math

import pytest
import torch

from compaware_kernels.ops import cuda_launcher
from compaware_kernels.proximal.cuda import device_structs, matmul_program, plan, step
from compaware_kernels.proximal.cuda.polar_express import schedule
from tests.emulation import emulator, step_case
from tests.emulation.step_case import (
    FULL,
    GATE,
    NO,
    REPORT,
    SUBSPACE,
    TOL,
    WIDTHS,
    changed,
    gates,
    make,
    network,
    one,
    report,
    state,
)
from tests.helpers import oracle
from tests.helpers.cases import low_rank, with_spectrum
from tests.proximal.cuda.test_block_kernels import SANITIZERS

pytestmark = [pytest.mark.emulation, pytest.mark.skipif(bool(emulator.missing), reason=emulator.missing)]

HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(matmul_program.Program, "run", step_case.multiply)
    with cuda_launcher.registered(emulator.launcher):
        yield


# --- begin -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 1000)
    return 1000


def in_memory(W):
    return W.mT.view(-1) if W.mT.is_contiguous() else W.view(-1)


@pytest.mark.parametrize("dtype", device_structs.DTYPES, ids=str)
def test_begin_sums_squares(dtype, chunks):
    made = make(network(dtype), WIDTHS)
    step._begin(made)
    wanted = [part.double().square().sum() for x in made.matrices for part in in_memory(x.W).split(chunks)]
    torch.testing.assert_close(made.partials, torch.stack(wanted), rtol=1e-14, atol=0)
    assert not made.refused


def test_begin_refuses_nonfinite_weights(chunks):
    """NaN and Inf at both ends of every chunk, in matrices of all sizes."""
    made = make(network(), WIDTHS)
    for x in made.matrices:
        flat = in_memory(x.W)
        ends = sorted({*range(0, len(flat), chunks), *range(chunks - 1, len(flat), chunks), len(flat) - 1})
        for at, value in zip(ends, [math.nan, math.inf, -math.inf] * len(ends), strict=False):
            kept = flat[at].item()
            flat[at] = value
            step._begin(made)
            assert made.refused, (x.m, at)
            flat[at] = kept
            made.refused.zero_()
    step._begin(made)
    assert not made.refused


@pytest.mark.parametrize("value, refused", [(3e38, 0), (1e153, 1), (-1e200, 1)])
def test_begin_refuses_overflowing_squares(value, refused):
    made = make([torch.full((200, 64), value, dtype=torch.float64)], [16])
    step._begin(made)
    assert made.refused == refused


def test_begin_resets_its_state():
    made = make([*network(), low_rank(200, 64, 6)], [*WIDTHS, 0])
    made.zeroed.fill_(7)
    for x, known in zip(made.layers, (1, 0, 1, 1), strict=True):
        x.gates.fill_(7)
        x.report[REPORT["known"]] = known
    before = state(made)
    step._begin(made)
    assert not made.zeroed.any()
    assert [gates(x)["try"] for x in made.layers] == [1, 0, 1, 0]
    for x in made.layers:
        x.gates[GATE["try"]] = 7
    assert changed(before, state(made)) == {"partials", "zeroed", *(f"{x.number}.omega" for x in made.layers)}


def test_probes():
    def probes(seed=step_case.SEED, call=step_case.CALL):
        made = make(network(), WIDTHS)
        made.call.copy_(torch.tensor([seed, call]))
        step._begin(made)
        return [x.omega for x in made.layers]

    first = probes()
    for x in first:
        step_case.is_normal(x)
        assert abs(x.mT @ x - len(x) * torch.eye(32)).max() <= 8 * (2 * len(x)) ** 0.5
    assert all(map(torch.equal, first, probes()))
    others = [x for options in ({"seed": step_case.SEED + 1}, {"call": step_case.CALL + 1}) for x in probes(**options)]
    for x in first:
        assert not torch.isin(x, torch.cat([y for y in [*first, *others] if y is not x])).any()


# --- orth ------------------------------------------------------------------------------------------------------------


def decide(made, tol=TOL, refused=0):
    """First launch of ck_orth, with NaN in everything that it must write."""
    for x in made.layers:
        x.gates.fill_(7)
        x.report[: REPORT["known"]], x.report[REPORT["rho"]] = math.nan, math.nan
        x.s.fill_(math.nan)
    step._begin(made)
    made.refused.fill_(refused)
    step._orth(made, tol, first=True)


DENSE = {"dense": 1, "method": FULL}
FIRST = {  # options, then the expected decision
    "unknown": ({}, DENSE | {"restart": 1}),
    "known": ({"known": True}, {"try": 1, "method": SUBSPACE}),
    "no basis": ({"k": 0}, DENSE),
    "tau = 0": ({"tau": 0.0, "known": True}, {"method": step_case.NOTHING, "rank": -1}),
    "all below": ({"tau": 1e3, "known": True}, {"clear": 1, "method": step_case.ZERO}),
    "refused": ({"refused": 1, "known": True}, {"method": step_case.REFUSED, "rank": -1}),
    "refused, all below": ({"refused": 1, "tau": 1e3}, {"method": step_case.REFUSED, "rank": -1}),
    "refused, tau = 0": ({"refused": 1, "tau": 0.0}, {"method": step_case.REFUSED, "rank": -1}),
    "too fine for fp32": ({"tol": 1e-6, "known": True}, DENSE),
    "too small for fp32": ({"scale": 1e-15, "tau": 1e-15, "known": True, "tol": 1.0}, DENSE),
    "tau too small for fp32": ({"scale": 1e-12, "tau": 1e-12, "known": True, "tol": 1.0}, DENSE),
    "too large for fp32": ({"scale": 1e10, "tau": 1e10, "known": True}, DENSE),
}


@pytest.mark.parametrize("case", FIRST)
def test_orth_chooses_the_route(case, chunks):
    options, wanted = FIRST[case]
    options = {"scale": 1, "tol": TOL, "refused": 0, **options}
    scale, tol, refused = (options.pop(name) for name in ("scale", "tol", "refused"))
    made, x = one(**options)
    x.W.mul_(scale)
    decide(made, tol, refused)
    found, told = gates(x), report(x)
    assert found == NO | {name: value for name, value in wanted.items() if name in NO}
    assert (told["method"], told["rank"]) == (wanted["method"], wanted.get("rank", 0))
    assert told["error"] == told["rho"] == 0
    assert math.isclose(told["norm"], 1.000001 * x.W.double().norm(), rel_tol=1e-12)
    assert told["known"] == (options.get("known", False) or found["restart"])
    assert x.s.isnan().all() if refused else not x.s.any()
    assert made.awake == found["dense"]
    assert bool(x.gates[device_structs.SIGN_PAIR :].any()) == bool(found["dense"])


def test_orth_at_the_boundaries():
    made, x = one(known=True)
    decide(made)
    norm = report(x)["norm"]
    for tau, method in ((norm, step_case.ZERO), (math.nextafter(norm, 0), SUBSPACE)):
        x.tau.fill_(tau)
        decide(made)
        assert report(x)["method"] == method
    x.tau.fill_(1)
    for factor, method in ((1 + 1e-9, SUBSPACE), (1 - 1e-9, FULL)):
        decide(made, 2 * 2**-24 * norm * factor)
        assert report(x)["method"] == method


@pytest.mark.parametrize("tau", [1e-5, 1e-3, 0.03, 1, 100])
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-7])
def test_scales_of_the_polynomials(tau, tol):
    """Scales of proximal/cuda/matrix_sign.py, and the first polynomial whose interval holds the smallest relevant
    number."""
    made, x = one(k=0, tau=tau)
    decide(made, tol)
    assert gates(x)["dense"]
    check_polynomials(x, tol)


def test_polynomials_at_the_boundaries():
    """The smallest relevant number lies next to the end of an interval; beta is near 2, where the 1 in beta + 1
    matters."""
    made, x = one(k=0)
    decide(made)
    norm, lows = report(x)["norm"], [low for low, *_ in schedule()]
    x.tau.fill_(norm / 1.1)
    ratio = norm / x.tau.item()
    for low in lows[2::2]:
        for factor in (1 + 1e-9, 1 - 1e-9):
            tol = 2 * (ratio**2 + 1) * low * factor
            decide(made, tol)
            check_polynomials(x, tol)
    for low in (low for low in lows[14::2] if 0.9 / low > 2):
        for factor in (1 + 1e-9, 1 - 1e-9):
            x.tau.fill_(norm / math.sqrt((0.9 / low) ** 2 - 2) * factor)
            decide(made)
            check_polynomials(x, TOL)


def check_polynomials(x, tol):
    beta, tau = (report(x)["norm"] / x.tau.item()) ** 2 + 1, x.tau.item()
    wanted = {"project": (-1 / tau, 1 / tau, 0), "power": (1 / tau, 0, 0), "gram": (1 / tau**2, 0, -1),
              "scale_sign": (0, 1 / beta, 0), "scale_root": (0, 1 / (beta + 1), 0),
              "correction": (-1 / math.sqrt(beta + 1), 1, 0), "root_check": (-1 / (beta + 1), 1, 0)}  # fmt: skip
    for name, row in wanted.items():
        assert x.coefficient[name].tolist() == pytest.approx(row, rel=1e-14)
    lows = [low for low, *_ in schedule()]
    for pairs, low, first in ((x.sign_pairs, tol / (2 * beta), 0), (x.root_pairs, 0.9 / math.sqrt(beta + 1), 12)):
        taken = [int(gate) for gate in pairs]
        left_out = taken.count(0)
        at = first + 2 * left_out
        assert taken == [0] * left_out + [1] * (len(taken) - left_out) and left_out < len(taken)
        assert (lows[at] <= low or not left_out) and (at + 2 == len(lows) or lows[at + 2] > low)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("k", [1, 5, 16, 33, 64])
def test_orth(k, first):
    made, x = one(k=k, known=True)
    B = step_case.normal(200, k) * torch.logspace(2, -2, k, dtype=torch.float64)
    step._begin(made)
    x.G.copy_(B.mT @ B)
    step._orth(made, TOL, first=first)
    Q = B @ x.S.double()
    assert (Q.mT @ Q - torch.eye(k)).abs().max() <= 1e-6 and torch.equal(x.S, x.S.triu())


def test_orth_of_dependent_columns():
    made, x = one(known=True)
    B = step_case.normal(200, 16)
    B[:, 3], B[:, 7], B[:, 15] = 0, B[:, 2], B[:, 0] + B[:, 1]
    B[:, 9] = B[:, 4] + 1e-7 * B[:, 9]
    B[:, 11] = B[:, 5] + 1e-5 * B[:, 11]
    x.G.copy_(B.mT @ B)
    step_case.trying(x)
    step._orth(made, TOL, first=False)
    lost, Q = torch.tensor([3, 7, 9, 15]), B @ x.S.double()
    wanted = torch.eye(16, dtype=torch.float64)
    wanted[lost, lost] = 0
    assert not x.S[:, lost].any() and not x.S[lost].any()
    assert (Q.mT @ Q - wanted).abs().max() <= 2e-2  # column 11 has a condition of 1e5, in fp32
    assert (Q.mT @ Q - wanted)[:9, :9].abs().max() <= 1e-6


@pytest.mark.parametrize("kernel", ["orth", "ritz", "judge", "finish"])
def test_closed_gates_change_nothing(kernel):
    """No output changes for layers whose subspace is not tried."""
    made = make(network(), WIDTHS)
    for x in made.layers:
        x.gates.zero_()
    before = state(made)
    step_case.launch(made, kernel)
    assert changed(before, state(made)) == ({"inputs"} if kernel == "finish" else set())


def test_restart():
    """Random columns that differ from all other random numbers of this call and the next."""
    made, found = make(network(), WIDTHS), []
    for call in range(2):
        made.call[1] = call
        made.out.zero_()
        decide(made)
        found += [y.clone() for x in made.layers for y in (x.restart, x.omega)]
    for basis in found[::2]:
        step_case.is_normal(basis)
        assert all(step_case.look_alike(basis, other) < 0.05 for other in found if other is not basis)


# --- whole steps ------------------------------------------------------------------------------------------------------


def check(made, before, tol=TOL):
    """Within the reported error bound of the fp64 truth, and within the tolerance."""
    for x, X in zip(made.layers, before, strict=True):
        told, tau, storage = report(x), x.tau.item(), 2 * torch.finfo(x.W.dtype).eps
        if told["method"] in (step_case.NOTHING, step_case.REFUSED):
            assert torch.equal(x.W.isnan(), X.isnan()) and torch.equal(x.W.nan_to_num(), X.nan_to_num())
            continue
        exact, slope = torch.linalg.svdvals(X.double()), x.slope.item()
        truth = oracle.firm_svt(X.double().numpy(), tau, slope / (slope - 1)) if made.firm else None
        error = x.W.double() - torch.from_numpy(oracle.svt(X.double().numpy(), tau) if truth is None else truth)
        assert error.norm() <= told["error"] and told["rank"] == (exact > tau).sum()
        assert torch.linalg.matrix_norm(error, 2) <= tol * tau + storage * exact[0]
        if told["method"] != FULL:
            wanted = torch.minimum(slope * (exact - tau), exact).clamp_min(0)
            assert (x.s - wanted).abs().max() <= tol * tau
    return [report(x)["method"] for x in made.layers]


def run(made, tol=TOL):
    before = [x.W.clone() for x in made.layers]
    step.run(made, tol)
    return check(made, before, tol)


def again(made, weights):
    for x, W in zip(made.matrices, weights, strict=True):
        x.W.copy_(W if x.W.shape == W.shape else W.mT)
    return run(made)


@HALVES
def test_steps_of_a_network(dtype):
    made = make(network(dtype), WIDTHS)
    assert run(made) == [FULL] * 3
    assert [again(made, network(dtype)) for _ in range(3)][-1] == [SUBSPACE] * 3


@HALVES
@pytest.mark.parametrize("gamma", [1.05, 1.5, 4.0, 1e4])
def test_firm_steps(gamma, dtype):
    made = make(network(dtype), WIDTHS, gamma=gamma)
    assert run(made) == [FULL] * 3
    methods = [again(made, network(dtype)) for _ in range(3)][-1]
    assert methods == [SUBSPACE] * 3 or gamma == 1.05
    if dtype == torch.float32 and gamma == 1.5:  # what was above gamma tau stays
        W = with_spectrum(200, 64, torch.linspace(40, 9, 64)).float()
        made = make([W.clone()], [0], gamma=gamma)
        assert run(made) == [FULL] and (made.layers[0].W - W).abs().max() <= 1e-6 * W.abs().max()


@pytest.mark.parametrize("gamma", [1.2, 5.0])
@pytest.mark.parametrize("s", [torch.full((64,), 50.0), torch.logspace(2, -6, 64), torch.linspace(6.1, 0, 64),
                               torch.tensor([5.0, 5.00001, 4.99999, 1.2, 1.2, 1.0001, 0.9999, 0.5])],
                         ids=["one number", "log-spaced", "across both", "at both"])  # fmt: skip
def test_firm_spectra(s, gamma):
    """By products and, where that does, by the subspace: values at tau and at gamma tau, too."""
    W = with_spectrum(200, 64, s).float()
    made = make([W.clone(), W.clone()], [0, 16], gamma=gamma)
    run(made)
    for _ in range(3):
        again(made, [W, W])


def test_a_firm_plan_serves_soft_thresholds():
    """What it keeps of an earlier call with another gamma does not matter."""
    made = make(network(), WIDTHS, gamma=2.0)
    run(made)
    made.slopes.fill_(1)
    made.call[1] = step_case.CALL
    for x, W in zip(made.matrices, network(), strict=True):
        x.W.copy_(W if x.W.shape == W.shape else W.mT)
        if x.k:
            x.report[REPORT["known"]] = 0
    soft = make(network(), WIDTHS)
    step.run(made, TOL)
    step.run(soft, TOL)
    for x, y in zip(made.layers, soft.layers, strict=True):
        assert report(x)["method"] == report(y)["method"] == FULL
        assert report(x)["error"] == pytest.approx(report(y)["error"], rel=1e-3)
        torch.testing.assert_close(x.W, y.W, rtol=0, atol=2e-7 * float(y.W.norm()))


@pytest.mark.parametrize("gap", [0.5, 0.05, 0.003])
@pytest.mark.parametrize("noise", [0, 1e-4, 1e-2, 1])
def test_bases_of_all_qualities(gap, noise):
    """Singular values on both sides of tau, inside and outside of the basis: on either route the report is correct."""
    s = torch.cat([torch.tensor([30, 9, 1 + gap, 1 + gap, 1 - gap]), torch.linspace(1 - gap, 0, 59)])
    made = make([with_spectrum(200, 64, s).float(), with_spectrum(80, 120, s).float()], [4, 16], known=True)
    for x in made.layers:
        x.V.add_(noise * step_case.normal(*x.V.shape).float())
    methods = run(made)
    if noise == 1e-4 and gap == 0.5:
        assert methods == [SUBSPACE] * 2


BAD = {
    "orthogonal": lambda V, R: V.copy_(R[:, -16:]),
    "one is missing": lambda V, R: V.copy_(R[:, 1:17]),
    "copies of one": lambda V, R: V.copy_(R[:, :1].expand(-1, 16)),
    "nothing": lambda V, R: V.zero_(),
    "NaN": lambda V, R: V[5].fill_(math.nan),
    "a column of NaN": lambda V, R: V[:, 3].fill_(math.nan),
    "Inf": lambda V, R: V[5, 5].fill_(math.inf),
}


@pytest.mark.parametrize("basis", BAD)
def test_bad_bases(basis):
    """The subspace is rejected, products of the whole matrix are used, and some calls later the basis is good again."""
    W = with_spectrum(200, 64, torch.cat([torch.full((6,), 1.5), torch.full((58,), 0.4)])).float()
    made = make([W.clone()], [16], known=True)
    x = made.layers[0]
    BAD[basis](x.V, step_case.right_vectors(x))
    methods = [run(made), *(again(made, [W]) for _ in range(10))]
    assert methods[0] == [FULL] and methods[-1] == [SUBSPACE]


def test_more_singular_values_above_tau_than_columns():
    made = make([low_rank(200, 64, 9)], [5], known=True)
    assert run(made) == [FULL]


@pytest.mark.parametrize("where", range(4))
def test_refused_step(where):
    """No matrix changes; only the call counter does. The next call works as if this one had not happened."""
    made = make(network(), WIDTHS, known=True)
    made.matrices[where].W[1, 2] = math.nan
    before = state(made)
    assert run(made) == [step_case.REFUSED] * 3
    kept = {f"{x.number}.{name}" for x in made.layers for name in ("W", "V", "s")}
    assert not kept & changed(before, state(made)) and not made.refused and made.call[1] == step_case.CALL + 1
    assert again(made, network()) == [SUBSPACE] * 3


def test_tolerance_below_fp32_is_reported_as_missed():
    """A tolerance that fp32 storage cannot meet: the report says so."""
    made = make(network(), WIDTHS)
    step.run(made, 1e-16)
    assert [report(x)["method"] for x in made.layers] == [step_case.UNSURE] * 3


def every_way(gamma=math.inf):
    """Layers that take all routes at once: subspace accepted, rejected, restarted, cleared, unchanged."""
    weights = [with_spectrum(200, 64, torch.logspace(2, 0.3, 6)).float(), low_rank(64, 170, 9).float(),
               low_rank(20, 12, 3).float(), low_rank(130, 96, 9).float(), low_rank(120, 80, 3).float(),
               low_rank(120, 80, 3).float()]  # fmt: skip
    made = make(weights, [16, 5, 16, 20, 16, 0], tau=[1.0, 1.0, 1.0, 1.0, 1e4, 0.0], known=True, gamma=gamma)
    made.layers[2].report[REPORT["known"]] = 0
    made.layers[2].V.zero_()
    return step_case.apart(made)


WAYS = [SUBSPACE, FULL, FULL, step_case.ZERO, step_case.NOTHING]


def test_thread_order_does_not_change_a_bit(chunks, monkeypatch):
    monkeypatch.setattr(step, "FEW_COLUMNS", 15)
    found = []
    for seed in range(4):
        monkeypatch.setenv("CK_EMU_SEED", str(seed))
        monkeypatch.setenv("CK_EMU_THREADS", str(1 + seed % 3))
        made = every_way()
        assert run(made) == WAYS
        step.run(made, TOL)
        found.append(state(made))
    assert not set().union(*(changed(found[0], other) for other in found[1:]))


@SANITIZERS
@pytest.mark.parametrize("gamma", [math.inf, 3.0])
def test_no_races_and_nothing_out_of_bounds(gamma, sanitizer, monkeypatch):
    monkeypatch.setattr(plan, "CHUNK", 5000)
    monkeypatch.setattr(step, "FEW_COLUMNS", 15)
    monkeypatch.setattr(step, "THREADS", 128)
    made = every_way(gamma)
    with step_case.sanitized(made, sanitizer):
        assert run(made) == WAYS
    alone = every_way(gamma)
    run(alone)
    found, wanted = state(made), state(alone)
    assert all(torch.allclose(found[name], wanted[name]) for name in changed(found, wanted))
