"""ck_ritz, ck_judge and ck_finish, one by one, emulated: against fp64 and the formulas of the error bounds."""

import itertools
import math

import pytest
import torch

from compaware_kernels.ops import cuda_launcher
from compaware_kernels.proximal import error_bounds
from compaware_kernels.proximal.cuda import device_structs, matmul_program, step, subspace_iteration
from compaware_kernels.proximal.cuda.polar_express import schedule
from tests.emulation import emulator, step_case
from tests.emulation.step_case import (
    FULL,
    GATE,
    NO,
    SUBSPACE,
    TOL,
    changed,
    gates,
    launch,
    normal,
    one,
    report,
    state,
    trying,
)
from tests.helpers.cases import low_rank

pytestmark = [pytest.mark.emulation, pytest.mark.skipif(bool(emulator.missing), reason=emulator.missing)]

HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(matmul_program.Program, "run", step_case.multiply)
    with cuda_launcher.registered(emulator.launcher):
        yield


# --- ritz ------------------------------------------------------------------------------------------------------------


def ritz(H, tau=1.0, gamma=math.inf):
    made = step_case.make([torch.zeros(200, 150)], [len(H)], tau, gamma=gamma)
    x = made.layers[0]
    trying(x)
    x.H.copy_(H)
    step._ritz(made)
    return x


@pytest.mark.parametrize("turned, angles", [(1e-2, 1e-7), (None, 5e-3)], ids=["warm", "random"])
@pytest.mark.parametrize("k", [1, 5, 16, 48, 96, 112, 144])
def test_ritz(k, turned, angles):
    """Q mu^2 Q^T is H; Q is orthogonal to rounding if the basis was that of the step before."""
    mu, tau = torch.logspace(2, -1, k, dtype=torch.float64), 1.0
    R = torch.linalg.qr(normal(k, k) if turned is None else torch.eye(k) + turned * normal(k, k)).Q
    H = R.mT @ torch.diag(mu**2) @ R
    x = ritz(H, tau)
    Q = x.Qs.double()
    assert (Q.mT @ Q - torch.eye(k)).abs().max() <= angles
    assert (Q * x.mu**2 @ Q.mT - H).norm() <= 1e-7 * H.norm()
    assert (x.mu.diff() <= 0).all() and ((x.mu - mu) / mu).abs().max() <= 10 * angles**2 + 1e-11
    torch.testing.assert_close(x.Qv.double(), Q / x.mu, rtol=3e-7, atol=1e-30)
    torch.testing.assert_close(x.Qf.double(), Q * (1 - tau / x.mu).clamp_min(0), rtol=3e-7, atol=1e-30)
    checked = int((mu > 0.8 * tau).sum())
    step_case.is_normal(x.inside[:checked])
    assert not x.inside[checked:].any() and torch.equal(x.scaled, x.inside * x.mu[:, None])


@pytest.mark.parametrize("gamma", [1.01, 2.0, 100.0])
def test_ritz_of_firm_thresholds(gamma):
    """Of values at tau and at gamma tau, too."""
    mu = torch.tensor([300, 2.02, 2, 1.5, 1.01, 1.001, 1, 0.9, 0.1], dtype=torch.float64)
    R = torch.linalg.qr(torch.eye(9) + 1e-2 * normal(9, 9)).Q
    x = ritz(R.mT @ torch.diag(mu**2) @ R, gamma=gamma)
    gain = torch.minimum(gamma / (gamma - 1) * (1 - 1 / x.mu), torch.tensor(1.0)).clamp_min(0)
    torch.testing.assert_close(x.Qf.double(), x.Qs.double() * gain, rtol=3e-7, atol=1e-7)
    assert gain[0] == 1


def test_ritz_in_shared_or_global_memory(monkeypatch):
    Z = normal(150, 40)
    first = ritz(Z.mT @ Z)
    for columns in (39, 40, 41):
        monkeypatch.setattr(step, "FEW_COLUMNS", columns)
        x = ritz(Z.mT @ Z)
        assert all(torch.equal(getattr(x, name), getattr(first, name)) for name in ("Qs", "Qv", "Qf", "mu", "inside"))


