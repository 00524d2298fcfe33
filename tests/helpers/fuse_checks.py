"""Models to fuse, and the checks that every fused model must pass."""

import copy

import torch
from torch import nn

import compaware_kernels as ck
from compaware_kernels.nn.module_surgery import NORMS

torch.manual_seed(0)
IMAGE = torch.randn(2, 16, 6, 5)
TOKENS = torch.randn(2, 3, 16)


class Net(nn.Module):
    """Model whose forward is ``run(self, x)`` with these modules as attributes."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


class Net2(Net):
    """Model whose forward is ``run(self, x, y)``."""

    def forward(self, x, y):
        return self.run(self, x, y)


def prepared(model):
    """The model with batch norms that change their input."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def steps(model):
    """Ops that remain: class names of modules, names of functions and methods."""
    named = {"call_module": lambda n: type(model.get_submodule(n.target)).__name__, "call_method": lambda n: n.target,
             "call_function": lambda n: n.target.__name__}  # fmt: skip
    return [named[node.op](node) for node in model.graph.nodes if node.op in named]


def flags(model, name="in_place"):
    return [node.kwargs[name] for node in model.graph.nodes if name in node.kwargs]


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def check(model, *inputs):
    """Fuse the model and compare outputs, twice in a row; inputs and the model itself must not change. Returns the
    fused one."""
    model, before = prepared(model), copy.deepcopy(model.state_dict())
    kept = [x.clone() for x in inputs]
    fused = ck.fuse(model, inputs)
    assert not any(m.training for m in fused.modules()) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = reference(*[x.clone() for x in inputs])
        for _ in range(2):
            same(fused(*inputs), wanted)
            assert all(map(torch.equal, inputs, kept))
    same(fused(*inputs), wanted)  # with gradients the two-step path runs
    return fused


def conv(kernel=1, inputs=16, outputs=16, **more):
    """Low-rank convolution with "same" padding that the fused kernel takes."""
    return ck.LowRankConv2d(inputs, outputs, kernel, 12, padding=kernel // 2, **more)


LAYERS = {
    "linear": (lambda: ck.LowRankLinear(16, 16, 5), TOKENS),
    "conv1d": (lambda: ck.LowRankConv1d(16, 16, 3, 5, padding=1), IMAGE[..., 0]),
    "conv2d": (lambda: conv(3), IMAGE),
    "spatial": (lambda: conv(3, fold="spatial"), IMAGE),
    "transposed": (lambda: ck.LowRankConvTranspose2d(16, 16, 3, 5, padding=1), IMAGE),
}
