"""lowrank_conv2d, lowrank_linear, lowrank_pack: one kernel == two steps of plain PyTorch == the dense layer in fp64."""

import math
from itertools import cycle, product

import pytest
import torch
from torch.library import opcheck

import compaware_kernels as ck
from compaware_kernels.folds import FOLDS
from compaware_kernels.ops import library
from tests.helpers import lowrank_checks as checks
from tests.helpers.lowrank_checks import ACTIVATIONS, CONV, LAYOUTS, LINEAR, conv2d_case, linear_case
from tests.helpers.marks import slow_but

ops = torch.ops.compaware
kernel = pytest.mark.skipif(bool(library.missing), reason=f"no C++ kernel: {library.missing}")
dtypes = pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
folds = pytest.mark.parametrize("fold", FOLDS)

# Turns the keyword arguments of the public functions into the positional ones of the ops; `packed` is None.
CONV_ARGS = {"bias": None, "residual": None, "packed": None, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1),
             "groups": 1, "fold": "paper", "activation": "none"}  # fmt: skip
LINEAR_ARGS = {"bias": None, "residual": None, "packed": None, "activation": "none"}


def positional(args, defaults):
    return [args["x"], args["V"], args["U"], *(args.get(key, default) for key, default in defaults.items())]


# --- values -----------------------------------------------------------------------------------------------------------


@dtypes
@folds
def test_conv2d(fold, dtype):
    for name in CONV:
        checks.check_conv2d(name, fold, dtype=dtype, bias=False)
        checks.check_conv2d(name, fold, dtype=dtype, residual=True, layout="channels_last", activation="relu6")


@dtypes
def test_linear(dtype):
    for name in LINEAR:
        checks.check_linear(name, dtype=dtype, bias=False)
        checks.check_linear(name, dtype=dtype, residual=True, layout="strided", activation="relu6")


def test_every_epilogue_and_layout():
    small = ("1 x 1", "3 x 3", "7 x 7", "4 groups")
    for name, layout, activation in zip(cycle(small), *zip(*product(LAYOUTS, ACTIVATIONS), strict=True), strict=False):
        for bias, residual in product((False, True), repeat=2):
            ends = {"layout": layout, "activation": activation, "bias": bias, "residual": residual}
            checks.check_conv2d(name, "paper", **ends)
            checks.check_linear("tokens", **ends)


def test_arguments_of_any_strides():
    """V, U, bias and residual need not be contiguous either."""
    args = conv2d_case("3 x 3, strided", "paper", residual=True)
    wanted = ck.lowrank_conv2d(**args)
    for key in ("V", "U", "bias", "residual"):
        A = args[key]
        for other in (torch.stack([A, A], -1)[..., 0], A.movedim(0, -1).contiguous().movedim(-1, 0)):
            assert torch.equal(ck.lowrank_conv2d(**args | {key: other}), wanted), key
    args["residual"] = args["residual"][:1].expand_as(args["residual"])
    checks.assert_as_good(ck.lowrank_conv2d(**args), checks.truth_conv2d(**args), checks.reference_conv2d(**args))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)  # the kernel, and two steps
def test_memory_format_of_the_output(dtype):
    """As for any convolution of torch: channels_last if x or the weight is."""
    args = conv2d_case("3 x 3", "paper", dtype)
    for formats in product((torch.contiguous_format, torch.channels_last), repeat=2):
        x, V = (args[key].contiguous(memory_format=f) for key, f in zip("xV", formats, strict=True))
        y = ck.lowrank_conv2d(**args | {"x": x, "V": V})
        wanted = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
        assert y.is_contiguous(memory_format=wanted)


