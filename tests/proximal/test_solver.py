"""The solver behind svt_: routes, error bounds, tolerance, warm states; truncate_, spectral_ball_, weighted_svt_."""

import copy
import math

import pytest
import torch

import compaware_kernels as ck
from compaware_kernels.ops import linalg
from compaware_kernels.proximal import gram, jacobi, solver
from tests.helpers.cases import low_rank, with_spectrum
from tests.helpers.marks import slow_but
from tests.proximal import adversaries, hunt

EPS = torch.finfo(torch.float32).eps


def apply(W, function):
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U * function(s)) @ Vh


def exact(W, tau=1.0):
    return apply(W, lambda s: (s - tau).clamp_min(0))


def check(P, truth, info, tau=1.0, tol=1e-3):
    """The error is within the bound and the tolerance: tol x tau, plus the rounding of the dtype."""
    error, rounding = P.double() - truth, torch.finfo(P.dtype).eps * float(truth.norm())
    assert float(error.norm()) <= float(info.error_bound)
    assert float(torch.linalg.matrix_norm(error, 2)) <= tol * tau + rounding
    assert int(info.rank) == int((info.s > 0).sum())


ROUTES = {
    "zero": (lambda: 1e-3 * torch.randn(300, 200).double(), "zero"),
    "one small": (lambda: torch.randn(12, 9).double(), "jacobi"),
    "Gram": (lambda: with_spectrum(300, 200, torch.linspace(0.1, 5, 200)), "gram, fp32"),
    "Gram, large ratio": (lambda: with_spectrum(300, 200, torch.logspace(-2, 3, 200)), "gram, fp64"),
    "larger ratio than a Gram matrix can take": (
        lambda: with_spectrum(120, 100, torch.cat([torch.tensor([3e7]), torch.linspace(0.1, 5, 99)])), "svd",
    ),
    "low rank": (lambda: low_rank(500, 300, 20), "subspace, fp32"),
    "wide": (lambda: low_rank(300, 700, 20), "subspace, fp32"),
    "low rank, large ratio": (lambda: low_rank(500, 300, 20, largest=1e5), "subspace, fp64"),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_route_bound_and_tolerance(route):
    make, method = ROUTES[route]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        W = make().to(dtype)
        if not W.isfinite().all():
            continue
        truth = exact(W)
        (info,) = ck.svt_([W], 1.0)
        check(W, truth, info)
        if dtype == torch.float32:
            assert info.method.startswith(method) and info.reason, info


@pytest.mark.parametrize("ratio", [1.0, 1.001, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(40, 30), (150, 100), (260, 500)])
def test_thresholds_over_the_useful_range(shape, ratio):
    k = min(shape)
    for s in (torch.logspace(0, -8, k), torch.linspace(1, 0, k), torch.cat([torch.ones(5), 1e-7 * torch.rand(k - 5)])):
        W, tau = with_spectrum(*shape, s).float(), 1 / ratio
        truth = exact(W, tau)
        (info,) = ck.svt_([W], tau)
        check(W, truth, info, tau)


def test_all_layers_in_one_call_equal_one_by_one():
    weights = [make().float() for make, _ in ROUTES.values()]
    taus = [0.5 + 0.1 * i for i in range(len(weights))]
    truths = [exact(W, tau) for W, tau in zip(weights, taus, strict=True)]
    for W, truth, info, tau in zip(weights, truths, ck.svt_(weights, taus), taus, strict=True):
        check(W, truth, info, tau)


def test_many_small_matrices_share_a_batch():
    W = torch.randn(40, 30, 20)
    truth = torch.stack([exact(M, 2.0) for M in W])
    listed = [M.clone() for M in W]
    (info,) = ck.svt_([W], 2.0, fold=None)
    infos = ck.svt_(listed, 2.0)
    assert info.method == "jacobi, fp32" and info.rank.shape == (40,) and info.s.shape == (40, 20)
    assert (torch.linalg.matrix_norm(W - truth) <= info.error_bound).all()
    torch.testing.assert_close(torch.stack(listed), W)
    assert [int(i.rank) for i in infos] == info.rank.tolist()


def test_small_shapes():
    assert jacobi.small_shapes([torch.empty(6, 25)]) == {(6, 25)}
    assert jacobi.small_shapes([torch.empty(60, 40)]) == set()
    assert jacobi.small_shapes([torch.empty(60, 40)] * 20) == {(60, 40)}
    assert solver.worth_it(1024, 256, 40) and not solver.worth_it(1024, 64, 16)


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_scales_at_the_ends_of_fp64(scale):
    W = scale * low_rank(500, 300, 20)
    truth = exact(W / scale)
    (info,) = ck.svt_([W], scale)
    error = float((W / scale - truth).norm())
    assert error <= float(info.error_bound) / scale and error < 1e-2 and info.method.startswith("subspace")


# --- a tolerance met, or the next route ------------------------------------------------------------------------------


def test_slow_decay_below_the_threshold_is_not_treated_as_low_rank():
    s = torch.cat([torch.logspace(2, 0.1, 20), torch.linspace(0.999, 0.9, 280)])
    W = with_spectrum(500, 300, s).float()
    truth = exact(W)
    (info,) = ck.svt_([W], 1.0)
    check(W, truth, info)


def test_coherent_rounding_of_constant_matrices_is_detected():
    """Products of constants round in one direction: in fp32, 1,600 times as far as random ones."""
    for shape in ((600, 400), (300, 2000)):
        W = torch.full(shape, 1 / 3)
        W += 1e-4 * torch.randn(shape)
        tau = 0.01
        truth = exact(W, tau)
        (info,) = ck.svt_([W], tau)
        check(W, truth, info, tau)


def test_a_smaller_tolerance_is_met():
    for tol in (1e-1, 1e-4, 1e-6):
        W = low_rank(500, 300, 20)
        truth = exact(W)
        (info,) = ck.svt_([W], 1.0, tol=tol)
        check(W, truth, info, tol=tol)


def test_unexpected_rounding_is_detected(monkeypatch):
    """With products a thousand times less accurate than expected, the probes notice and the route is rejected."""
    honest = linalg.product
    monkeypatch.setattr(
        "compaware_kernels.proximal.subspace_iteration.product",
        lambda A, B: honest(A, B) * (1 + 3e-5 * torch.randn(())),
    )
    W = low_rank(500, 300, 20)
    W = W.float()
    truth = exact(W)
    (info,) = ck.svt_([W], 1.0)
    check(W, truth, info)
    assert not info.method.startswith("subspace, fp32")


# --- warm states -----------------------------------------------------------------------------------------------------


def drifting(calls, state, dtype=torch.float32, seed=0):
    """Weights as training moves them: shrunk, regrown and perturbed between the calls."""
    generator = torch.Generator().manual_seed(seed)
    W = low_rank(500, 300, 20, seed=seed).to(dtype)
    for _ in range(calls):
        truth = exact(W)
        (info,) = ck.svt_([W], 1.0, state=state, names=["layer"])
        yield W, truth, info
        U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        noise = torch.randn(W.shape, generator=generator, dtype=torch.float64)
        W += (U[:, :20] @ Vh[:20] + 0.4 * noise / torch.linalg.matrix_norm(noise, 2)).to(dtype)


def test_warm_calls_are_accurate():
    for W, truth, info in drifting(5, ck.WarmState()):
        check(W, truth, info)


def test_a_warm_call_takes_fewer_products_than_a_cold_one():
    W, state = low_rank(900, 500, 60).float(), ck.WarmState()
    cold, warm = (ck.svt_([W.clone()], 1.0, state=state)[0] for _ in range(2))
    assert int(warm.reason.split()[2]) < int(cold.reason.split()[2]), (cold.reason, warm.reason)


def test_the_same_seed_gives_the_same_bits_also_after_a_checkpoint(tmp_path):
    states = [ck.WarmState(seed=3), ck.WarmState(seed=3)]
    runs = [[W.clone() for W, _, _ in drifting(3, state)] for state in states]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    torch.save(states[0].state_dict(), tmp_path / "state.pt")
    resumed = ck.WarmState()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    results = []
    for state in (states[0], resumed):
        W = low_rank(500, 300, 20, seed=7).float()
        ck.svt_([W], 1.0, state=state, names=["layer"])
        results.append(W)
    assert torch.equal(*results)


WRONG = {
    "random": lambda V: torch.randn_like(V),
    "zero": lambda V: torch.zeros_like(V),
    "huge": lambda V: 1e30 * V,
    "one column, repeated": lambda V: V[:, :1].expand_as(V).clone(),
    "one column": lambda V: V[:, :1],
    "another layer's": lambda V: torch.linalg.qr(torch.randn_like(V)).Q,
    "the weakest directions": lambda V: V.flip(1)[:, :8],
    "another dtype": lambda V: V.double(),
    "another shape": lambda V: V[:-1],
    "full rank, it says": lambda V: V[:, :0],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_costs_only_time(wrong):
    state = ck.WarmState()
    list(drifting(2, state))
    state.bases["layer.0"] = WRONG[wrong](state.bases["layer.0"])
    W = low_rank(500, 300, 20, seed=5).float()
    truth = exact(W)
    (info,) = ck.svt_([W], 1.0, state=state, names=["layer"])
    check(W, truth, info)
    assert int(info.rank) == 20


def test_a_direction_that_grows_between_calls_is_found():
    state = ck.WarmState()
    for W, _, _ in drifting(3, state):
        last = W.clone()
    new = with_spectrum(500, 300, [1.5, 1.2, 1.05], seed=11).float()
    W = last + new
    truth = exact(W, 0.5)
    (info,) = ck.svt_([W], 0.5, state=state, names=["layer"])
    check(W, truth, info, 0.5)
    assert int(info.rank) >= 23


def test_more_new_directions_than_fresh_columns_are_found():
    state = ck.WarmState()
    for W, _, _ in drifting(2, state):
        last = W.clone()
    columns = state.bases["layer.0"].shape[1]
    W = last + with_spectrum(500, 300, torch.full((columns + 30,), 1.5), seed=11).float()
    truth = exact(W)
    (info,) = ck.svt_([W], 1.0, state=state, names=["layer"])
    check(W, truth, info)
    assert int(info.rank) > columns


def test_state_moves_between_devices_and_refuses_other_states():
    state = ck.WarmState()
    list(drifting(1, state))
    assert state.to(torch.float64).bases["layer.0"].dtype == torch.float64
    good = state.state_dict()
    for bad in (
        None,
        {},
        good | {"calls": 1.5},
        good | {"bases": {"a": torch.full((3, 2), math.nan)}},
        good | {"x": 1},
    ):
        with pytest.raises(ValueError, match="wanted a"):
            state.load_state_dict(bad)
    assert state.calls == 1 and "layer.0" in repr(state.bases)
    with pytest.raises(TypeError, match="wanted a WarmState"):
        ck.svt_([torch.randn(3, 3)], 1.0, state={})


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_a_failure_in_the_last_layer_changes_no_weight_and_no_state(monkeypatch):
    state = ck.WarmState()
    weights = [low_rank(500, 300, 20).float(), torch.randn(20, 12), with_spectrum(300, 200, torch.ones(200)).float()]
    before, kept = [W.clone() for W in weights], copy.deepcopy(state.state_dict())

    def fail(*args):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(gram, "by_gram", fail)
    with pytest.raises(torch.linalg.LinAlgError):
        ck.svt_(weights, 0.5, state=state)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True)) and state.state_dict() == kept


