"""Networks whose inference is benchmarked, in plain torch.nn: ResNet-18 and -50 (He et al., 2016), VGG-16 without its
classifier of 120 million weights (Simonyan & Zisserman, 2015), MobileNetV2 (Sandler et al., 2018), a BERT encoder
(Devlin et al., 2019), and ViT-B/16 (Dosovitskiy et al., 2021)."""

import torch
from torch import Tensor, nn

from bench.common.workloads import BASIC, BOTTLENECK


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution with "same" padding, followed by batch norm."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Block(nn.Module):
    """ResNet block: two 3x3 convolutions (basic), or 1x1, 3x3 and 1x1 to four times the width, with a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, basic: bool):
        super().__init__()
        outputs = width if basic else 4 * width
        if basic:
            first = [*conv(inputs, width, 3, stride), nn.ReLU()]
        else:
            first = [*conv(inputs, width, 1), nn.ReLU(), *conv(width, width, 3, stride), nn.ReLU()]
        self.body = nn.Sequential(*first, *conv(width, outputs, 3 if basic else 1))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(stages: tuple[tuple[int, int, int], ...], basic: bool) -> nn.Module:
    blocks, inputs = [], 64
    for i, (count, width, _) in enumerate(stages):
        for j in range(count):
            blocks.append(Block(inputs, width, 2 if i and not j else 1, basic))
            inputs = width if basic else 4 * width
    stem = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def resnet18() -> nn.Module:
    return resnet(BASIC, basic=True)


def resnet50() -> nn.Module:
    return resnet(BOTTLENECK, basic=False)


def vgg16() -> nn.Module:
    layers, inputs = [], 3
    for count, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            layers += [*conv(inputs, width, 3), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Inverted(nn.Module):
    """Inverted residual of MobileNetV2: 1x1 to six times the channels, depthwise 3x3, 1x1 back."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        wide = 6 * inputs
        self.body = nn.Sequential(
            *conv(inputs, wide, 1), nn.ReLU6(), *conv(wide, wide, 3, stride, groups=wide), nn.ReLU6(),
            *conv(wide, outputs, 1),
        )  # fmt: skip
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet() -> nn.Module:
    layers, inputs = [*conv(3, 32, 3, 2), nn.ReLU6()], 32
    for count, width, stride in ((1, 16, 1), (2, 24, 2), (3, 32, 2), (4, 64, 2), (3, 96, 1), (3, 160, 2), (1, 320, 1)):
        for j in range(count):
            layers.append(Inverted(inputs, width, 1 if j else stride))
            inputs = width
    layers += [*conv(inputs, 1280, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


class Encoder(nn.Module):
    """Transformer encoder layer, post-norm: attention and an MLP with GELU, each with a residual connection."""

    def __init__(self, width: int = 768, heads: int = 12):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.act = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.GELU()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(self.output(heads.transpose(1, 2).flatten(2)) + x)
        return self.norm2(self.down(self.act(self.up(x))) + x)


def bert(layers: int = 4) -> nn.Module:
    return nn.Sequential(*(Encoder() for _ in range(layers)))


class Patches(nn.Module):
    """Patch embedding: images [N, 3, 224, 224] -> [N, 196, width], one vector for each 16 x 16 pixels."""

    def __init__(self, width: int = 768):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vit_b() -> nn.Module:
    return nn.Sequential(Patches(), *bert(12), Mean(), nn.Linear(768, 1000))