def test_empty_sizes():
    """No channels, rank 0, no outputs: the result, or the error, of two steps."""
    for C, r, O in ((0, 3, 4), (8, 0, 4), (8, 3, 0)):
        conv = (torch.randn(2, C, 5, 5), torch.randn(r, C, 3, 3), torch.randn(O, r, 1, 1))
        linear = (torch.randn(2, C), torch.randn(r, C), torch.randn(O, r))
        for op, reference, args in ((ck.lowrank_conv2d, checks.reference_conv2d, conv),
                                    (ck.lowrank_linear, checks.reference_linear, linear)):  # fmt: skip
            try:
                wanted = reference(*args)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    op(*args)
            else:
                assert torch.equal(op(*args), wanted)


@kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_thread_count_does_not_change_the_result(activation):
    cases = [conv2d_case(name, "paper", residual=True, activation=activation) for name in CONV]
    linear = [linear_case(name, residual=True, activation=activation) for name in LINEAR]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([ck.lowrank_conv2d(**c) for c in cases] + [ck.lowrank_linear(**c) for c in linear])
    finally:
        torch.set_num_threads(threads)
    exact = activation not in ("silu", "gelu")  # torch's own vectorized code differs at the ends of a chunk
    for other in results[1:]:
        for y, first in zip(other, results[0], strict=True):
            torch.testing.assert_close(y, first, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_nan_and_inf_propagate_as_in_two_steps(value):
    for name, activation in product(("1 x 1", "3 x 3", "7 x 7", "17 groups"), ACTIVATIONS):
        args = conv2d_case(name, "paper", activation=activation)
        args["x"][0, 1 % args["x"].shape[1], 2, 3] = value
        got, wanted = ck.lowrank_conv2d(**args), checks.reference_conv2d(**args)
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf()), name
        assert (got.isfinite().any() and not got.isfinite().all()) or activation in ("relu", "relu6")
        args = linear_case("many rows", activation=activation)
        args["x"][7, 3] = value
        got, wanted = ck.lowrank_linear(**args), checks.reference_linear(**args)
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())


# --- refusals ---------------------------------------------------------------------------------------------------------

A = torch.zeros
CONV_REFUSALS = {
    "V of other channels": ({"V": A(3, 9, 3, 3)}, r"V of shape \[3, 8, 3, 3\]; got \[3, 9, 3, 3\]"),
    "U of another rank": ({"U": A(4, 2, 1, 1)}, r"U of shape \[4, 3, 1, 1\]; got \[4, 2, 1, 1\]"),
    "U of 3 axes": ({"U": A(4, 3, 1)}, "4 axes"),
    "U of 2 axes": ({"U": A(4, 3)}, "4 axes"),
    "V of 2 axes": ({"V": A(3, 8)}, "4 axes"),
    "x of 3 axes": ({"x": A(8, 5, 5)}, "4 axes"),
    "a second kernel": ({"U": A(4, 3, 3, 3)}, r"U of shape \[4, 3, 1, 3\]; got \[4, 3, 3, 3\]"),
    "bias": ({"bias": A(5)}, r"bias of shape \[4\]; got \[5\]"),
    "residual": ({"residual": A(1, 4, 4, 3)}, r"residual of shape \[1, 4, 3, 3\]; got \[1, 4, 4, 3\]"),
    "residual that would broadcast": ({"residual": A(1, 4, 1, 1)}, "residual"),
    "activation": ({"activation": "tanh"}, "none, relu, relu6, silu, gelu; got 'tanh'"),
    "fold": ({"fold": "crane"}, "paper, spatial, input; got 'crane'"),
    "groups of the inputs": ({"groups": 3}, "groups"),
    "groups of the rank": ({"groups": 2, "V": A(3, 4, 3, 3)}, "groups"),
    "groups of the outputs": ({"groups": 2, "V": A(6, 4, 3, 3), "U": A(5, 3, 1, 1)}, "groups"),
    "no groups": ({"groups": 0}, "groups"),
    "negative padding": ({"padding": -1}, "padding"),
    "no stride": ({"stride": 0}, "stride"),
    "no dilation": ({"dilation": 0}, "dilation"),
    "three strides": ({"stride": (1, 1, 1)}, "stride"),
    "a kernel larger than the input": ({"x": A(1, 8, 2, 5)}, "does not fit an input of 2 x 5"),
    "one that a stride would hide": ({"x": A(1, 8, 2, 5), "stride": 2}, "does not fit an input of 2 x 5"),
    "one that dilation makes": ({"dilation": 3}, "does not fit an input of 5 x 5"),
    "an empty kernel": ({"V": A(3, 8, 0, 3)}, "kernel"),
    "x of another dtype": ({"x": A(1, 8, 5, 5, dtype=torch.float64)}, "dtype"),
    "V of another dtype": ({"V": A(3, 8, 3, 3, dtype=torch.bfloat16)}, "dtype"),
}
LINEAR_REFUSALS = {
    "V of other features": ({"V": A(3, 9)}, r"V of shape \[3, 8\]; got \[3, 9\]"),
    "U of another rank": ({"U": A(4, 2)}, r"U of shape \[4, 3\]; got \[4, 2\]"),
    "U of 1 axis": ({"U": A(3)}, r"U \[O, r\]"),
    "V of 4 axes": ({"V": A(3, 8, 1, 1)}, r"V \[r, C\]"),
    "x of no axis": ({"x": A(())}, "wanted x"),
    "bias": ({"bias": A(5)}, r"bias of shape \[4\]; got \[5\]"),
    "residual": ({"residual": A(2, 5)}, r"residual of shape \[2, 4\]; got \[2, 5\]"),
    "residual that would broadcast": ({"residual": A(1, 4)}, "residual"),
    "activation": ({"activation": "tanh"}, "none, relu, relu6, silu, gelu; got 'tanh'"),
    "x of another dtype": ({"x": A(2, 8, dtype=torch.float64)}, "dtype"),
}


