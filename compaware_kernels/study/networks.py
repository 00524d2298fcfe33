"""Study networks: small ones, ``NETWORKS[name](channels, classes, size)``, and those of timm, ``timm/NAME``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor, nn

__all__ = [
    "NETWORKS",
    "TIMM",
    "build",
    "dec",
    "is_network",
    "last_layers",
    "mlp",
    "resnet20",
    "small_convnet",
    "transforms",
]

TIMM = "timm/"


def mlp(channels: int, classes: int, size: int = 28) -> nn.Sequential:
    """Three linear layers, 256 and 128 wide, on images of ``size`` x ``size`` pixels."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, 256), nn.ReLU(),
        nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, classes),
    )  # fmt: skip


def dec(channels: int, classes: int, size: int = 28) -> nn.Sequential:
    """Convolutions with 1-D kernels only, a ReLU after each: 3 x 1, 1 x 3, three times, with 16, 32 and 64 channels.

    The kind of network of the NIPS 2017 paper's experiments (Alvarez & Petersson, DecomposeMe, arXiv 1606.05426), for
    small images.
    """
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, width, (3, 1), padding=(1, 0)), nn.ReLU(),
            nn.Conv2d(width, width, (1, 3), padding=(0, 1)), nn.ReLU(), nn.MaxPool2d(2),
        ]  # fmt: skip
        channels = width
    rest = size // 8
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * rest * rest, classes))


def small_convnet(classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Three 3 x 3 convolutions and two linear layers; any image of 4 x 4 pixels or more."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, classes),
    )  # fmt: skip


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without weights (He et al., CVPR 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(y + shortcut)


def resnet20(channels: int, classes: int, size: int = 28) -> nn.Sequential:
    """He et al., CVPR 2016, section 4.2: 19 convolutions of 16, 32 and 64 channels and a linear layer."""
    blocks, inputs = [], 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        blocks += [_Block(inputs, width, stride), _Block(width, width, 1), _Block(width, width, 1)]
        inputs = width
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp, "dec": dec, "resnet20": resnet20,
    "small_convnet": lambda channels, classes, size: small_convnet(classes, channels),
}  # fmt: skip


def is_network(name: str) -> bool:
    """Whether the network exists.  Raises ImportError if it is of timm, and timm cannot be imported."""
    return name in NETWORKS or (name.startswith(TIMM) and _timm().is_model(name.removeprefix(TIMM)))


def transforms(name: str) -> tuple[int, Callable, Callable]:
    """Image preprocessing of a network: (size, training transform, evaluation transform).

    timm's networks define their own; the others get images of 32 x 32.
    """
    timm = _timm()
    if name.startswith(TIMM):
        about = {"pretrained_cfg": timm.get_pretrained_cfg(name.removeprefix(TIMM)).to_dict()}
    else:
        about = {"args": {"input_size": (3, 32, 32)}}
    wanted = timm.data.resolve_data_config(**about)
    return wanted["input_size"][-1], *(timm.data.create_transform(**wanted, is_training=b) for b in (True, False))


def build(name: str, shape: tuple[int, int, int], classes: int, seed: int, weights: str = "") -> nn.Module:
    """The network for images ``[C, H, W]``, with the initial weights that ``seed`` gives, or others.

    Those of the small networks are Gaussian (He et al., ICCV 2015), biases zero: with torch's own smaller ones,
    networks without batch norm start so slowly that a penalty can hold them at zero. timm's networks have timm's.

    Args:
        weights: ``timm``: pretrained, which timm downloads; or a safetensors file of the network.

    Raises:
        FileNotFoundError: no such file.  ValueError: it is damaged, or of another network.
    """
    torch.manual_seed(seed)
    if name.startswith(TIMM):
        name = name.removeprefix(TIMM)
        model = _timm().create_model(name, weights == "timm", num_classes=classes, in_chans=shape[0])
    else:
        model = _initialized(NETWORKS[name](shape[0], classes, shape[-1]))
    if weights not in ("", "timm"):
        try:
            load_model(model, weights)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{weights}: not this network's weights: {error}") from error
    return model


def _initialized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def last_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifier's layers, which every class needs a row of: of distilled networks there are two.

    timm's networks say what they are; of others it is the last linear layer.

    Raises:
        ValueError: there is none.
    """
    named = dict(model.named_modules())
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        parts = [part for part in (found if isinstance(found, tuple) else (found,)) if isinstance(part, nn.Module)]
    else:
        parts = [module for module in named.values() if isinstance(module, nn.Linear)][-1:]
    inside = {id(module) for part in parts for module in part.modules()}
    names = [name for name, module in named.items() if id(module) in inside and _has_matrix(module)]
    if not names:
        raise ValueError(f"wanted a network with a classifier of its own; {type(model).__name__} has none")
    return tuple(names)


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _timm():
    try:
        import timm.data
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError if it was made for another torch
        raise ImportError(f"timm cannot be imported ({error}): pip install 'compaware-kernels[timm]'") from error
    return timm
