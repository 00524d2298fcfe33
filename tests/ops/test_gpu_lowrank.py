"""Fused low-rank kernel on a GPU, against fp64 and two convolutions of torch. Needs a GPU and Triton."""

import pytest
import torch

import compaware_kernels as ck
from compaware_kernels._utils.dtypes import nearest_tf32
from compaware_kernels.ops import backends
from tests.helpers import lowrank_checks as checks
from tests.helpers.lowrank_checks import ACTIVATIONS

missing = backends.triton_missing() if torch.cuda.is_available() else "torch.cuda.is_available() is False"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing), reason=missing)]
DEVICE = "cuda"
ARITHMETIC = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# x [N, C, H, W], rank, outputs, V's kernel, geometry
CASES = {
    "1 x 1": ((2, 64, 28, 28), 16, 256, (1, 1), {}),
    "1 x 1, strided": ((3, 72, 15, 13), 37, 136, (1, 1), {"stride": (2, 3)}),
    "3 x 3": ((4, 128, 28, 28), 32, 128, (3, 3), {"padding": (1, 1)}),
    "3 x 3, strided": ((2, 40, 17, 15), 128, 520, (3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    "3 x 3, dilated": ((1, 256, 14, 14), 100, 64, (3, 3), {"dilation": (2, 2), "padding": (2, 2)}),
    "1 x 7": ((2, 24, 9, 33), 3, 8, (1, 7), {"padding": (0, 3)}),
    "one image, many channels": ((1, 512, 7, 7), 64, 2048, (3, 3), {"padding": (1, 1)}),
}


@pytest.fixture(autouse=True)
def precision():
    """precision("tf32"): arithmetic of torch's fp32 convolutions and products; the default is ieee."""
    places = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]

    def set_all(wanted):
        for place in places:
            place.fp32_precision = wanted

    set_all("ieee")
    yield set_all
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def arguments(name, dtype=torch.bfloat16, activation="none"):
    """Keyword arguments of ``ck.lowrank_conv2d``; x in channels_last."""
    (N, C, H, W), r, O, (kh, kw), geometry = CASES[name]
    generator = torch.Generator().manual_seed(0)
    args = {
        "x": checks.values((N, C, H, W), generator).to(memory_format=torch.channels_last),
        "V": checks.values((r, C, kh, kw), generator, (C * kh * kw) ** -0.5),
        "U": checks.values((O, r, 1, 1), generator, r**-0.5),
        "bias": checks.values(O, generator),
    }
    shape = checks.truth_conv2d(**args, **geometry).shape
    args["residual"] = checks.values(shape, generator)
    return {key: A.to(DEVICE, dtype) for key, A in args.items()} | geometry | {"activation": activation}


def assert_fused(args):
    op = "lowrank_conv2d" if args["V"].ndim == 4 else "lowrank_linear"
    backend, reason = backends.choose(op, args["x"].device, args["x"], args["V"], args["U"])
    assert backend.name == "Triton kernel", reason


def check(args, label="", tf32=False):
    got, truth = ck.lowrank_conv2d(**args), checks.truth_conv2d(**args)
    if not tf32:
        return checks.assert_as_good(got, truth, checks.reference_conv2d(**args), label)
    rounded = args | {name: nearest_tf32(args[name]) for name in "xVU"}
    assert_close(got, truth, checks.truth_conv2d(**rounded), label)


def assert_close(got, truth, rounded, label):
    """At most twice the error of rounding x, V and U to tf32; the factor 2 also covers the rounding of T = V x."""
    assert (got - truth).norm() <= 2 * (rounded - truth).norm(), label


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", CASES)
def test_values(name, arithmetic, precision):
    precision("tf32" if arithmetic == "tf32" else "ieee")
    for activation in ACTIVATIONS:
        args = arguments(name, ARITHMETIC[arithmetic], activation)
        assert_fused(args)
        check(args, activation, arithmetic == "tf32")


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("multiprocessors", [1, 10, 10_000])
def test_every_tile(multiprocessors, arithmetic, precision, monkeypatch):
    """Told of other numbers of multiprocessors, the launcher chooses other tiles."""
    from compaware_kernels.ops import triton_lowrank

    monkeypatch.setattr(triton_lowrank, "_multiprocessors", lambda device: multiprocessors)
    precision("tf32" if arithmetic == "tf32" else "ieee")
    for name in CASES:
        check(arguments(name, ARITHMETIC[arithmetic]), name, arithmetic == "tf32")


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_linear(arithmetic, precision):
    precision("tf32" if arithmetic == "tf32" else "ieee")
    generator = torch.Generator().manual_seed(0)
    for shape, r, O in (((8, 197, 768), 96, 3072), ((5, 64), 7, 40), ((64,), 16, 64)):
        args = {
            "x": checks.values(shape, generator),
            "V": checks.values((r, shape[-1]), generator, shape[-1] ** -0.5),
            "U": checks.values((O, r), generator, r**-0.5),
            "bias": checks.values(O, generator),
            "residual": checks.values((*shape[:-1], O), generator),
        }
        args = {key: A.to(DEVICE, ARITHMETIC[arithmetic]) for key, A in args.items()} | {"activation": "gelu"}
        assert_fused(args)
        got, truth = ck.lowrank_linear(**args), checks.truth_linear(**args)
        if arithmetic == "tf32":
            rounded = args | {name: nearest_tf32(args[name]) for name in "xVU"}
            assert_close(got, truth, checks.truth_linear(**rounded), f"{shape}")
        else:
            checks.assert_as_good(got, truth, checks.reference_linear(**args), f"{shape}")


def test_not_contiguous():
    """NCHW, crops of larger images with and without 16-byte alignment, an expanded batch, a slice of U."""
    args = arguments("3 x 3, strided")
    N, C, H, W = args["x"].shape
    larger = torch.randn(N, C + 8, H + 2, W + 2).to(DEVICE, torch.bfloat16).to(memory_format=torch.channels_last)
    crops = larger[:, :C, 1:-1, 2:], larger[:, 3 : C + 3, 2:, 1:-1]
    for x in (args["x"].contiguous(), *crops, args["x"][:1].expand(N, -1, -1, -1), args["x"].mT.contiguous().mT):
        check(args | {"x": x}, f"{x.stride()}")
    wide = torch.randn(args["U"].shape[0], args["U"].shape[1] + 1, 1, 1).to(DEVICE, torch.bfloat16)
    check(args | {"U": wide[:, 1:], "residual": args["residual"].contiguous(memory_format=torch.contiguous_format)})


def test_cases_that_are_not_fused():
    """Odd channels, a high rank, groups, fp64: two steps, with the same values."""
    for name in ("3 x 3", "3 x 3, strided", "rank 200", "4 groups", "17 groups"):
        checks.check_conv2d(name, "paper", device=DEVICE, dtype=torch.bfloat16, activation="relu")
    checks.check_conv2d("3 x 3", "paper", device=DEVICE, dtype=torch.float64)


def test_odd_channels_can_be_fused():
    """The kernel takes any number of channels; the op avoids odd ones, where every element would be loaded
    separately."""
    from compaware_kernels.ops.triton_lowrank import lowrank_conv2d

    args = checks.conv2d_case("3 x 3", "paper", dtype=torch.bfloat16, device=DEVICE)
    got = lowrank_conv2d(args["x"], args["V"], args["U"], args["bias"], padding=args["padding"])
    checks.assert_as_good(got, checks.truth_conv2d(**args), checks.reference_conv2d(**args))


def test_current_stream():
    """The kernel is ordered after work queued on the current stream: it sees the x that is still being computed."""
    args = arguments("3 x 3")
    wanted = ck.lowrank_conv2d(**args | {"x": args["x"] * 2})
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        got = ck.lowrank_conv2d(**args | {"x": args["x"] * 2})
    torch.cuda.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["3 x 3", "3 x 3, dilated"])