@kernel
@pytest.mark.parametrize("wrong", CONV_REFUSALS)
def test_conv2d_refuses(wrong):
    change, words = CONV_REFUSALS[wrong]
    with pytest.raises((ValueError, RuntimeError), match=words):
        ck.lowrank_conv2d(**{"x": A(1, 8, 5, 5), "V": A(3, 8, 3, 3), "U": A(4, 3, 1, 1)} | change)


@kernel
@pytest.mark.parametrize("wrong", LINEAR_REFUSALS)
def test_linear_refuses(wrong):
    change, words = LINEAR_REFUSALS[wrong]
    with pytest.raises((ValueError, RuntimeError), match=words):
        ck.lowrank_linear(**{"x": A(2, 8), "V": A(3, 8), "U": A(4, 3)} | change)


# --- the hint `packed` ------------------------------------------------------------------------------------------------


def _edit(W):
    W.mul_(2)


def _edit_data(W):
    W.data.mul_(2)  # does not change the tensor's version counter


@kernel
@pytest.mark.parametrize("edit", (_edit, _edit_data))
@pytest.mark.parametrize("factor", ("V", "U"))
def test_packed_factors_are_ignored_after_a_change(factor, edit):
    for op, args in ((ck.lowrank_conv2d, conv2d_case("4 groups", "paper")), (ck.lowrank_linear, linear_case("deep"))):
        packed = ops.lowrank_pack(args["V"], args["U"], args.get("groups", 1))
        before = op(**args, packed=packed)
        assert torch.equal(before, op(**args))
        edit(args[factor])
        assert torch.equal(op(**args, packed=packed), op(**args)) and not torch.equal(op(**args), before)


