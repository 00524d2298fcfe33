"""Low-rank layers as modules: fused kernel or two steps, packed weights, state dicts, copies, torch.func, compile."""

import copy
import io
import pickle
from itertools import product

import pytest
import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.folds import FOLDS
from compaware_kernels.nn.registry import low_rank_type
from compaware_kernels.ops import library

kernel = pytest.mark.skipif(bool(library.missing), reason=f"no C++ kernel: {library.missing}")
folds = pytest.mark.parametrize("fold", FOLDS)

LAYERS = {  # dense layer, rank, input
    "linear": (lambda: nn.Linear(19, 33), 7, (3, 5, 19)),
    "conv2d": (lambda: nn.Conv2d(16, 33, (3, 5), stride=2, padding=(1, 2)), 13, (2, 16, 13, 11)),
    "grouped": (lambda: nn.Conv2d(32, 34, 3, groups=2, dilation=2, bias=False), 13, (2, 32, 13, 11)),
    "same": (lambda: nn.Conv2d(16, 19, (3, 5), padding="same"), 13, (2, 16, 7, 8)),
    "same, uneven": (lambda: nn.Conv2d(16, 9, 4, padding="same"), 4, (2, 16, 7, 8)),
    "valid": (lambda: nn.Conv2d(16, 19, 3, padding="valid"), 13, (2, 16, 7, 8)),
    "reflect": (lambda: nn.Conv2d(16, 9, 3, padding=1, padding_mode="reflect"), 4, (2, 16, 7, 8)),
    "few channels": (lambda: nn.Conv2d(3, 16, 3), 3, (2, 3, 9, 9)),
}
ONE_KERNEL = ("linear", "conv2d", "grouped", "same", "valid")


def low_rank(name, fold="paper"):
    torch.manual_seed(0)
    make, rank, shape = LAYERS[name]
    dense = make()
    return low_rank_type(dense).from_dense(dense, rank, fold), torch.randn(shape)


def two_steps(layer, x):
    return layer.to_sequential()(x)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def ops_of(f):
    """Names of the ops of this package that ``f`` calls."""
    with torch.profiler.profile() as profile:
        f()
    return {event.key for event in profile.key_averages() if event.key.startswith("compaware::")}