@pytest.mark.parametrize(("failing", "method"), [({torch.float32}, "gram, fp64"), (None, "svd, fp64")])
def test_where_eigh_does_not_converge_the_next_route_serves(monkeypatch, failing, method):
    W, eigh = torch.randn(120, 90, generator=torch.Generator().manual_seed(0)), torch.linalg.eigh

    def fail(G):
        if failing is None or G.dtype in failing:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(G)

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    X = W.clone()
    (info,) = ck.svt_([X], 3.0)
    error = X - ck.svt(W.double(), 3.0)
    assert info.method == method and error.norm() <= info.error_bound


@pytest.mark.parametrize("tol", [0.0, -1.0, math.nan, math.inf, "small"])
def test_bad_tolerance(tol):
    with pytest.raises(ValueError, match="tol: wanted"):
        ck.svt_([torch.randn(3, 3)], 0.1, tol=tol)


def test_number_of_threads_is_restored():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    ck.svt_([low_rank(300, 200, 5, seed=i).float() for i in range(3)], 1.0)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(60, 40), (300, 500)])
def test_strided_and_tied_weights(shape):
    W = low_rank(*shape, 6).float()
    truth = exact(W)
    transposed, tied = W.mT.contiguous().mT, W.clone()
    for weights in ([transposed], [tied, tied]):
        infos = ck.svt_(weights, 1.0)
        for P, info in zip(weights, infos, strict=True):
            check(P, truth, info)


