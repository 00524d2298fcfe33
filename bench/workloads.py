"""What is measured: layer shapes as data. Run as a script, prints this machine's device name for a file name."""

import re

import torch

from compaware_kernels.info import info

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ResNet-50, He et al. 2016: (blocks, width, input channels) of each stage; a block is 1x1, 3x3, 1x1 to 4 x width.
STAGES = ((3, 64, 64), (4, 128, 256), (6, 256, 512), (3, 512, 1024))


def resnet50() -> list[tuple[int, int]]:
    """The 53 convolutions and the classifier as matrices of neurons [O, C k k]: 25.5 million parameters."""
    shapes = [(64, 3 * 49)]
    for blocks, width, inputs in STAGES:
        shapes.append((4 * width, inputs))  # the shortcut
        for _ in range(blocks):
            shapes += [(width, inputs), (width, 9 * width), (4 * width, width)]
            inputs = 4 * width
    return [*shapes, (1000, 2048)]


def device_name() -> str:
    return info()["devices"][-1]


if __name__ == "__main__":
    print(re.sub(r"\W+", "-", device_name().lower()).strip("-"))
