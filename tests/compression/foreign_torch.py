"""Oddities of torch.nn, one small model each: what people's modules do that a plain network does not."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

__all__ = ["CASES"]


class Net(nn.Module):
    """Model whose forward is ``run(self, *args, **kwargs)``, with these modules as attributes."""

    def __init__(self, run: Callable, **modules: nn.Module):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 24)))


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 9, 10)))


def lin(m: int = 24, n: int = 24, **more) -> nn.Linear:
    return nn.Linear(m, n, **more)


def two(change: Callable[[Net], object] = lambda net: None, run: Callable | None = None) -> Net:
    """Two layers, changed by ``change(net)``, on rows."""
    net = Net(run or (lambda m, x: m.b(torch.relu(m.a(x)))), a=lin(), b=lin())
    change(net)
    return net


class Repr(nn.Linear):
    def extra_repr(self) -> str:
        return "a Linear with another name"


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


class Linear(nn.Linear):
    """Of the same name as torch's, and casts its input."""

    def forward(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


class Versioned(nn.Module):
    """Refuses a state dict without its version, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.a, self.b = lin(), lin()

    def forward(self, x):
        return self.b(self.a(x).relu())

    def _load_from_state_dict(self, state, prefix, metadata, *more):
        if metadata.get("version") != 2:
            raise ValueError(f"version 2 wanted; got {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *more)


class Forces(nn.Module):
    """Energy and its gradient in the input, as in molecular dynamics."""

    def __init__(self):
        super().__init__()
        self.a, self.b = lin(), lin(24, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(torch.tanh(self.a(x))).sum()
            return energy, torch.autograd.grad(energy, x, create_graph=True)[0]


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 16, 3, 2, 1), nn.ConvTranspose2d(16, 8, 3, 2, 1)

    def forward(self, x):
        return x + self.up(self.down(x), output_size=x.shape)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = lin(), lin()

    def forward(self, x):
        return x + self.b(F.silu(self.a(x)))


@dataclass
class Answer:
    logits: Tensor
    hidden: list


def tied():
    net = Net(
        lambda m, x: m.head(m.body(m.words(x))), words=nn.Embedding(100, 24), body=lin(), head=lin(24, 100, bias=False)
    )
    net.head.weight = net.words.weight
    return net, (torch.arange(12).reshape(2, 6),)


def shared():
    part = lin()
    return Net(lambda m, x: m.a(m.b(x)), a=nn.Sequential(part), b=nn.Sequential(nn.ReLU(), part)), (rows(),)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def masked_encoder():
    mask = torch.zeros(3, 6).bool()
    mask[:, 4:] = True
    net = Net(lambda m, x, mask: m.head(m.body(m.first(x), src_key_padding_mask=mask)),
              first=lin(), body=encoder(), head=lin())  # fmt: skip
    return net, (rows(3, 6, 24), mask)


def attributes(net):
    net.cache = net.a.weight * 2  # no leaf: deepcopy fails


def hooked(net):
    net.a.register_forward_hook(lambda module, args, y: 2 * y)
    net.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def own_forward(net):
    net.a.forward = lambda x: 3 * F.linear(x, net.a.weight)


def old_weight_norm(net):
    nn.utils.weight_norm(net.a)


def pruned(net):
    prune.l1_unstructured(net.a, "weight", 0.5)


def complex_rows():
    net = two().to(torch.complex64)
    net.run = lambda m, x: m.b(m.a(x))
    return net, (torch.randn(5, 24, dtype=torch.complex64),)


def quantized_beside():
    torch.backends.quantized.engine = "qnnpack" if "qnnpack" in torch.backends.quantized.supported_engines else "fbgemm"
    net = two()
    net.b = torch.ao.quantization.quantize_dynamic(nn.Sequential(net.b), {nn.Linear}, torch.qint8)
    return net, (rows(),)


def lazy():
    net = Net(lambda m, x: m.b(m.a(x)), a=nn.LazyLinear(24), b=lin())
    net(rows())
    return net, (rows(),)


def exported():
    inner = torch.export.export(nn.Sequential(lin(), nn.ReLU()).eval(), (rows(),)).module()
    inner.train = inner.eval = lambda *_: inner  # they raise: an exported program has no modes
    return Net(lambda m, x: m.b(m.a(x)), a=inner, b=lin()), (rows(),)


def traced():
    return two(lambda net: setattr(net, "a", torch.jit.trace(nn.Sequential(lin(), nn.ReLU()), rows()))), (rows(),)


def scripted():
    return two(lambda net: setattr(net, "a", torch.jit.script(nn.Sequential(lin(), nn.ReLU())))), (rows(),)


def list_of_layers():
    net = Net(lambda m, x: sum(layer(x) for layer in m.plain), layers=nn.ModuleList(lin() for _ in range(3)))
    net.plain = list(net.layers)
    return net, (rows(),)


def sub(kind):
    return lambda: (Net(lambda m, x: m.b(m.a(x)), a=kind(24, 24), b=lin()), (rows(),))


def keyword_only():
    net = Net(lambda m, *, x, scale=1.0: scale * m.b(m.a(input=x)), a=lin(), b=lin())
    return net, {"x": rows(), "scale": 2.0}


def frozen(net):
    net.a.requires_grad_(False)


def orthogonal(net):
    parametrizations.orthogonal(net.a)


def view_weight(net):
    big = torch.randn(48, 24)
    net.a.weight, net.b.weight = nn.Parameter(big[:24]), nn.Parameter(big[24:])


def expanded(net):
    net.register_buffer("wide", torch.ones(1, 24).expand(5, 24))


class Doubled(nn.Module):
    def forward(self, W):
        return 2 * W


def modes(net):
    net.train()
    net.a.eval()


def nested():
    return two(run=lambda m, x: m.b(m.a(torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)))), (rows(),)


def list_in(m, batch):
    return {"y": [m.a(part) for part in batch["x"]]}


CASES: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    "one layer": lambda: (lin(), (rows(),)),
    "one convolution": lambda: (nn.Conv2d(8, 16, 3), (image(),)),
    "sequential": lambda: (nn.Sequential(lin(), nn.ReLU(), lin()), (rows(),)),
    "batch norm": lambda: (nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()), (image(),)),
    "tied embedding": tied,
    "tied layers": lambda: (two(lambda net: setattr(net.b, "weight", net.a.weight)), (rows(),)),
    "two parents": shared,
    "layer called twice": lambda: (two(run=lambda m, x: m.b(m.a(m.a(x)))), (rows(),)),
    "attention": lambda: (Net(lambda m, x: m.out(m.body(x, x, x)[0]), body=nn.MultiheadAttention(24, 4), out=lin()),
                          (rows(6, 3, 24),)),
    "encoder": lambda: (encoder(), (rows(3, 6, 24),)),
    "encoder, norm first": lambda: (encoder(norm_first=True), (rows(3, 6, 24),)),
    "encoder with a mask": masked_encoder,
    "transformer": lambda: (nn.Transformer(24, 4, 1, 1, 48, batch_first=True), (rows(2, 5, 24), rows(2, 4, 24))),
    "lstm": lambda: (Net(lambda m, x: m.out(m.body(x)[0]), body=nn.LSTM(24, 24, proj_size=12), out=lin(12)),
                     (rows(6, 3, 24),)),
    "only gru": lambda: (nn.GRU(24, 24), (rows(6, 3, 24),)),
    "lstm cell": lambda: (Net(lambda m, x: m.out(m.body(x)[0]), body=nn.LSTMCell(24, 24), out=lin()), (rows(),)),
    "bilinear": lambda: (Net(lambda m, x: m.out(m.body(x, x)), body=nn.Bilinear(24, 24, 24), out=lin()), (rows(),)),
    "embedding bag": lambda: (Net(lambda m, x: m.out(m.words(x)), words=nn.EmbeddingBag(50, 24), out=lin()),
                              (torch.arange(12).reshape(3, 4),)),
    "no parameters": lambda: (nn.Sequential(nn.ReLU(), nn.Softmax(-1)), (rows(),)),
    "weight norm": lambda: (two(lambda net: parametrizations.weight_norm(net.a)), (rows(),)),
    "old weight norm": lambda: (two(old_weight_norm), (rows(),)),
    "weight norm everywhere": lambda: (two(lambda net: [old_weight_norm(net), nn.utils.weight_norm(net.b)]), (rows(),)),
    "old spectral norm": lambda: (two(lambda net: nn.utils.spectral_norm(net.a)), (rows(),)),
    "spectral norm": lambda: (two(lambda net: parametrizations.spectral_norm(net.a)), (rows(),)),
    "orthogonal": lambda: (two(orthogonal), (rows(),)),
    "own parametrization": lambda: (two(lambda net: parametrize.register_parametrization(net.a, "weight", Doubled())),
                                    (rows(),)),
    "pruned": lambda: (two(pruned), (rows(),)),
    "lazy, initialized": lazy,
    "subclass with another repr": sub(Repr),
    "subclass that scales": sub(Scaled),
    "subclass called Linear": sub(Linear),
    "subclass of attention": sub(nn.modules.linear.NonDynamicallyQuantizableLinear),
    "extra state": sub(Extra),
    "versioned": lambda: (Versioned(), (rows(),)),
    "scripted part": scripted,
    "traced part": traced,
    "scripted": lambda: (torch.jit.script(nn.Sequential(lin(), nn.ReLU())), (rows(),)),
    "exported part": exported,
    "graph module": lambda: (torch.fx.symbolic_trace(nn.Sequential(lin(), nn.ReLU(), lin())), (rows(),)),
    "compiled": lambda: (torch.compile(two(), backend="eager"), (rows(),)),
    "data parallel": lambda: (nn.DataParallel(two()), (rows(),)),
    "hooks": lambda: (two(hooked), (rows(),)),
    "own forward on the object": lambda: (two(own_forward), (rows(),)),
    "buffer on a layer": lambda: (two(lambda net: net.a.register_buffer("scale", torch.ones(24))), (rows(),)),
    "child of a layer": lambda: (two(lambda net: net.a.add_module("more", nn.ReLU())), (rows(),)),
    "tensor that is no leaf": lambda: (two(attributes), (rows(),)),
    "expanded buffer": lambda: (two(expanded), (rows(),)),
    "weights in one storage": lambda: (two(view_weight), (rows(),)),
    "no outputs": lambda: (Net(lambda m, x: torch.cat([m.a(x), m.b(x)], -1), a=lin(24, 0), b=lin()), (rows(),)),
    "no inputs": lambda: (Net(lambda m, x: m.a(x[:, :0]) + m.b(x), a=lin(0, 24), b=lin()), (rows(),)),
    "reads dtype": lambda: (two(run=lambda m, x: m.b(m.a(x.to(m.a.weight.dtype)))), (rows(),)),
    "reads device and shape": lambda: (two(run=lambda m, x: m.b(m.a(x.to(m.b.weight.device))) / m.b.weight.shape[0]),
                                       (rows(),)),
    "reads the weight": lambda: (two(run=lambda m, x: F.linear(m.a(x), m.b.weight)), (rows(),)),
    "weight decay in forward": lambda: (two(run=lambda m, x: m.b(m.a(x)) + m.a.weight.square().sum()), (rows(),)),
    "reads in_features": lambda: (two(run=lambda m, x: m.b(m.a(x)) / math.sqrt(m.b.in_features)), (rows(),)),
    "reads the stride": lambda: (Net(lambda m, x: m.a(x)[..., :: m.a.stride[0]], a=nn.Conv1d(8, 8, 3)),
                                 (image(2, 8, 9),)),
    "output size": lambda: (UNet(), (image(),)),
    "complex": complex_rows,
    "bf16": lambda: (two().bfloat16(), (rows().bfloat16(),)),
    "fp64": lambda: (two().double(), (rows().double(),)),
    "quantized beside": quantized_beside,
    "reflected padding": lambda: (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (image(),)),
    "causal, dilated": lambda: (Net(lambda m, x: m.a(F.pad(x, (4, 0))), a=nn.Conv1d(8, 8, 3, dilation=2)),
                                (image(2, 8, 9),)),
    "no batch axis": lambda: (nn.Conv2d(8, 8, 3), (image(8, 9, 10),)),
    "groups": lambda: (nn.Conv2d(8, 16, 3, groups=2), (image(),)),
    "depthwise": lambda: (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1)), (image(),)),
    "transposed, groups": lambda: (nn.ConvTranspose2d(8, 16, 3, 2, groups=2), (image(),)),
    "3-D": lambda: (nn.Conv3d(4, 8, 3), (image(1, 4, 5, 6, 7),)),
    "checkpointed": lambda: (two(run=lambda m, x: m.b(torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False))),
                             (rows(),)),
    "keyword only": keyword_only,
    "frozen": lambda: (two(frozen), (rows(),)),
    "gradient in forward": lambda: (Forces(), (rows(),)),
    "mapping and lists": lambda: (Net(list_in, a=lin()), ({"x": [rows(), rows(2, 24)]},)),
    "dataclass": lambda: (two(run=lambda m, x: Answer(m.b(m.a(x)), [x, None])), (rows(),)),
    "named tuple": lambda: (two(run=lambda m, x: collections.namedtuple("Two", "a b")(m.a(x), m.b(x))), (rows(),)),
    "masked": lambda: (two(run=lambda m, x: m.b(m.a(x)).masked_fill(x < 0, -torch.inf).log_softmax(-1)), (rows(),)),
    "noise": lambda: (two(run=lambda m, x: m.b(F.dropout(m.a(x), 0.5, True))), (rows(),)),
    "in place": lambda: (two(run=lambda m, x: m.b(m.a(x.mul_(2)).relu_())), (rows(),)),
    "plain list of layers": list_of_layers,
    "residual blocks": lambda: (nn.Sequential(Block(), Block()), (rows(2, 3, 24),)),
    "mixed modes": lambda: (two(modes), (rows(),)),
    "nested tensors": nested,
}  # fmt: skip