def network():
    """A model and its input: low-rank layers, one nested, one with a fused activation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.ModuleDict({"inner": nn.Conv2d(16, 24, 3, stride=2)})["inner"],
        nn.Flatten(), nn.Linear(24 * 9, 10),
    )  # fmt: skip
    for i, rank in ((0, 5), (2, 13), (4, 3)):
        model[i] = low_rank_type(model[i]).from_dense(model[i], rank)
    model[2].activation = "silu"
    return model.eval(), torch.randn(2, 8, 8, 8)


# --- one kernel, or two steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@folds
def test_forward_is_two_steps(name, fold):
    layer, x = low_rank(name, fold)
    wanted = two_steps(layer, x)
    assert torch.equal(layer(x), wanted), "in training mode, with gradients"
    layer.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(layer(x), wanted)
            residual = torch.randn_like(wanted)
            for activation, module in (("none", nn.Identity()), ("gelu", nn.GELU())):
                layer.activation = activation
                close(layer(x, residual), module(wanted + residual))
                close(layer(x), two_steps(layer, x))
            layer.activation = "none"


@kernel
@pytest.mark.parametrize("name", LAYERS)
def test_the_fused_kernel_runs_if_it_supports_the_layer(name):
    layer, x = low_rank(name)
    op = "compaware::lowrank_linear" if name == "linear" else "compaware::lowrank_conv2d"
    layer.eval()
    with torch.no_grad():
        used = op in ops_of(lambda: layer(x))
        assert used == (name in ONE_KERNEL) == (layer.why_two_step(x) == "")


def _hook(layer):
    layer.first.register_forward_hook(lambda module, args, y: 2 * y)


def _pre_hook(layer):
    layer.second.register_forward_pre_hook(lambda module, args: (3 * args[0],))


def _own_forward(layer):
    original = layer.first.forward
    layer.first.forward = lambda x: original(x) + 1


def _replaced(layer):
    layer.second = nn.Sequential(layer.second, nn.Tanh())


def _subclass(layer):
    class Doubled(type(layer.first)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.first.__class__ = Doubled


def _weight_norm(layer):
    nn.utils.parametrizations.weight_norm(layer.first)
    layer.first.parametrizations.weight.original0.data.mul_(2)


def _old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer.second)
    layer.second.weight_g.data.mul_(2)


@pytest.mark.parametrize("name", ("linear", "conv2d"))
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_hook, "hooks or a forward of its own"),
        (_pre_hook, "hooks or a forward of its own"),
        (_own_forward, "hooks or a forward of its own"),
        (_replaced, "no plain layer"),
        (_subclass, "no plain layer"),
        (_weight_norm, "no plain layer"),
        (_old_weight_norm, "hooks or a forward of its own"),
    ],
)
def test_two_steps_if_a_factor_is_no_plain_layer(name, change, why):
    layer, x = low_rank(name)
    before = two_steps(layer.eval(), x)
    with torch.no_grad():
        change(layer)
        layer.eval()
        assert why in layer.why_two_step(x)
        wanted = layer.second(layer.first(x))
        assert torch.equal(layer(x), wanted) and (wanted - before).abs().max() > 0.1


@kernel
def test_why_two_step():
    layer, x = low_rank("conv2d")
    layer.eval()
    assert layer.why_two_step(x).startswith("gradients are wanted")
    with torch.no_grad():
        assert layer.why_two_step(x) == ""
        assert "float64" in layer.why_two_step(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.why_two_step(x) == "autocast: the CPU kernel is for fp32"
        assert low_rank("conv2d", "input")[0].why_two_step(x) == "the second factor of fold input is no 1 x 1"
        assert low_rank("reflect")[0].why_two_step(x) == "padding mode reflect"
        assert "more on one side" in low_rank("same, uneven")[0].why_two_step(x)
        assert "3 channels" in low_rank("few channels")[0].why_two_step(x[:, :3])
    layer.requires_grad_(False)
    assert layer.why_two_step(x) == "" and layer.why_two_step(x.requires_grad_())


@kernel
def test_thin_layers_on_large_images_take_two_steps():
    layer = ck.LowRankConv2d(24, 144, 1, 8).eval()
    with torch.no_grad():
        assert "pixels" in layer.why_two_step(torch.randn(2, 24, 91, 91))
        assert layer.why_two_step(torch.randn(2, 24, 28, 28)) == ""


def test_unbatched_input():
    for name, fold in product(("conv2d", "grouped", "few channels"), FOLDS):
        layer, x = low_rank(name, fold)
        layer.eval()
        with torch.no_grad():
            close(layer(x[0]), two_steps(layer, x[0]))


@pytest.mark.parametrize("name", ("linear", "conv2d", "grouped"))
def test_gradients_in_training_and_in_eval_mode(name):
    layer, x = low_rank(name)
    for mode in (True, False):
        layer.train(mode).zero_grad()
        layer(x).square().sum().backward()
        got = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        two_steps(layer, x).square().sum().backward()
        for gradient, p in zip(got, layer.parameters(), strict=True):
            close(gradient, p.grad)


@pytest.mark.parametrize("name", ("linear", "conv2d"))
def test_transforms_of_torch_func(name):
    layer, x = low_rank(name)
    layer.eval().requires_grad_(False)
    _, wanted = torch.func.jvp(layer.to_sequential(), (x,), (x.cos(),))
    close(torch.func.jvp(layer, (x,), (x.cos(),))[1], wanted)
    wanted = torch.func.grad(lambda x: two_steps(layer, x).sin().sum())(x)
    close(torch.func.grad(lambda x: layer(x).sin().sum())(x), wanted)
    close(torch.vmap(layer)(torch.stack([x, 2 * x])), torch.stack([two_steps(layer, x), two_steps(layer, 2 * x)]))
    other = {key: p + 0.1 for key, p in layer.named_parameters()}
    twin = copy.deepcopy(layer)
    twin.load_state_dict(other)
    close(torch.func.functional_call(layer, other, (x,)), two_steps(twin, x))


# --- packed weights, dtypes, copies, checkpoints ----------------------------------------------------------------------


def _step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(2, *LAYERS["conv2d"][2][1:])).square().mean().backward()
    optimizer.step()


def _load(layer):
    layer.load_state_dict({key: value + 0.5 for key, value in layer.state_dict().items()})


def _load_assign(layer):
    layer.load_state_dict({key: value + 0.5 for key, value in layer.state_dict().items()}, assign=True)


def _edit_data(layer):
    for p in layer.parameters():
        p.data.add_(0.5)


def _new_parameter(layer):
    layer.second.weight = nn.Parameter(layer.second.weight.detach() + 0.5)


def _new_factor(layer):
    layer.first = copy.deepcopy(layer.first)
    nn.init.normal_(layer.first.weight)


def _train_and_back(layer):
    layer.train()
    _edit_data(layer)
    layer.eval()


def _dtypes(layer):
    layer.double()
    _edit_data(layer)
    layer.float()


@pytest.mark.parametrize(
    "change", (_step, _load, _load_assign, _edit_data, _new_parameter, _new_factor, _train_and_back, _dtypes)
)
def test_weights_that_change_after_packing(change):
    layer, x = low_rank("conv2d")
    layer.eval()
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        close(layer(x), two_steps(layer, x))
        assert (layer(x) - before).abs().max() > 1e-3


@kernel
def test_weights_are_packed_once():
    layer, x = low_rank("conv2d")
    assert layer._packed is None, "not packed in training mode"
    layer.eval()
    packed = layer._packed
    with torch.no_grad():
        assert packed.numel() > 0 and ops_of(lambda: layer(x)) == {"compaware::lowrank_conv2d"}
        assert layer._packed is packed
        layer.first.weight.mul_(2)
        assert "compaware::lowrank_pack" in ops_of(lambda: layer(x)) and layer._packed is not packed


@pytest.mark.parametrize("name", ("linear", "conv2d"))
def test_converted_to_other_dtypes_and_back(name):
    layer, x = low_rank(name)
    layer.eval()
    with torch.no_grad():
        wanted = layer(x)
        double = layer.to(torch.float64)(x.double())
        assert double.dtype == torch.float64
        close(double.float(), wanted)
        close(layer.to(torch.float32)(x), wanted)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))))
@pytest.mark.parametrize("name", ("linear", "conv2d"))
def test_copies_share_no_packed_weights(name, copied):
    layer, x = low_rank(name)
    layer.eval()
    with torch.no_grad():
        wanted = layer(x)
        other = copied(layer)
        assert other._packed is None or other._packed.data_ptr() != layer._packed.data_ptr()
        layer.first.weight.zero_()
        assert torch.equal(other(x), wanted)
        layer.first.weight.copy_(other.first.weight)
        other.first.weight.zero_()
        assert torch.equal(layer(x), wanted)


def test_pickles_contain_no_packed_weights():
    layer, _ = low_rank("conv2d")
    assert len(pickle.dumps(layer.eval())) == pytest.approx(len(pickle.dumps(layer.train())), rel=0.01)
    assert len(pickle.dumps(layer)) < 1.5 * 4 * sum(p.numel() for p in layer.parameters())


@folds
@pytest.mark.parametrize("name", LAYERS)
def test_loads_state_dicts_of_the_dense_layer_and_of_the_sequential(name, fold):
    dense = LAYERS[name][0]()
    kind, rank, x = low_rank_type(dense), LAYERS[name][1], low_rank(name)[1]
    small = kind.from_dense(dense, rank, fold).eval()
    for state in (small.state_dict(), small.to_sequential().state_dict(), dense.state_dict()):
        keys = list(state)
        other = kind.like(dense, rank, fold).eval()
        assert str(other.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
        assert list(state) == keys, "the caller's state dict must not change"
        with torch.no_grad():
            close(other(x), small(x))


def test_errors_of_load_state_dict():
    model, _ = network()
    state = model.state_dict()
    state["0.third.weight"] = state.pop("4.second.bias")
    with pytest.raises(RuntimeError, match=r'Missing key.*"4\.second\.bias"(.|\n)*Unexpected key.*"0\.third\.weight"'):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight"):
        low_rank("linear")[0].load_state_dict(low_rank("conv2d")[0].state_dict())


def test_state_dict_in_a_file_loaded_with_weights_only():
    model, x = network()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = network()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), model(x))


def test_extra_repr():
    layer, _ = low_rank("grouped")
    assert layer.extra_repr() == (
        "32, 34, kernel_size=(3, 3), fold=paper, groups=2, rank=13, weights=4,186 of 4,896 (85%)"
    )
    layer, _ = low_rank("linear")
    layer.activation = "relu6"
    wanted = "in_features=19, out_features=33, rank=7, weights=364 of 627 (58%), activation=relu6"
    assert layer.extra_repr() == wanted and isinstance(layer.to_sequential()[2], nn.ReLU6)


@kernel
def test_compiled_model():
    model, x = network()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (torch.cat([x, x]), torch.cat([x, x, x])):
            close(compiled(batch), model(batch))
        assert "compaware::lowrank_conv2d" in ops_of(lambda: compiled(torch.cat([x, x])))
        model[0].first.weight.mul_(2)
        close(compiled(torch.cat([x, x])), model(torch.cat([x, x])))
    assert compiled(torch.cat([x, x])).requires_grad, "gradients are still computed"