@pytest.mark.parametrize("tau", [1.0, 1e-9])
def test_ritz_of_small_values(tau):
    """Values lost in the rounding of the largest get no vectors; values nearly lost are not checked."""
    mu = torch.tensor([100, 0, 0.81, 1.2e-5, 0.79, 3, 0, 2e-4, 8e-6, 1.01e-4, 0.99e-4], dtype=torch.float64)
    x = ritz(torch.diag(mu**2), tau)
    sorted_mu, order = mu.sort(descending=True, stable=True)
    torch.testing.assert_close(x.mu, sorted_mu, rtol=1e-14, atol=0)
    columns = torch.eye(11)[:, order] * (sorted_mu > 1e-5)
    assert torch.equal(x.Qs, columns)
    torch.testing.assert_close(x.Qv.double(), (columns / sorted_mu).nan_to_num(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(x.Qf.double(), (columns * (1 - tau / sorted_mu)).nan_to_num(0, 0, 0).clamp_min(0))
    checked = 3 if tau == 1 else 6
    assert x.inside[:checked].all() and not x.inside[checked:].any()


def test_ritz_keeps_values_above_rounding():
    """Columns of H that differ by less than a millionth, whose small value is still above rounding."""
    R, mu = torch.tensor([[1, -1], [1, 1]]) / torch.tensor(2, dtype=torch.float64).sqrt(), [100, 3e-5]
    x = ritz(R * torch.tensor(mu, dtype=torch.float64) ** 2 @ R.mT)
    assert x.mu.tolist() == pytest.approx(mu, rel=1e-2)
    torch.testing.assert_close(x.Qs.double().abs(), R.abs(), rtol=1e-6, atol=0)


def test_ritz_of_zeros():
    for H in (torch.zeros(16, 16), torch.full((16, 16), math.nan)):
        x = ritz(H)
        assert not any(getattr(x, name).any() for name in ("mu", "Qs", "Qv", "Qf", "inside", "scaled"))


def test_ritz_uses_its_own_random_streams():
    """They differ from those of other layers and other calls."""
    made = step_case.make([torch.zeros(200, 150)] * 2, [16, 16])
    found = []
    for call in range(2):
        made.call[1] = call
        step._begin(made)
        for x in made.layers:
            trying(x)
            x.H.copy_(9 * torch.eye(16))
        step._ritz(made)
        found += [y.clone() for x in made.layers for y in (x.inside, x.omega)]
    assert all(step_case.look_alike(x, y) == 0 for i, x in enumerate(found) for y in found[:i])


# --- judge -----------------------------------------------------------------------------------------------------------

PARTS = ("F", "left", "skew_U", "skew_V")
POWERS = torch.arange(1, device_structs.POWERS + 1)


def judge(sizes, rest, tol=TOL, tau=1.0, dtype=torch.float32, mu=None, spoil=None, norm=100.0, gamma=math.inf):
    """Run ck_judge with partial results of these norms and probe powers of a rest with norm ``rest`` times tau."""
    made, x = one(tau=tau, dtype=dtype, gamma=gamma)
    step._begin(made)
    trying(x, norm)
    x.mu.copy_(torch.logspace(1.7, -0.7, 16) * tau if mu is None else mu)
    for seed, (name, size) in enumerate(zip(PARTS, sizes, strict=True)):
        part = getattr(x, name)
        part.copy_(normal(*part.shape, seed=seed) * torch.logspace(0, -2, len(part), dtype=torch.float64)[:, None])
        part.mul_(size / part.norm())
    for j in POWERS.tolist():
        power = subspace_iteration._power(j, x)
        power.copy_(normal(*power.shape, seed=9 + j))
        power.mul_(rest**j * (0.2 + 1 / j) / power.norm())
    if spoil:
        spoil(x)
    launch(made, "judge", tol)
    return made, x


BAD = (math.nan, math.inf)
SIZES = [(0, 0, 0, 0), (3e-4, 0, 0, 0), (0, 3e-4, 0, 0), (0, 0, 3e-4, 0), (0, 0, 0, 3e-4), (1e-3, 4e-4, 3e-5, 2e-4),
         (3e-2, 1e-3, 0, 0), (0, 0, 1e-9, 1)]  # fmt: skip


@HALVES
def test_judge(dtype):
    for sizes, rest in itertools.product(SIZES, (0, 1e-4, 0.3, 0.9, 0.97, 3)):
        check_judged(*judge(sizes, rest, tau=0.7, dtype=dtype), TOL, 0.7)


@pytest.mark.parametrize("gamma", [1.01, 2.0, 1e3])
def test_judge_of_firm_thresholds(gamma):
    for sizes, rest in itertools.product(SIZES, (0, 0.3, 0.9, 3)):
        check_judged(*judge(sizes, rest, tau=0.7, gamma=gamma), TOL, 0.7)
    slope = gamma / (gamma - 1)
    for factor in (1 + 1e-7, 1 - 1e-7):
        _, x = judge(SIZES[5], 0.3, gamma=gamma)
        tol = slope * step_case.judged(x, 100)[1] * factor
        made, x = judge(SIZES[5], 0.3, tol=tol, gamma=gamma)
        check_judged(made, x, tol, 1.0)
        assert report(x)["method"] == (SUBSPACE if factor > 1 else FULL)


def check_judged(made, x, tol, tau, norm=100.0):
    error, estimate, rho = step_case.judged(x, norm)
    slope = x.slope.item()
    told, met = report(x), estimate <= tol / slope * tau
    assert told["rho"] == pytest.approx(rho, rel=1e-8) and told["error"] == pytest.approx(error, rel=1e-8)
    assert (told["method"], told["rank"]) == (SUBSPACE if met else FULL, int((x.mu > tau).sum()))
    assert gates(x) == NO | {"try": 1, "apply": int(met), "dense": int(not met)}
    assert made.awake == (not met) and (told["norm"], told["known"]) == (norm, 1)
    s = torch.zeros(x.n, dtype=torch.float64)
    s[: x.k] = torch.minimum(slope * (x.mu - tau), x.mu).clamp_min(0) * met
    torch.testing.assert_close(x.s, s, rtol=1e-14, atol=0)
    taken = x.gates[device_structs.SIGN_PAIR :]
    if met:
        assert not taken.any()
    else:
        taus, wanted = [tau, tau * slope / (slope - 1)] if made.firm else [tau], []
        for tau in taus:
            beta, lows = (norm / tau) ** 2 + 1, torch.tensor([low for low, *_ in schedule()][::2])
            sign, root = (lows <= tol / slope / (2 * beta)).sum() - 1, (lows[6:] <= 0.9 / math.sqrt(beta + 1)).sum() - 1
            wanted += [*(torch.arange(14) >= sign).int(), *(torch.arange(8) >= root).int()]
        assert taken.tolist() == wanted


def test_judge_at_the_boundary():
    sizes = SIZES[5]
    _, x = judge(sizes, 0.3)
    estimate = step_case.judged(x, 100)[1]
    for factor in (1 + 1e-7, 1 - 1e-7):
        check_judged(*judge(sizes, 0.3, tol=estimate * factor), estimate * factor, 1.0)


def test_judge_of_the_part_outside_the_basis():
    """Its norm slightly above or below tau; likewise for values inside the basis."""
    for rho in (1 - 1e-4, 1 + 1e-4):
        made, x = judge(SIZES[0], 0.3, mu=torch.cat([torch.logspace(1.7, 0.3, 15), torch.tensor([0.1])]),
                        spoil=lambda x, rho=rho: put_rest(x, rho))  # fmt: skip
        check_judged(made, x, TOL, 1.0)
        assert math.isinf(report(x)["error"]) == (rho > 1)
    for last in (0.81, 0.79, 0.6, 0.3):
        check_judged(*judge(SIZES[0], 0.75, mu=torch.full((16,), last)), TOL, 1.0)


def put_rest(x, rho, least=4):
    """Set the probe powers so that one of them gives the smallest bound ``rho``."""
    for j in POWERS.tolist():
        power = subspace_iteration._power(j, x)
        power.zero_()
        power[-1, -1] = (rho * (1 + 1e-3 * (j != least))) ** j / step_case.FACTOR


def test_judge_takes_the_smallest_bound():
    """Also from tiny numbers: the ninth power is 1e-18 here."""
    for least in POWERS.tolist():
        made, x = judge(SIZES[0], 0.3, spoil=lambda x, least=least: put_rest(x, 0.01, least))
        check_judged(made, x, TOL, 1.0)
        assert report(x)["rho"] == pytest.approx(0.01, rel=5e-3)


def test_judge_ignores_powers_that_underflow():
    def spoil(x):
        for j in (5, 6, 7, 8, 9):
            subspace_iteration._power(j, x).mul_(1e-25)

    made, x = judge(SIZES[0], 0.3, spoil=spoil)
    check_judged(made, x, TOL, 1.0)
    assert report(x)["rho"] > 0.1


@pytest.mark.parametrize("tau", [1e-9, 1e-5])
def test_judge_where_rounding_exceeds_the_rest(tau):
    made, x = judge(SIZES[0], 0.3, tau=tau, mu=torch.logspace(2, -6, 16))
    check_judged(made, x, TOL, tau)


@pytest.mark.parametrize("name, value", [*((name, value) for name in PARTS for value in BAD), ("first", math.nan)])
def test_judge_rejects_nonfinite_values(name, value):
    for at in (0, -1):
        _, x = judge(SIZES[0], 0.3, spoil=lambda x, at=at: getattr(x, name).view(-1).__setitem__(at, value))
        assert report(x)["method"] == FULL and gates(x) == NO | {"try": 1, "dense": 1}
        assert not report(x)["error"] < math.inf and not x.s.any()


def test_judge_skips_nonfinite_powers():
    """Each power gives a bound of its own."""
    for value in BAD:
        made, x = judge(SIZES[0], 0.3, spoil=lambda x, value=value: x.powers[: x.n + 5].fill_(value))
        told = report(x)["rho"]
        x.powers[: x.n + x.m].fill_(1e9)
        assert report(x)["method"] == SUBSPACE and told == pytest.approx(step_case.judged(x, 100.0)[2])


# --- finish ----------------------------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize(
    "sign, root", [(0, 0), (3e-4, 0), (0, 3e-4), (0.02, 0), (0, 0.02), (math.nan, 0), (0, math.inf)]
)
def test_finish_after_products(sign, root, dtype):
    made, x = one(tau=0.7, dtype=dtype)
    trying(x)
    x.gates.copy_(torch.arange(len(x.gates)) == GATE["dense"])
    x.diagonal.copy_((torch.arange(64) < 23) * 2 - 1 + 1e-3)
    for seed, (part, size) in enumerate(((x.sign_check, sign), (x.root_check, root))):
        part.copy_(normal(32, 64, seed=seed))
        part.mul_(size / part.norm())
    before = state(made)
    launch(made, "finish")
    found = step_case.FACTOR * 0.7 * (sign + root) + (200 + 100) * 2.0**-53 * 100**2 / 0.7
    storage = error_bounds.storage(dtype, 100, 200 * 64) + 2 * 2.0**-24 * 0.7 * math.sqrt(64)
    told, method = report(x), FULL if found <= TOL * 0.7 * math.sqrt(64) else step_case.UNSURE
    assert told == pytest.approx({"norm": 100, "error": found + storage, "rank": 23, "method": method, "known": 1,
                                  "rho": 0}, rel=1e-8, nan_ok=True)  # fmt: skip
    assert x.s.isnan().all() and changed(before, state(made)) == {"0.report", "0.s", "inputs", "out"}


@pytest.mark.parametrize("gamma", [1.02, 3.0, 1e3])
def test_finish_after_two_passes(gamma):
    """The errors of both count as much: what the second is multiplied by, its threshold makes up for."""
    made, x = one(tau=0.7, gamma=gamma)
    trying(x)
    x.gates.zero_()
    x.gates[GATE["dense"]] = 1
    x.diagonal.copy_((torch.arange(64) < 23) * 2 - 1 + 1e-3)
    sizes = 3e-4, 2e-5, 1e-4, 7e-5
    for seed, (part, size) in enumerate(zip((*x.sign_check.split(32), *x.root_check.split(32)), sizes, strict=True)):
        part.copy_(normal(32, 64, seed=seed))
        part.mul_(size / part.norm())
    launch(made, "finish")
    slope, unit = gamma / (gamma - 1), 2.0**-53
    found = step_case.FACTOR * slope * 0.7 * sum(sizes)
    found += 300 * unit * 100**2 * (slope / 0.7 + (slope - 1) / (gamma * 0.7))
    error = found + 2.0**-24 * 100 + 2 * 2.0**-24 * 0.7 * 8
    method = FULL if found <= TOL * 0.7 * 8 else step_case.UNSURE
    assert report(x)["error"] == pytest.approx(error, rel=1e-8) and report(x)["rank"] == 23
    assert report(x)["method"] == method == (step_case.UNSURE if gamma == 1.02 else FULL)


def test_finish_at_the_boundary():
    made, x = one()
    for factor, method in ((1 + 1e-6, FULL), (1 - 1e-6, step_case.UNSURE)):
        trying(x, norm=1e-3)
        x.gates[GATE["try"]], x.gates[GATE["dense"]] = 0, 1
        x.diagonal.fill_(1)
        x.sign_check.fill_(1e-3 / step_case.FACTOR / math.sqrt(32 * 64))
        x.root_check.zero_()
        launch(made, "finish", 1e-3 / 8 * factor)
        assert report(x)["method"] == method and report(x)["rank"] == 64


def test_finish_refills_the_basis():
    made = step_case.make([low_rank(200, 64, 6) for _ in range(2)], [16, 16])
    lost = torch.tensor([2, 7, 15])
    for x in made.layers:
        trying(x)
        x.V.fill_(3)
        x.mu.fill_(5)
        x.mu[lost] = torch.tensor([0, 5e-7, math.nan], dtype=torch.float64)
        x.mu[3] = 5.1e-7
    before = state(made)
    launch(made, "finish")
    assert changed(before, state(made)) == {"0.V", "1.V", "inputs"}
    filled = torch.cat([x.V[:, lost] for x in made.layers], 1).double()
    step_case.is_normal(filled)
    assert (filled.mT @ filled / 64 - torch.eye(6)).abs().max() <= 0.7 and filled.unique().numel() == filled.numel()
    kept = torch.ones(16, dtype=torch.bool)
    kept[lost] = False
    assert all((x.V[:, kept] == 3).all() for x in made.layers)


def test_finish_refills_with_the_same_numbers_in_all_calls():
    made = step_case.make([low_rank(200, 64, 6) for _ in range(2)], [16, 16])
    found = []
    for _ in range(2):
        for x in made.layers:
            trying(x)
            x.mu.zero_()
            x.V.fill_(3)
        launch(made, "finish")
        found.append([x.V.clone() for x in made.layers])
    assert made.call[1] == step_case.CALL + 2 and all(map(torch.equal, *found))


def test_finish_refills_an_empty_basis():
    made, x = one()
    trying(x)
    x.mu.zero_()
    x.V.fill_(math.nan)
    launch(made, "finish")
    step_case.is_normal(x.V)


def test_finish_advances_the_call():
    made = step_case.make(step_case.network(), step_case.WIDTHS)
    made.refused.fill_(1)
    launch(made, "finish")
    assert not made.refused and made.call.tolist() == [step_case.SEED, step_case.CALL + 1]
