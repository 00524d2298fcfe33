"""Image data sets of a study: in memory (digits, IDX files) or image folders, with a validation split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .config import Config
from .images import Images, digits, idx_folder
from .networks import transforms

__all__ = ["Batches", "Folder", "InMemory", "Source", "load"]

Batches = Iterable[tuple[Tensor, Tensor]]
MANY = 512  # images per batch in evaluation


class Source(Protocol):
    """Labelled images ``[N, C, H, W]``, on the device where they are used.

    Validation images are a share of the training images, always the same ones, that no training sees.

    Attributes:
        shape: ``(C, H, W)``.  examples: how many there are to train on.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    examples: int

    def train(self, batch: int, seed: int, epoch: int) -> Batches:
        """The training images, in the order that seed and epoch give."""

    def validation(self) -> Batches: ...

    def test(self) -> Batches: ...

    def example(self, count: int) -> Tensor:
        """The first test images."""


class InMemory:
    """:class:`Source` of image tensors ``[N, C, H, W]`` in memory."""

    def __init__(self, images: Images, share: float, device: torch.device | str = "cpu"):
        held, rest = _split(len(images.train_x), share)
        x, y = images.train_x, images.train_y
        self.name, self.shape, self.classes = images.name, tuple(x.shape[1:]), int(y.max()) + 1
        self.train_x, self.train_y = x[rest].to(device), y[rest].to(device)
        self.held_x, self.held_y = x[held].to(device), y[held].to(device)
        self.test_x, self.test_y = images.test_x.to(device), images.test_y.to(device)
        self.examples = len(rest)

    def train(self, batch: int, seed: int, epoch: int) -> Batches:
        order = torch.randperm(self.examples, generator=_generator(seed, epoch)).to(self.train_x.device)
        return ((self.train_x[part], self.train_y[part]) for part in order.split(batch))

    def validation(self) -> Batches:
        return zip(self.held_x.split(MANY), self.held_y.split(MANY), strict=True)

    def test(self) -> Batches:
        return zip(self.test_x.split(MANY), self.test_y.split(MANY), strict=True)

    def example(self, count: int) -> Tensor:
        return self.test_x[:count]


class Folder:
    """A :class:`Source` of ``train/CLASS/IMAGE`` and ``val/CLASS/IMAGE``, as ImageNet comes; ``val`` is the test.

    Images are read by torchvision, in other processes; cropped, mirrored (in training) and scaled by timm, as the
    network wants them.

    Raises:
        ValueError: there are other classes in ``val`` than in ``train``.  FileNotFoundError: no ``val``, or a class
            without images.  ImportError: timm or torchvision cannot be imported.
    """

    def __init__(self, path: Path, config: Config, device: torch.device | str = "cpu"):
        self.size, augmented, plain = transforms(config.network)
        from torchvision.datasets import ImageFolder

        train, same, test = (ImageFolder(path / part, how) for part, how in
                             (("train", augmented), ("train", plain), ("val", plain)))  # fmt: skip
        if train.classes != test.classes:
            other = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"{path}: wanted the same classes in train and val; only one has {', '.join(other[:5])}")
        held, rest = _split(len(train), config.validation)
        self._train, self._held = (torch.utils.data.Subset(*part) for part in ((train, rest), (same, held)))
        self._test, self._workers, self._device = test, config.workers, torch.device(device)
        self.name = f"{path.resolve().name}, {self.size} x {self.size}"
        self.shape, self.classes, self.examples = (3, self.size, self.size), len(train.classes), len(rest)

    def _batches(self, images, size: int, **options) -> Iterator[tuple[Tensor, Tensor]]:
        pinned = self._device.type == "cuda"
        loader = torch.utils.data.DataLoader(images, size, num_workers=self._workers, pin_memory=pinned, **options)
        for x, y in loader:
            yield x.to(self._device, non_blocking=pinned), y.to(self._device, non_blocking=pinned)

    def train(self, batch: int, seed: int, epoch: int) -> Batches:
        return self._batches(self._train, batch, shuffle=True, generator=_generator(seed, epoch))

    def validation(self) -> Batches:
        return self._batches(self._held, MANY)

    def test(self) -> Batches:
        return self._batches(self._test, MANY)

    def example(self, count: int) -> Tensor:
        found = [self._test[i % len(self._test)][0] for i in range(count)]
        return torch.stack(found).to(self._device)


def load(config: Config, device: torch.device | str = "cpu") -> Source:
    """Data set that ``config.data`` names: ``digits``, a folder of IDX files, or one with ``train`` and ``val``.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.  ValueError: a file is damaged.
    """
    if config.data == "digits":
        return InMemory(digits(), config.validation, device)
    folder = Path(config.data)
    if not folder.is_dir():
        wanted = "digits, a folder of IDX files, or one of train/CLASS/IMAGE and val/CLASS/IMAGE"
        raise FileNotFoundError(f"{folder}: no such folder; wanted {wanted}")
    if (folder / "train").is_dir():
        return Folder(folder, config, device)
    return InMemory(idx_folder(folder), config.validation, device)


def _split(count: int, share: float) -> tuple[list[int], list[int]]:
    """Fixed random split of indices: (validation, training).  Raises ValueError if either is empty."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = round(share * count)
    if not 0 < held < count:
        raise ValueError(f"validation: wanted a share of the {count} training images that leaves some to train on and "
                         f"some to choose on; got {share}, which is {held} to choose on")  # fmt: skip
    return order[:held], order[held:]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
