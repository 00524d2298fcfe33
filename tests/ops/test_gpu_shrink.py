"""CUDA kernels of the shrinkage ops, against the reference bodies and the fp64 truth. Needs a GPU and nvcc's
library."""

import pytest
import torch

import compaware_kernels as ck
from tests.helpers import shrink_checks as checks
from tests.helpers.shrink_checks import DTYPES, OPS, op, thresholds, weight

info = ck.info()
missing = (
    "torch.cuda.is_available() is False"
    if not torch.cuda.is_available()
    else f"no CUDA kernels: {info['library']} ({info['build']['reason']})"
)
built = all(info["ops"][name]["CUDA"] == "C++ kernel" for name in OPS)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not built, reason=missing),
    pytest.mark.parametrize("name", OPS),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(name, dtype):
    checks.check_values(name, dtype, "cuda")


def test_tau_dtypes(name):
    checks.check_tau_dtypes(name, "cuda")


def test_in_place(name):
    checks.check_in_place(name, "cuda")


def test_shared_memory(name):
    checks.check_shared_memory(name, "cuda")


def test_special_values(name):
    checks.check_special_values(name, "cuda")


def test_refusals(name):
    checks.check_refusals(name, "cuda")


def test_opcheck(name):
    W = weight((5, 8), torch.float32, "cuda").requires_grad_()
    taus = [tau.requires_grad_() for tau in thresholds(OPS[name], (), torch.float32, "cuda")]
    torch.library.opcheck(op(name).default, (W, *taus))


def test_current_stream(name):
    """The kernel is ordered after work queued on the current stream: it sees the weight that is still being
    computed."""
    W, taus = weight((512, 4096), torch.float32, "cuda"), thresholds(OPS[name], (), torch.float32, "cuda")
    wanted = op(name)(W * 2, *taus)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        got = op(name)(W * 2, *taus)
    torch.cuda.synchronize()
    assert torch.equal(got, wanted)


def test_long_list(name):
    checks.check_long_list(name, "cuda")


def test_graph(name):
    """A replayed graph reads the weights and thresholds of that time, and no memory that has been freed."""
    weights = [weight((7, 50 + i), torch.float32, "cuda", i) for i in range(20)]
    fresh, graph = [W.clone() for W in weights], torch.cuda.CUDAGraph()
    taus = [tau.cuda() for tau in thresholds(OPS[name], (len(weights),))]
    op(name + "_")(weights, *taus)  # loads the kernel, which a capture may not
    with torch.cuda.graph(graph):
        op(name + "_")(weights, *taus)
    for factor in (1, 3):
        for W, X in zip(weights, fresh, strict=True):
            W.copy_(X * factor)
        garbage = [torch.full((1000,), float("nan"), device="cuda") for _ in range(100)]
        graph.replay()
        wanted = [op(name)(X * factor, *(tau[i] for tau in taus)) for i, X in enumerate(fresh)]
        assert garbage and all(map(torch.equal, weights, wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(name):
    W = weight((64, 100), torch.float32, "cuda:0")
    taus = thresholds(OPS[name], (), torch.float32, "cuda:0")
    got = op(name)(W.to("cuda:1"), *(tau.to("cuda:1") for tau in taus))
    assert got.device == torch.device("cuda:1") and torch.equal(got.to("cuda:0"), op(name)(W, *taus))
    assert torch.cuda.current_device() == 0
