"""C++ kernels of the shrinkage ops on the CPU, against the reference bodies and the fp64 truth."""

import pytest
import torch

import compaware_kernels as ck
from tests.helpers import shrink_checks as checks
from tests.helpers.shrink_checks import DTYPES, OPS, op, thresholds, weight

info = ck.info()
pytestmark = [
    pytest.mark.skipif(
        any(info["ops"][name]["CPU"] != "C++ kernel" for name in OPS),
        reason=f"no C++ kernels: {info['library']} ({info['build']['reason']})",
    ),
    pytest.mark.parametrize("name", OPS),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)  # and torch.utils.deterministic.fill_uninitialized_memory is on by default
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(name, dtype):
    checks.check_values(name, dtype, "cpu")


def test_tau_dtypes(name):
    checks.check_tau_dtypes(name, "cpu")


def test_in_place(name):
    checks.check_in_place(name, "cpu")


def test_shared_memory(name):
    checks.check_shared_memory(name, "cpu")


def test_special_values(name):
    checks.check_special_values(name, "cpu")


def test_nothing(name):
    checks.check_nothing(name, "cpu")


def test_refusals(name):
    checks.check_refusals(name, "cpu")


def test_empty_list(name):
    op(name + "_")([], *[torch.ones(0)] * OPS[name])


def test_one_threshold_per_matrix_in_a_list(name):
    weights = [weight((3, 5, 8), torch.float32, "cpu", seed) for seed in (0, 1)]
    taus = thresholds(OPS[name], (2, 3))
    wanted = [op(name)(W, *(tau[i] for tau in taus)) for i, W in enumerate(weights)]
    op(name + "_")(weights, *taus)
    assert all(map(torch.equal, weights, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_does_not_change_a_bit(name, dtype):
    shapes = [(64, 147), (1, 100_000), (1000, 513), (5, 3), (2, 300, 200)]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weights = [weight(shape, dtype, "cpu") for shape in shapes]
            op(name + "_")(weights, *thresholds(OPS[name], (len(shapes),)))
            results.append(weights)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(W, first) for other in results[1:] for W, first in zip(other, results[0], strict=True))


def test_norms_are_accumulated_in_fp64(name):
    """A long fp32 row: the error is that of rounding the result, not of a naive sum."""
    W = weight((2, 1_000_000), torch.float32, "cpu")
    taus = [torch.tensor(0.25), torch.tensor(900.0)][-OPS[name] :]
    truth = checks.reference(name)(W.double(), *(tau.double() for tau in taus))
    error = (op(name)(W, *taus).double() - truth).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * W.double().abs()).all()


def test_opcheck(name):
    for dtype in (torch.float64, torch.float32):
        W, batch = weight((5, 8), dtype, "cpu"), weight((3, 4, 6), dtype, "cpu")
        for arg, shape in ((W, ()), (W.mT, ()), (batch, (3,))):
            taus = [tau.requires_grad_() for tau in thresholds(OPS[name], shape, dtype)]
            torch.library.opcheck(op(name).default, (arg.detach().requires_grad_(), *taus))
        torch.library.opcheck(op(name + "_").default, ([W, batch], *thresholds(OPS[name], (2,))))
