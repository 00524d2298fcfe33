"""The demo's network."""

from __future__ import annotations

from torch import nn


def small_convnet(classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Three 3 x 3 convolutions and two linear layers; any image of 4 x 4 pixels or more."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, classes),
    )  # fmt: skip
