"""Checks that every body of the shrinkage ops must pass, on any device."""

import pytest
import torch

from compaware_kernels._utils.dtypes import compute_dtype
from compaware_kernels.ops import shrinkage

OPS = {"soft_threshold": 1, "group_shrink": 1, "sparse_group_shrink": 2}  # name: number of thresholds
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 1), (7, 1), (1, 5000), (64, 147), (33, 1031),  # one element, biases, one long row, no multiple of anything
    (3, 10, 65), (2, 3, 4, 17), (5, 1, 1),  # batches
    (0, 4), (4, 0), (0, 5, 3),  # empty
]  # fmt: skip
LAYOUTS = {
    "contiguous": lambda W: W,
    "transposed": lambda W: W.mT.contiguous().mT,
    "sliced": lambda W: torch.cat([W, W], -1)[..., : W.shape[-1]],
    "every other": lambda W: torch.stack([W, W], -1).flatten(-2)[..., ::2],
}


def op(name):
    return getattr(torch.ops.compaware, name)


def reference(name):
    return getattr(shrinkage, name)._init_fn


def weight(shape, dtype, device, seed=0):
    """Weight whose rows have norms from tiny to large, so that some become zero; about half of the elements are below
    0.5."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    W = W * torch.logspace(-2, 1, shape[-2], dtype=torch.float64)[:, None]
    return W.to(device, dtype)


def thresholds(count, batch, dtype=torch.float64, device="cpu", seed=1):
    generator = torch.Generator().manual_seed(seed)
    taus = [(i + 1) * torch.rand(batch, generator=generator, dtype=torch.float64) for i in range(count)]
    return [tau.to(device, dtype) for tau in taus]


def assert_as_good(got, name, W, taus):
    """The error against the fp64 truth is at most twice that of plain PyTorch in W's dtype, plus rounding."""
    compute = compute_dtype(W.dtype)
    assert got.dtype == W.dtype and got.shape == W.shape and got.device == W.device
    if not W.numel():
        return
    truth = reference(name)(W.double(), *(tau.to(compute).double() for tau in taus))
    lost = (reference(name)(W, *taus).double() - truth).abs().max()
    error = (got.double() - truth).abs().max()
    assert error <= 2 * lost + 4 * torch.finfo(compute).eps * W.double().abs().max(), f"{error=} {lost=}"


def check_values(name, dtype, device):
    for shape in SHAPES:
        for batch in {(), shape[:-2]}:
            for layout in LAYOUTS.values():
                W = weight(shape, dtype, device)
                taus = thresholds(OPS[name], batch, compute_dtype(dtype), device)
                V = layout(W)
                got = op(name)(V, *taus)
                assert got.is_contiguous() and torch.equal(V, W), "input changed, or output not contiguous"
                assert not got.numel() or got.data_ptr() != V.data_ptr()
                assert_as_good(got, name, W, taus)


def check_tau_dtypes(name, device):
    """A threshold of any float dtype is used as if cast to the compute dtype first."""
    for dtype in DTYPES:
        W = weight((4, 9, 33), dtype, device)
        for tau_dtype in DTYPES:
            taus = thresholds(OPS[name], (4,), tau_dtype, device)
            cast = [tau.to(compute_dtype(dtype)) for tau in taus]
            assert torch.equal(op(name)(W, *taus), op(name)(W, *cast))


def check_in_place(name, device):
    """Ragged list of every dtype and layout: each entry becomes what the functional form gives, bit for bit."""
    entries = [(layout, dtype, shape) for shape in SHAPES for layout in LAYOUTS for dtype in DTYPES]
    weights = [LAYOUTS[layout](weight(shape, dtype, device, i)) for i, (layout, dtype, shape) in enumerate(entries)]
    taus = thresholds(OPS[name], (len(weights),))  # fp64 on the CPU, whatever the weights
    wanted = [op(name)(W, *(tau[i].to(device) for tau in taus)) for i, W in enumerate(weights)]
    versions, strides = [W._version for W in weights], [W.stride() for W in weights]
    assert op(name + "_")(weights, *taus) is None
    for i, (W, P) in enumerate(zip(weights, wanted, strict=True)):
        assert torch.equal(W, P) and W.stride() == strides[i], entries[i]
        assert W._version > versions[i], "autograd must see the change"


def neuron_values(device):
    """Rows with a bias each: as accurate as rows that contain it; every dtype and layout, ragged, tied, without
    weights."""
    entries = [(layout, dtype, shape) for shape in [*SHAPES, (3, 0)] for layout in LAYOUTS for dtype in DTYPES]
    weights = [LAYOUTS[layout](weight(shape, dtype, device, i)) for i, (layout, dtype, shape) in enumerate(entries)]
    biases = [weight((*shape[:-1], 2), dtype, device, i)[..., i % 2] for i, (_, dtype, shape) in enumerate(entries)]
    (taus,) = thresholds(1, (len(weights),))
    rows = [torch.cat([W, b[..., None]], -1) for W, b in zip(weights, biases, strict=True)]
    versions = [x._version for x in (*weights, *biases)]
    torch.ops.compaware.neuron_shrink_(weights, biases, taus)
    assert all(x._version > before for x, before in zip((*weights, *biases), versions, strict=True))
    for W, b, R, tau in zip(weights, biases, rows, taus, strict=True):
        assert_as_good(torch.cat([W, b[..., None]], -1), "group_shrink", R, [tau.to(device)])