@kernel
def test_packed_factors_of_something_else_are_ignored():
    args, other = linear_case("deep"), linear_case("deep")
    other["V"] = other["V"] + 1
    packed = ops.lowrank_pack(args["V"], args["U"], 1)
    wanted = ck.lowrank_linear(**args)
    useless = {
        "another layer's": ops.lowrank_pack(other["V"], other["U"], 1),
        "a copy's": ops.lowrank_pack(args["V"].clone(), args["U"].clone(), 1),
        "cut short": packed[:-5],
        "the header only": packed[:16],
        "a few numbers": packed[:3],
        "none": packed[:0],
        "strided": torch.stack([packed, packed], -1)[:, 0],
        "noise": torch.randn_like(packed),
        "of another dtype": packed.double(),
    }
    for what, hint in {"right": packed, **useless}.items():
        assert torch.equal(ck.lowrank_linear(**args, packed=hint), wanted), what


@kernel
def test_packed_factors_are_used():
    """While the factors look unchanged, the packed copy determines the result: the hint is not simply ignored."""
    args = linear_case("deep", bias=False)
    packed = ops.lowrank_pack(args["V"], args["U"], 1)
    # changes no element that is sampled to detect changes
    packed[16:] = torch.where(packed[16:] == packed[16 + 3], 1e6, packed[16:])
    assert ck.lowrank_linear(**args, packed=packed).abs().max() > 1e3


def test_pack_refuses():
    for V, U, groups in ((A(3, 8), A(4, 3), 0), (A(3, 8), A(4, 3), 2), (A(3), A(4, 3), 1), (A(3, 8), A(4), 1)):
        with pytest.raises(RuntimeError, match="lowrank_pack"):
            ops.lowrank_pack(V, U, groups)


# --- autograd, autocast, compilers ------------------------------------------------------------------------------------

TINY = {"x": (2, 4, 4, 3), "V": {"paper": (4, 2, 2, 3), "spatial": (4, 2, 1, 3), "input": (4, 2, 1, 1)},
        "U": {"paper": (6, 2, 1, 1), "spatial": (6, 2, 2, 1), "input": (6, 2, 2, 3)}}  # fmt: skip
TINY_GEOMETRY = {"stride": (1, 2), "padding": (1, 1), "dilation": (2, 1), "groups": 2}


