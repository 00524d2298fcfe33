"""lowrank_conv2d_ writes the result of lowrank_conv2d over the residual; FLOP formulas of the ops."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from compaware_kernels.folds import FOLDS
from compaware_kernels.ops import lowrank
from compaware_kernels.ops.lowrank import Geometry
from tests.helpers import lowrank_checks as checks
from tests.helpers.lowrank_checks import ACTIVATIONS, CONV, LINEAR, conv2d_case, linear_case
from tests.ops.test_lowrank import CONV_ARGS, CONV_REFUSALS, LINEAR_ARGS, A, kernel, ops, positional

LAST = torch.channels_last
RESIDUALS = {
    "channels_last": lambda R: R.contiguous(memory_format=LAST),
    "contiguous": lambda R: R.contiguous(),
    "strided": lambda R: torch.stack([R, R], -1)[..., 0],
    "every other channel": lambda R: torch.cat([R, R], 1).contiguous(memory_format=LAST)[:, : R.shape[1]],
    "transposed": lambda R: R.mT.contiguous(memory_format=LAST).mT,
}


def in_place(args, op=ops.lowrank_conv2d_):
    """Result of the op, which must be in the memory of the residual."""
    address, strides = args["residual"].data_ptr(), args["residual"].stride()
    assert op(*positional(args, CONV_ARGS)) is None
    assert args["residual"].data_ptr() == address and args["residual"].stride() == strides
    return args["residual"]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("fold", FOLDS)
def test_values(fold, dtype):
    for name in CONV:
        args = conv2d_case(name, fold, dtype, residual=True, activation="relu6")
        args |= {"residual": args["residual"].contiguous(memory_format=LAST)}
        wanted = ops.lowrank_conv2d(*positional(args, CONV_ARGS))
        others = {key: args[key].clone() for key in ("x", "V", "U", "bias")}
        assert torch.equal(in_place(args), wanted), name
        assert all(torch.equal(args[key], value) for key, value in others.items())


@pytest.mark.parametrize("layout", RESIDUALS)
def test_residuals_of_any_strides(layout):
    for activation, x_layout in product(ACTIVATIONS, ("contiguous", "channels_last")):
        args = conv2d_case("3 x 3, strided", "paper", residual=True, activation=activation, layout=x_layout)
        wanted = ops.lowrank_conv2d(*positional(args, CONV_ARGS))
        args["residual"] = RESIDUALS[layout](args["residual"])
        around = args["residual"]._base
        before = None if around is None else around.clone()
        assert torch.equal(in_place(args), wanted)
        if layout == "every other channel":
            assert torch.equal(around[:, 33:], before[:, 33:]), "it wrote beside the residual"


def test_an_expanded_residual_is_refused():
    args = conv2d_case("1 x 1", "paper", residual=True)
    args["residual"] = args["residual"][:1].expand(3, -1, -1, -1)
    with pytest.raises(RuntimeError, match=r"memory of its own.*stride 0 along axis 0|single memory location"):
        in_place(args)


# x and y of one shape, with every reason for a pixel of y to need another pixel of x.
SQUARE = {
    "1 x 1": {"V": (20, 32, 1, 1), "U": (32, 20, 1, 1)},
    "3 x 3": {"V": (20, 32, 3, 3), "U": (32, 20, 1, 1), "padding": (1, 1)},
    "groups": {"V": (24, 8, 3, 3), "U": (32, 6, 1, 1), "padding": (1, 1), "groups": 4},
    "shifted": {"V": (20, 32, 1, 1), "U": (32, 20, 1, 1), "stride": (2, 2), "padding": (10, 10)},
    "spatial": {"V": (20, 32, 1, 3), "U": (32, 20, 3, 1), "padding": (1, 1), "fold": "spatial"},
}


@pytest.mark.parametrize("body", ("op", "reference"))
@pytest.mark.parametrize("layout", (LAST, torch.contiguous_format))
@pytest.mark.parametrize("case", SQUARE)
def test_x_is_the_residual(case, layout, body):
    generator = torch.Generator().manual_seed(0)
    case = SQUARE[case]
    args = case | {name: checks.values(case[name], generator, 0.2).float() for name in "VU"}
    args["x"] = checks.values((1, 32, 21, 21), generator).float()  # several tiles of the kernel
    args["x"] = args["x"].contiguous(memory_format=layout)
    wanted = ops.lowrank_conv2d(*positional(args | {"residual": args["x"].clone()}, CONV_ARGS))
    op = ops.lowrank_conv2d_ if body == "op" else lowrank.lowrank_conv2d_._init_fn
    assert torch.equal(in_place(args | {"residual": args["x"]}, op), wanted)


def test_x_overlaps_the_residual():
    """One begins inside of the other."""
    memory = checks.values((3, 9, 9, 32), torch.Generator().manual_seed(0)).float().movedim(-1, 1)
    args = {"V": torch.randn(20, 32, 3, 3), "U": torch.randn(32, 20, 1, 1), "padding": (1, 1)}
    for x, residual in ((slice(2), slice(1, 3)), (slice(1, 3), slice(2))):
        mine = memory.clone()
        call = args | {"x": mine[x], "residual": mine[residual]}
        wanted = ops.lowrank_conv2d(*positional(call, CONV_ARGS))
        assert torch.equal(in_place(call), wanted)


def test_weights_that_overlap_the_residual():
    x, memory = torch.randn(2, 32, 9, 9), torch.randn(2, 9, 9, 32)
    shapes = {"V": (20, 32, 1, 1), "U": (32, 20, 1, 1), "bias": (32,)}
    plain = {"x": x, **{name: torch.randn(shape) for name, shape in shapes.items()}}
    plain["packed"] = ops.lowrank_pack(plain["V"], plain["U"], 1)
    for name in (*shapes, "packed"):
        mine = memory.clone()
        hidden = mine.view(-1)[-plain[name].numel() :].view(plain[name].shape).copy_(plain[name])
        call = plain | {name: hidden, "residual": mine.movedim(-1, 1)}
        wanted = ops.lowrank_conv2d(*positional(call, CONV_ARGS))
        assert torch.equal(in_place(call), wanted), name


@kernel
@pytest.mark.parametrize("wrong", CONV_REFUSALS)
def test_nothing_is_written_on_an_error(wrong):
    change, words = CONV_REFUSALS[wrong]
    args = {"x": A(1, 8, 5, 5), "V": A(3, 8, 3, 3), "U": A(4, 3, 1, 1), "residual": torch.ones(1, 4, 3, 3)} | change
    args |= {key: (args[key],) * 2 for key in ("stride", "padding", "dilation") if isinstance(args.get(key), int)}
    before = args["residual"].clone()
    with pytest.raises(RuntimeError, match=words):
        in_place(args)
    assert torch.equal(args["residual"], before)


def test_opcheck():
    for name, fold, dtype in (("3 x 3", "paper", torch.float32), ("17 groups", "paper", torch.float32),
                              ("3 x 3", "spatial", torch.float32), ("1 x 1", "paper", torch.float64)):  # fmt: skip
        args = conv2d_case(name, fold, dtype, residual=True, activation="silu")
        opcheck(ops.lowrank_conv2d_.default, positional(args, CONV_ARGS))


# --- multiply-adds ----------------------------------------------------------------------------------------------------


def flops(f, *args):
    with FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("fold", FOLDS)
def test_flops_are_those_of_two_convolutions(fold):
    for name in CONV:
        args = conv2d_case(name, fold, residual=True)
        geometry = Geometry(*(args.get(key, CONV_ARGS[key]) for key in Geometry._fields))
        (first, second), groups = geometry.parts(), geometry.groups

        def two(x, V, U, first=first, second=second, groups=groups):
            return F.conv2d(F.conv2d(x, V, None, *first, groups), U, None, *second, groups)

        wanted = flops(two, args["x"], args["V"], args["U"])
        assert flops(ops.lowrank_conv2d, *positional(args, CONV_ARGS)) == wanted
        assert flops(ops.lowrank_conv2d_, *positional(args, CONV_ARGS)) == wanted


def test_flops_are_those_of_two_linear_layers():
    for name in LINEAR:
        args = linear_case(name)
        wanted = flops(lambda x, V, U: F.linear(F.linear(x, V), U), args["x"], args["V"], args["U"])
        assert flops(ops.lowrank_linear, *positional(args, LINEAR_ARGS)) == wanted, name