def test_graph_capture(name):
    """Replayed with another x; the second case pads its odd rank inside the graph."""
    args = arguments(name)
    ck.lowrank_conv2d(**args)  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ck.lowrank_conv2d(**args)
    args["x"].mul_(-3)
    graph.replay()
    assert torch.equal(y, ck.lowrank_conv2d(**args))


def test_more_than_int32_elements():
    x = torch.zeros(1, 4096, 1024, 520, dtype=torch.float16, device=DEVICE).to(memory_format=torch.channels_last)
    V, U = (torch.randn(shape, device=DEVICE).half() for shape in ((8, 4096, 1, 1), (4096, 8, 1, 1)))
    x[..., -8:, :] = torch.randn_like(x[..., -8:, :])
    assert x.numel() > 2**31
    y = ck.lowrank_conv2d(x, V, U)[..., -8:, :]
    last = {"x": x[..., -8:, :], "V": V, "U": U}
    checks.assert_as_good(y, checks.truth_conv2d(**last), checks.reference_conv2d(**last))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    args = arguments("3 x 3")
    there = {key: A.to("cuda:1") if isinstance(A, torch.Tensor) else A for key, A in args.items()}
    got = ck.lowrank_conv2d(**there)
    assert got.device == torch.device("cuda:1") and torch.equal(got.cpu(), ck.lowrank_conv2d(**args).cpu())
    assert torch.cuda.current_device() == 0