# --- relatives --------------------------------------------------------------------------------------------------------

SHAPES = [(9, 7), (120, 90), (300, 500)]


@pytest.mark.parametrize("shape", SHAPES)
def test_prox_around_a_center(shape):
    C = torch.randn(shape)
    W = (C + low_rank(*shape, 5)).float()
    truth = C.double() + exact(W - C)
    (info,) = ck.svt_([W], 1.0, center=[C])
    assert float((W - truth).norm()) <= float(info.error_bound) + EPS * float(truth.norm())
    assert int(info.rank) == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_spectral_ball(shape):
    for make in (lambda: low_rank(*shape, 5), lambda: torch.randn(shape).double()):
        W = make().float()
        truth = apply(W, lambda s: s.clamp_max(1.0))
        (info,) = ck.spectral_ball_([W], 1.0)
        assert float((W - truth).norm()) <= float(info.error_bound) + EPS * float(truth.norm())
        assert float(torch.linalg.matrix_norm(W, 2)) <= 1 + 2e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_truncate(shape):
    for rank in (0, 3, 5):
        W = low_rank(*shape, 5).float()
        truth = apply(W, lambda s, rank=rank: torch.where(torch.arange(len(s)) < rank, s, 0))
        (info,) = ck.truncate_([W], rank, state=ck.WarmState())
        assert float((W - truth).norm()) <= float(info.error_bound) < math.inf and int(info.rank) == rank