def neuron_refusals(device):
    W, b, tau = weight((4, 6), torch.float32, device), torch.ones(4, device=device), torch.ones(2)
    before = W.clone()
    bad = {
        "biases: wanted one per weight, 2; got 1": [b],
        "biases: wanted one per weight, 2; got 0": [],
        r"biases\[1\]: wanted one number per row, shape \[4\]": [b, b[:3]],
        r"biases\[1\]: .*of the weight's dtype": [b, b.double()],
        r"biases\[1\]: .*written through; got stride 0": [b, b[:1].expand(4)],
    }
    for message, biases in bad.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.compaware.neuron_shrink_([W, W.clone()], biases, tau)
        assert torch.equal(W, before) and torch.equal(b, torch.ones_like(b))


def check_nothing(name, device):
    """Thresholds of 0 keep NaN and Inf where they are."""
    for dtype in DTYPES:
        W = weight((6, 40), dtype, device)
        W[2, 3], W[4, 1] = torch.nan, torch.inf
        before = W.clone()
        op(name + "_")([W], *[torch.zeros(1)] * OPS[name])
        assert torch.equal(W.isnan(), before.isnan()) and torch.equal(W.nan_to_num(), before.nan_to_num())


def check_long_list(name, device):
    """More weights than one CUDA launch takes."""
    weights = [weight((2, 3), torch.float32, device, seed) for seed in range(800)]
    taus = thresholds(OPS[name], (len(weights),), device=device)
    wanted = [op(name)(W, *(tau[i] for tau in taus)) for i, W in enumerate(weights)]
    op(name + "_")(weights, *taus)
    assert all(map(torch.equal, weights, wanted))


def check_shared_memory(name, device):
    """Tied weights: every entry is computed from the original weights, and the last one is what stays."""
    base = weight((40, 50), torch.float32, device)
    cuts = [slice(0, 30), slice(10, 40), slice(0, 40), slice(0, 30)]
    taus = thresholds(OPS[name], (len(cuts),))
    results = [op(name)(base[cut], *(tau[i].to(device) for tau in taus)) for i, cut in enumerate(cuts)]
    wanted = base.clone()
    for cut, P in zip(cuts, results, strict=True):
        wanted[cut] = P
    op(name + "_")([base[cut] for cut in cuts], *taus)
    assert torch.equal(base, wanted)


def check_special_values(name, device):
    zeros = torch.zeros(OPS[name], device=device)
    for dtype in DTYPES:
        W = weight((6, 40), dtype, device)
        assert torch.equal(op(name)(W, *zeros), W), "a threshold of zero changes nothing"
        huge = [z + 1e6 for z in zeros]
        assert not op(name)(W, *huge).any(), "a huge threshold leaves nothing"
        assert not op(name)(torch.zeros_like(W), *zeros).any(), "a row of zeros stays, without 0 / 0"
        for value in (float("nan"), float("inf")):
            V = W.clone()
            V[2, 3] = value
            taus = [z + 0.1 for z in zeros]
            got, wanted = op(name)(V, *taus), reference(name)(V, *taus)
            assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
        assert op(name)(W, *(z + float("nan") for z in zeros)).isnan().all()


def check_refusals(name, device):
    """The refused argument is named, and nothing is changed, not even the entries before it."""
    good, count = weight((4, 6), torch.float32, device), OPS[name]
    zero, other = torch.zeros((), device=device), "cpu" if device != "cpu" else None
    functional = {
        "fp64, fp32, bf16 or fp16; got Int": (good.int(), *[zero] * count),
        "matrix or a batch of them": (good[0], *[zero] * count),
        r"one number, or shape \[\]; got shape \[4\]": (good, *[zero.expand(4)] * count),
        r"one number, or shape \[3\]; got shape \[4\]": (good.expand(3, 4, 6), *[zero.expand(4)] * count),
    }
    for message, args in functional.items():
        with pytest.raises(RuntimeError, match=message):
            op(name)(*args)
    bad = {
        r"weights\[1\]: wanted fp64, fp32, bf16 or fp16; got Long": good.long(),
        r"weights\[1\]: wanted a matrix": good[0],
        r"weights\[1\]: .*written through; got stride 0 along axis 0": good[:1].expand(4, 6),
    }
    if other:
        bad[r"weights\[1\]: wanted a tensor on a CUDA device"] = good.to(other)
    for message, entry in bad.items():
        W, before = good.clone(), (good.clone(), entry.clone())
        with pytest.raises(RuntimeError, match=message):
            op(name + "_")([W, entry], *[torch.ones(2)] * count)
        assert torch.equal(W, before[0]) and torch.equal(entry, before[1])
    for taus in (torch.ones(3), torch.ones(()), torch.ones(2, 2)):
        W = good.clone()
        with pytest.raises(RuntimeError, match=r"one per weight|one number"):
            op(name + "_")([W, W.clone()], *[taus] * count)
        assert torch.equal(W, good)