def tiny(fold, dtype=torch.float64):
    """x, V, U, bias and residual that require gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes = (TINY["x"], TINY["V"][fold], TINY["U"][fold], (6,), (2, 6, 4, 2))
    return [checks.values(shape, generator).to(dtype).requires_grad_() for shape in shapes]


@folds
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_conv2d(fold, activation):
    def f(x, V, U, bias, residual):
        return ck.lowrank_conv2d(x, V, U, bias, residual=residual, fold=fold, activation=activation, **TINY_GEOMETRY)

    inputs = tiny(fold)
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_linear(activation):
    def f(x, V, U, bias, residual):
        return ck.lowrank_linear(x, V, U, bias, residual=residual, activation=activation)

    generator = torch.Generator().manual_seed(3)
    inputs = [checks.values(s, generator).requires_grad_() for s in ((2, 3, 5), (3, 5), (4, 3), (4,), (2, 3, 4))]
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_in_fp32(activation):
    def gradients(op, args):
        wanted = [args[key].requires_grad_() for key in ("x", "V", "U", "bias", "residual")]
        y = op(**args)
        return torch.autograd.grad(y, wanted, torch.arange(y.numel()).cos().reshape(y.shape).to(y))

    for op, truth, case, name in ((ck.lowrank_conv2d, checks.truth_conv2d, conv2d_case, ("4 groups", "paper")),
                                  (ck.lowrank_linear, checks.truth_linear, linear_case, ("tokens",))):  # fmt: skip
        ours, exact = (
            gradients(f, case(*name, dtype, residual=True, activation=activation))
            for f, dtype in ((op, torch.float32), (truth, torch.float64))
        )
        for got, wanted in zip(ours, exact, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_gradients_of_some_arguments_only():
    for only in range(5):
        inputs = [A.detach().requires_grad_(i == only) for i, A in enumerate(tiny("paper"))]
        x, V, U, bias, residual = inputs
        ck.lowrank_conv2d(x, V, U, bias, residual=residual, activation="silu", **TINY_GEOMETRY).sum().backward()
        assert [A.grad is not None for A in inputs] == [i == only for i in range(5)]


def test_autocast_equals_that_of_torch():
    args, linear = conv2d_case("4 groups", "paper", residual=True), linear_case("tokens", residual=True)
    for op, reference, case in ((ck.lowrank_conv2d, checks.reference_conv2d, args),
                                (ck.lowrank_linear, checks.reference_linear, linear)):  # fmt: skip
        case["V"].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = op(**case, packed=ops.lowrank_pack(case["V"].detach(), case["U"], case.get("groups", 1)))
        half = {key: A.bfloat16() if isinstance(A, torch.Tensor) else A for key, A in case.items()}
        assert y.dtype == torch.bfloat16 and torch.equal(y, reference(**half))
        y.float().square().sum().backward()
        assert case["V"].grad.dtype == torch.float32 and case["V"].grad.any()
    double = conv2d_case("1 x 1", "paper", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ck.lowrank_conv2d(**double).dtype == torch.float64


def test_compiles_to_one_graph_for_any_batch():
    def f(x, V, U, bias, W, Z):
        y = ck.lowrank_conv2d(x, V, U, bias, padding=1, activation="silu") * 2
        return ck.lowrank_linear(y.mean((2, 3)), W, Z, activation="gelu") + 1

    args = conv2d_case("3 x 3", "paper", layout="channels_last")
    x, *factors = (args[key] for key in ("x", "V", "U", "bias"))
    generator = torch.Generator().manual_seed(0)
    factors += [checks.values(shape, generator, 0.2).float() for shape in ((5, 130), (9, 5))]
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            some = torch.cat([x, x, x])[:batch]
            torch.testing.assert_close(compiled(some, *factors), f(some, *factors), rtol=1e-5, atol=1e-5)


OPCHECKED = {
    "kernel": {},
    "grouped": {"name": "17 groups"},
    "channels_last": {"layout": "channels_last", "residual": True, "activation": "silu"},
    "two steps": {"dtype": torch.float64, "activation": "gelu", "residual": True},
    "spatial": {"fold": "spatial", "layout": "strided"},
    "input": {"fold": "input", "bias": False},
    "no images": {"name": "no images"},
}


@pytest.mark.parametrize("case", slow_but(["kernel", "two steps"], OPCHECKED))
def test_opcheck_conv2d(case):
    args = conv2d_case(**{"name": "3 x 3", "fold": "paper"} | OPCHECKED[case])
    opcheck(ops.lowrank_conv2d.default, positional(args, CONV_ARGS))
    for key in ("x", "V", "U"):
        args[key].requires_grad_()
    opcheck(ops.lowrank_conv2d.default, positional(args, CONV_ARGS))


@pytest.mark.parametrize("case", slow_but(["tokens"], ("tokens", "a vector", "no rows")))
def test_opcheck_linear(case):
    for dtype in (torch.float32, torch.float64):
        args = linear_case(case, dtype, residual=True, activation="silu")
        opcheck(ops.lowrank_linear.default, positional(args, LINEAR_ARGS))
        for key in ("x", "V", "U"):
            args[key].requires_grad_()
        opcheck(ops.lowrank_linear.default, positional(args, LINEAR_ARGS))


@kernel
def test_opcheck_pack():
    """Without test_aot_dispatch, which compares two results: what is packed starts with addresses."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for V, U, groups in (((6, 5), (7, 6), 1), ((6, 5, 3, 2), (8, 3, 1, 1), 2), ((6, 5, 1, 3), (8, 6, 3, 1), 1)):
        for dtype in (torch.float32, torch.float64):
            opcheck(ops.lowrank_pack.default, (A(V, dtype=dtype), A(U, dtype=dtype), groups), test_utils=tests)
