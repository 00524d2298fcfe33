"""Cases for the low-rank ops, their fp64 truth, and the error bound of every body, on any device."""

import torch
import torch.nn.functional as F

import compaware_kernels as ck
from compaware_kernels.ops import lowrank

# x [N, C, H, W], O outputs, rank r per group, kernel; and the geometry if it is not torch's default.
CONV = {
    "one of each": {"x": (1, 1, 1, 1), "O": 1, "r": 1, "kernel": (1, 1)},
    "1 x 1": {"x": (3, 17, 5, 7), "O": 65, "r": 3, "kernel": (1, 1)},
    "1 x 1, strided": {"x": (1, 65, 9, 8), "O": 17, "r": 33, "kernel": (1, 1), "stride": (2, 3)},
    "1 x 1, deep": {"x": (1, 520, 3, 5), "O": 130, "r": 130, "kernel": (1, 1)},
    "3 x 3": {"x": (2, 17, 13, 11), "O": 130, "r": 17, "kernel": (3, 3), "padding": (1, 1)},
    "3 x 3, strided": {"x": (3, 33, 15, 12), "O": 33, "r": 65, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    "3 x 3, dilated": {"x": (2, 3, 14, 17), "O": 17, "r": 3, "kernel": (3, 3), "dilation": (2, 3)},
    "3 x 5, all at once": {"x": (1, 65, 9, 16), "O": 3, "r": 100, "kernel": (3, 5), "stride": (2, 1),
                           "padding": (1, 2), "dilation": (1, 2)},
    "1 x 7": {"x": (1, 9, 3, 16), "O": 17, "r": 3, "kernel": (1, 7), "stride": (1, 2), "padding": (0, 3)},
    "7 x 1": {"x": (1, 9, 16, 3), "O": 17, "r": 3, "kernel": (7, 1), "stride": (2, 1), "padding": (3, 0)},
    "7 x 7": {"x": (1, 3, 19, 23), "O": 65, "r": 33, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "5 x 5, deep": {"x": (1, 300, 7, 6), "O": 33, "r": 17, "kernel": (5, 5), "padding": (2, 2)},
    "rank 200": {"x": (1, 130, 9, 10), "O": 130, "r": 200, "kernel": (3, 3)},
    "padding wider than the kernel": {"x": (1, 8, 3, 4), "O": 9, "r": 5, "kernel": (3, 3), "padding": (4, 5)},
    "image smaller than the kernel": {"x": (2, 9, 2, 1), "O": 3, "r": 3, "kernel": (5, 5), "padding": (2, 2)},
    "17 groups": {"x": (2, 34, 9, 8), "O": 51, "r": 2, "kernel": (3, 3), "groups": 17},
    "4 groups": {"x": (1, 68, 9, 9), "O": 132, "r": 33, "kernel": (3, 3), "padding": (1, 1), "groups": 4},
    "no images": {"x": (0, 17, 5, 5), "O": 65, "r": 3, "kernel": (3, 3)},
}  # fmt: skip
LINEAR = {  # x [..., C], O, r
    "one of each": ((1, 1), 1, 1),
    "a vector": ((17,), 3, 3),
    "a batch": ((3, 65), 130, 17),
    "tokens": ((2, 7, 33), 17, 33),
    "many rows": ((301, 9), 65, 100),
    "deep": ((5, 1030), 130, 200),
    "more axes": ((2, 1, 3, 5, 17), 1, 65),
    "no rows": ((0, 17), 5, 3),
}
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": lambda z: z.clamp_min(0),
    "relu6": lambda z: z.clamp(0, 6),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim == 4 else x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def values(shape, generator, scale=1.0):
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def conv2d_case(name, fold, dtype=torch.float32, device="cpu", layout="contiguous", bias=True, residual=False, **more):
    """Keyword arguments of ``ck.lowrank_conv2d``; outputs have a standard deviation of about 1, some reach relu6's
    6."""
    case = CONV[name]
    N, C, H, W = case["x"]
    O, r, G, (kh, kw) = case["O"], case["r"], case.get("groups", 1), case["kernel"]
    first, second = {"paper": ((kh, kw), (1, 1)), "spatial": ((1, kw), (kh, 1)), "input": ((1, 1), (kh, kw))}[fold]
    generator = torch.Generator().manual_seed(0)
    args = {
        "x": values(case["x"], generator),
        "V": values((G * r, C // G, *first), generator, (C // G * first[0] * first[1]) ** -0.5),
        "U": values((O, r, *second), generator, (r * second[0] * second[1]) ** -0.5),
        "bias": values(O, generator, 3.0) if bias else None,
    }
    args = {key: None if A is None else A.to(device, dtype) for key, A in args.items()}
    args["x"] = LAYOUTS[layout](args["x"]) if N else args["x"]
    geometry = {key: case[key] for key in ("stride", "padding", "dilation", "groups") if key in case}
    args |= geometry | {"fold": fold} | more
    if residual:
        args["residual"] = values(truth_conv2d(**args).shape, generator).to(device, dtype)
    return args


def linear_case(name, dtype=torch.float32, device="cpu", layout="contiguous", bias=True, residual=False, **more):
    """Keyword arguments of ``ck.lowrank_linear``."""
    shape, O, r = LINEAR[name]
    generator = torch.Generator().manual_seed(0)
    args = {
        "x": values(shape, generator),
        "V": values((r, shape[-1]), generator, shape[-1] ** -0.5),
        "U": values((O, r), generator, r**-0.5),
        "bias": values(O, generator, 3.0) if bias else None,
        "residual": values((*shape[:-1], O), generator) if residual else None,
    }
    args = {key: None if A is None else A.to(device, dtype) for key, A in args.items()}
    args["x"] = LAYOUTS[layout](args["x"]) if len(shape) > 1 and shape[0] else args["x"]
    return args | more


def _finished(y, bias, residual, activation):
    y = y if bias is None else y + bias
    return ACTIVATIONS[activation](y if residual is None else y + residual.double())


def truth_conv2d(x, V, U, bias=None, *, residual=None, stride=1, padding=0, dilation=1, groups=1, fold=None,
                 activation="none"):  # fmt: skip
    """One dense convolution in fp64 whose kernel is the product of the factors: neither two steps nor folds."""
    U, V = (W.double().unflatten(0, (groups, -1)) for W in (U, V))
    W = torch.einsum("gorab,grcde->gocadbe", U, V).flatten(5).flatten(3, 4).flatten(0, 1)
    y = F.conv2d(x.double(), W, None, stride, padding, dilation, groups)
    return _finished(y, None if bias is None else bias.double()[:, None, None], residual, activation)


def truth_linear(x, V, U, bias=None, *, residual=None, activation="none"):
    y = x.double() @ (U.double() @ V.double()).mT
    return _finished(y, None if bias is None else bias.double(), residual, activation)


def reference_conv2d(x, V, U, bias=None, *, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
                     fold="paper", activation="none"):  # fmt: skip
    """Two convolutions of plain PyTorch."""
    body = lowrank.lowrank_conv2d._init_fn
    return body(x, V, U, bias, residual, None, stride, padding, dilation, groups, fold, activation)


def reference_linear(x, V, U, bias=None, *, residual=None, activation="none"):
    return lowrank.lowrank_linear._init_fn(x, V, U, bias, residual, None, activation)


def assert_as_good(got, truth, reference, label=""):
    """The largest error is at most twice that of plain PyTorch in two steps, plus 8 ulps of the largest output.

    The 8 ulps allow for one running sum: about sqrt(n)/4 ulps over n products, n = 1030 in the deepest case, which
    PyTorch sums in blocks (measured: 6.0 ulps there, PyTorch 1.1).
    """
    assert got.shape == truth.shape == reference.shape and got.dtype == reference.dtype, label
    if not got.numel():
        return
    lost, error = ((y.double() - truth).abs().max().item() for y in (reference, got))
    ulp = torch.finfo(got.dtype).eps * truth.abs().max().item()
    assert error <= 2 * lost + 8 * ulp, f"{label}: off by {error / ulp:.1f} ulps, two steps by {lost / ulp:.1f}"
    assert lost <= 64 * ulp, f"{label}: two steps are off by {lost / ulp:.1f} ulps: no yardstick"


def check_conv2d(name, fold, **more):
    args = conv2d_case(name, fold, **more)
    before = {key: A.clone() for key, A in args.items() if isinstance(A, torch.Tensor)}
    assert_as_good(ck.lowrank_conv2d(**args), truth_conv2d(**args), reference_conv2d(**args), f"{name}, {fold}, {more}")
    assert all(torch.equal(args[key], A) for key, A in before.items()), "an argument changed"


def check_linear(name, **more):
    args = linear_case(name, **more)
    assert_as_good(ck.lowrank_linear(**args), truth_linear(**args), reference_linear(**args), f"{name}, {more}")