def test_truncate_reports_a_projection_that_is_not_unique():
    W = with_spectrum(60, 40, [3.0, 2.0, 2.0, 1.0])
    (info,) = ck.truncate_([W], 2)
    assert info.error_bound == math.inf


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_svt(shape):
    k = min(shape)
    for w in (torch.linspace(1.0, 3.0, k), torch.cat([torch.zeros(2), torch.full((k - 2,), 2.0)])):
        W = low_rank(*shape, 5).float()
        truth = apply(W, lambda s, w=w: (s - w.double()).clamp_min(0))
        (info,) = ck.weighted_svt_([W], [w])
        assert float((W - truth).norm()) <= float(info.error_bound) < math.inf
    for bad in (torch.linspace(3.0, 1.0, k), torch.ones(k + 1), -torch.ones(k)):
        with pytest.raises(ValueError, match="wanted"):
            ck.weighted_svt_([W], [bad])


# --- cases that try to break it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", slow_but([0], range(4)))
def test_hunt(part):
    """The first few hundred cases of hunt.py."""
    for seed in range(100 * part, 100 * part + 100):
        holds, _, message = hunt.check(hunt.case(seed))
        assert holds, (seed, message)


@pytest.mark.parametrize("part", slow_but([0], range(10)))
def test_adversaries(part):
    """The first few hundred cases of adversaries.py."""
    for seed in range(20 * part, 20 * part + 20):
        holds, _, message = adversaries.check(adversaries.case(seed))
        assert holds, (seed, message)
