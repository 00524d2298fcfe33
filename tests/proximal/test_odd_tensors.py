"""Tensors that cannot be matrices, cannot be written, or share memory: refused before anything changes, or right."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import compaware_kernels as ck
from compaware_kernels._utils import memory

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantized|CSR|nested)")

SHAPE = (20, 30)
FUNCTIONAL = {
    "svt": lambda W, tau=0.5: ck.svt(W, tau),
    "firm_svt": lambda W, tau=0.5: ck.firm_svt(W, tau, 3.0),
    "group_shrink": lambda W, tau=0.5: ck.group_shrink(W, tau),
    "soft_threshold": lambda W, tau=0.5: ck.soft_threshold(W, tau),
    "sparse_group_shrink": lambda W, tau=0.5: ck.sparse_group_shrink(W, 0.1, tau),
}
SPECTRAL = {  # those with a warm state, and one number per weight
    "svt_": lambda weights, tau=0.5, **kwargs: ck.svt_(weights, tau, **kwargs),
    "firm_svt_": lambda weights, tau=0.5, **kwargs: ck.firm_svt_(weights, tau, 3.0, **kwargs),
    "spectral_ball_": lambda weights, tau=0.5, **kwargs: ck.spectral_ball_(weights, tau, **kwargs),
}
IN_PLACE = SPECTRAL | {
    "truncate_": lambda weights, rank=2, **kwargs: ck.truncate_(weights, rank, **kwargs),
    "weighted_svt_": lambda weights, **kwargs: ck.weighted_svt_(weights, [[0.1] * 20] * len(weights), **kwargs),
    "group_shrink_": lambda weights, tau=0.5, state=None: ck.group_shrink_(weights, tau),
    "soft_threshold_": lambda weights, tau=0.5, state=None: ck.soft_threshold_(weights, tau),
    "sparse_group_shrink_": lambda weights, tau=0.5, state=None: ck.sparse_group_shrink_(weights, 0.1, tau),
}


def inference():
    with torch.inference_mode():
        return torch.randn(SHAPE)


def short(size):
    W = torch.randn(SHAPE)
    W.untyped_storage().resize_(size)
    return W


def masked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(torch.randn(SHAPE), torch.rand(SHAPE) > 0.5)


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=layout)


NO_MATRIX = {  # (how to make it, error, its words)
    "complex": (lambda: torch.randn(SHAPE, dtype=torch.complex64), TypeError, "wanted dtype.*got complex64"),
    "conjugate": (lambda: torch.randn(SHAPE, dtype=torch.complex128).conj(), TypeError, "wanted dtype.*got complex128"),
    "fp8": (lambda: torch.randn(SHAPE).to(torch.float8_e4m3fn), TypeError, "wanted dtype.*got float8_e4m3fn"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.randn(SHAPE), 0.1, 0, torch.qint8), TypeError, "wanted dtype.*got qint8"
    ),
    "sparse": (lambda: torch.randn(SHAPE).to_sparse(), TypeError, "wanted a dense tensor; got a sparse_coo one"),
    "compressed": (lambda: torch.randn(SHAPE).to_sparse_csr(), TypeError, "wanted a dense tensor; got a sparse_csr"),
    "mkldnn": (lambda: torch.randn(SHAPE).to_mkldnn(), TypeError, "wanted a dense tensor; got a mkldnn one"),
    "nested": (lambda: nested(torch.strided), TypeError, "wanted a dense tensor; got a nested one"),
    "jagged": (lambda: nested(torch.jagged), TypeError, "wanted a dense tensor; got a nested one"),
    "meta": (lambda: torch.empty(SHAPE, device="meta"), ValueError, "with values; got one on the meta device"),
    "lazy": (nn.parameter.UninitializedParameter, ValueError, "initialized"),
    "freed": (lambda: short(0), ValueError, "with values; got one whose memory was freed"),
    "shortened": (lambda: short(40), ValueError, "with values; got one whose memory was freed"),
}  # fmt: skip
NOT_WRITABLE = {
    "expanded": (lambda: torch.randn(20, 1).expand(SHAPE), ValueError, "elements that share memory"),
    "overlapping rows": (lambda: torch.randn(100).as_strided(SHAPE, (2, 1)), ValueError, "elements that share memory"),
    "inference": (inference, ValueError, "inference tensor outside of inference mode"),
    "masked": (masked, TypeError, "got a MaskedTensor"),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.randn(SHAPE)), TypeError, "got a FakeTensor"),
}


@pytest.mark.parametrize("kind", NO_MATRIX)
@pytest.mark.parametrize("name", FUNCTIONAL)
def test_no_matrix(name, kind):
    make, error, words = NO_MATRIX[kind]
    with pytest.raises(error, match=words):
        FUNCTIONAL[name](make())


@pytest.mark.parametrize("kind", [*NO_MATRIX, *NOT_WRITABLE])
@pytest.mark.parametrize("name", IN_PLACE)
def test_all_or_nothing(name, kind):
    """Neither the weight before the refused one nor the warm state changes a bit."""
    make, error, words = (NO_MATRIX | NOT_WRITABLE)[kind]
    state, A = ck.WarmState(seed=3), torch.randn(SHAPE)
    ck.svt_([torch.randn(300, 200) @ torch.diag(0.9 ** torch.arange(200.0))], 20.0, state=state, names=["other"])
    before, was = A.clone(), copy.deepcopy(state.state_dict())
    assert any(V.numel() for V in was["bases"].values())
    with pytest.raises(error, match=rf"^weights\[1\]: .*{words}"):
        IN_PLACE[name]([A, make()], state=state)
    now = state.state_dict()
    assert torch.equal(A, before) and now.keys() == was.keys() and now["calls"] == was["calls"]
    assert now["bases"].keys() == was["bases"].keys()
    assert all(torch.equal(now["bases"][key], V) for key, V in was["bases"].items())


@pytest.mark.parametrize("tau", [1j, torch.tensor(1j), torch.tensor(1 + 0j), np.complex64(1), [1j], None, "1", 10**400],
                         ids=repr)  # fmt: skip
@pytest.mark.parametrize("name", [*FUNCTIONAL, *IN_PLACE])
def test_thresholds_are_real_numbers(name, tau):
    if name in ("truncate_", "weighted_svt_"):
        return
    W = torch.randn(SHAPE)
    before = W.clone()
    with pytest.raises(TypeError, match=r"(tau|radius): wanted a real number, or a list or tensor of them; got"):
        FUNCTIONAL[name](W, tau) if name in FUNCTIONAL else IN_PLACE[name]([W], tau)
    assert torch.equal(W, before)


@pytest.mark.parametrize("tau", [torch.tensor([0.5]).to_sparse(), torch.tensor(0.5, device="meta")], ids=str)
def test_thresholds_are_in_memory(tau):
    for call in (ck.svt, lambda W, tau: ck.svt_([W], tau)):
        with pytest.raises((TypeError, ValueError), match=r"tau: wanted a (dense tensor|tensor with values)"):
            call(torch.randn(SHAPE), tau)


@pytest.mark.parametrize("name", ["x", "V", "U", "bias", "residual"])
def test_low_rank_ops_refuse_freed_memory(name):
    """It was read: a crash."""
    linear = {"x": (5, 16), "V": (4, 16), "U": (8, 4), "bias": (8,), "residual": (5, 8)}
    conv = {"x": (2, 6, 9, 9), "V": (4, 6, 3, 3), "U": (8, 4, 1, 1), "bias": (8,), "residual": (2, 8, 7, 7)}
    for op, shapes in ((ck.lowrank_linear, linear), (ck.lowrank_conv2d, conv)):
        args = {key: torch.randn(shape) for key, shape in shapes.items()}
        op(**args)
        args[name].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            op(**args)


def test_a_fake_tensor_gives_a_fake_result():
    with FakeTensorMode():
        assert all(f(torch.randn(SHAPE)).shape == SHAPE for f in FUNCTIONAL.values())


# --- memory -----------------------------------------------------------------------------------------------------------


def views():
    A = torch.randn(20, 20)
    return {
        "rows": ([A, A[:10]], True), "transpose": ([A, A.T], True), "reshaped": ([A, A.view(10, 40)], True),
        "shifted": ([A[:, :19], A[:, 1:]], True), "other dtype": ([A, A.view(torch.bfloat16)], True),
        "first and last": ([A, torch.randn(20, 20), A[19:]], True),
        "row blocks": ([A[:10], A[10:]], False), "column blocks": ([A[:, :10], A[:, 10:]], False),
        "alternating columns": ([A[:, ::2], A[:, 1::2]], False),
        "real and imaginary": ([*torch.view_as_real(torch.randn(20, 20, dtype=torch.complex64)).unbind(-1)], False),
    }  # fmt: skip


@pytest.mark.parametrize("kind", views())
def test_overlap_is_found_element_by_element(kind):
    tensors, shared = views()[kind]
    assert bool(list(memory.overlapping_pairs(tensors))) is shared
    addresses = [{place for place in (W.data_ptr() + W.element_size() * offsets(W)).tolist()} for W in tensors]
    if "dtype" not in kind:
        assert shared is bool(set.intersection(addresses[0], addresses[-1]))


def offsets(W):
    """Offset of every element of W, in elements."""
    places = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(W.shape, W.stride(), strict=True):
        places = (places[:, None] + stride * torch.arange(size)).flatten()
    return places


def test_overlap_within_a_tensor_is_found_element_by_element():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        size, stride = rng.integers(1, 5, 3).tolist(), rng.integers(0, 9, 3).tolist()
        W = torch.zeros(200).as_strided(size, stride)
        shared = len(offsets(W).unique()) < W.numel()
        assert memory.overlaps_itself(W) is shared, (size, stride)
        found += shared
    assert 50 < found < 250


@pytest.mark.parametrize("kind", [kind for kind, (_, shared) in views().items() if shared and "dtype" not in kind])
@pytest.mark.parametrize("name", [name for name in IN_PLACE if name != "weighted_svt_"])
def test_views_of_one_storage_are_refused(name, kind):
    tensors, _ = views()[kind]
    before, state = [W.clone() for W in tensors], ck.WarmState()
    with pytest.raises(ValueError, match=rf"^weights\[{len(tensors) - 1}\]: .* overlaps weights\[0\]"):
        IN_PLACE[name](tensors, 1 if name == "truncate_" else 0.5, state=state)
    assert all(map(torch.equal, tensors, before)) and state.calls == 0 and not state.bases


@pytest.mark.parametrize("name", ["svt_", "soft_threshold_", "group_shrink_"])
def test_blocks_of_one_matrix_are_separate_weights(name):
    A, call = torch.randn(40, 300), IN_PLACE[name]
    apart = [A[:, :200].clone(), A[:, 200:].clone()]
    call(apart, 5.0 if name == "svt_" else 0.5)
    call([A[:, :200], A[:, 200:]], 5.0 if name == "svt_" else 0.5)
    torch.testing.assert_close(A, torch.cat(apart, 1))


@pytest.mark.parametrize("shape", [(12, 9), (300, 200)], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_tied_weights_have_one_result_and_one_report(name, shape):
    W, state = torch.randn(shape), ck.WarmState()
    alone = W.clone()
    first, second = SPECTRAL[name]([W, W], 4.0, state=state)
    SPECTRAL[name]([alone], 4.0, state=ck.WarmState())
    assert torch.equal(W, alone) and torch.equal(first.s, second.s)
    assert torch.equal(first.error_bound, second.error_bound)


def test_tied_weights_want_the_same_arguments():
    W, rows, b = torch.randn(12, 9), torch.arange(9.0), torch.randn(2, 12)
    before = W.clone()
    calls = [
        lambda: ck.svt_([W, W], [1.0, 2.0]), lambda: ck.firm_svt_([W, W], 1.0, [2.0, 3.0]),
        lambda: ck.truncate_([W, W], [1, 2]), lambda: ck.weighted_svt_([W, W], [rows, rows + 1]),
        lambda: ck.svt_([W, W], 1.0, groups=[1, 3]), lambda: ck.svt_([W, W], 1.0, center=[W + 1, W + 2]),
        lambda: ck.soft_threshold_([W, W], [1.0, 2.0]), lambda: ck.sparse_group_shrink_([W, W], 1.0, [1.0, 2.0]),
        lambda: ck.group_shrink_([W, W], 1.0, biases=[b[0], b[1]]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"^weights\[1\]: wanted the same arguments as weights\[0\]"):
            call()
        assert torch.equal(W, before)
    ck.weighted_svt_([W, W], [rows, rows.clone()])


def test_a_bias_in_its_weight_is_refused():
    W = torch.randn(6, 5)
    with pytest.raises(ValueError, match=r"^bias of weights\[0\]: .* overlaps weights\[0\]"):
        ck.group_shrink_([W], 0.5, biases=[W[:, 0]])


@pytest.mark.parametrize("shape", [(12, 9), (200, 100)], ids=str)
def test_centers_and_thresholds_are_read_before_weights_are_written(shape):
    A, B, C = torch.randn(3, *shape)
    wanted = [A.clone(), B.clone()]
    ck.svt_(wanted, 3.0, center=[C, A.clone()])
    weights = [A, B]
    ck.svt_(weights, 3.0, center=[C, A])
    assert all(map(torch.equal, weights, wanted))
    W = torch.full(shape, 0.25, dtype=torch.float64)
    ck.soft_threshold_([W], W[0, 0])
    assert not W.any()
    W = torch.rand(shape).double().sort().values
    wanted = W.clone()
    ck.weighted_svt_([wanted], [W[0].clone()])
    ck.weighted_svt_([W], [W[0]])
    assert torch.equal(W, wanted)


@pytest.mark.parametrize("shape", [(20, 30), (300, 200), (8, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("name", [name for name in IN_PLACE if name != "weighted_svt_"])
def test_negated_views(name, shape):
    """A tensor with the negative bit, as the imaginary part of a conjugate has: the same values as a copy of it."""
    W = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert W.is_neg()
    wanted = W.clone()
    IN_PLACE[name]([W])
    IN_PLACE[name]([wanted])
    torch.testing.assert_close(W.resolve_neg(), wanted, rtol=0, atol=1e-6)
    if name == "group_shrink_":
        W, b = torch.randn(shape), torch._neg_view(torch.ones(shape[0]))
        ck.group_shrink_([W], 0.5, biases=[b])
        assert (b > -1).all()


def test_views_that_autograd_protects():
    """Writing to one of several views of a parameter is forbidden by autograd, but not to its values."""
    W = nn.Parameter(torch.randn(2, 8, 4, 3, 3))
    wanted = [w.detach().clone() for w in W]
    for fold in ("paper", "spatial"):
        ck.svt_(list(W.unbind()), 0.5, fold=fold)
        ck.svt_(wanted, 0.5, fold=fold)
    ck.soft_threshold_(list(W.unbind()), 0.1)
    ck.soft_threshold_(wanted, 0.1)
    assert torch.equal(W.detach(), torch.stack(wanted))


def test_inference_tensors_within_inference_mode():
    W = torch.randn(SHAPE)
    wanted = W.clone()
    ck.svt_([wanted], 0.5)
    with torch.inference_mode():
        W = W.clone()
        ck.svt_([W], 0.5)
        assert torch.equal(W, wanted)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "same"])
def test_proximal_step_checks_what_it_writes(kind):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    W = model[0].weight.data
    replaced = {"expanded": torch.randn(20, 1).expand(20, 20), "transposed": W.T, "same": W}[kind]
    model[1].weight = nn.Parameter(replaced)
    before, wanted = W.clone(), ck.svt(W, 0.5)
    prox = ck.ProximalStep(model, torch.optim.SGD(model.parameters(), lr=1.0), nuclear=0.5)
    state = prox.state_dict()
    if kind == "same":
        prox.step()
        torch.testing.assert_close(W, wanted)
    else:
        with pytest.raises(ValueError, match=r"^1: wanted"):
            prox.step()
        assert torch.equal(W, before) and prox.state_dict() == state
