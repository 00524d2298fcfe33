"""The demo's images: scikit-learn's digits, or Fashion-MNIST (any IDX data set in its four files) from a folder."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Images", "digits", "idx_folder"]


@dataclass
class Images:
    """Images ``[N, 1, H, W]``, standardised by the training images' mean and deviation, and class labels ``[N]``."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Images:
    """1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn (Alpaydin & Kaynak, 1998); 40 % held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    split = train_test_split(data.images, data.target, test_size=0.4, stratify=data.target, random_state=0)
    train_x, test_x, train_y, test_y = split
    return _images("scikit-learn digits, 8 x 8", train_x, train_y, test_x, test_y)


def idx_folder(folder: Path) -> Images:
    """The train and t10k images and labels in IDX files of ``folder``, as MNIST and Fashion-MNIST come, gzipped or not.

    Raises:
        FileNotFoundError: a file is missing.  ValueError: a file is not IDX, damaged, or does not fit the others.
    """
    parts = [_read(folder, f"{split}-{kind}") for split in ("train", "t10k")
             for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]  # fmt: skip
    train_x, train_y, test_x, test_y = parts
    for x, y, split in ((train_x, train_y, "train"), (test_x, test_y, "t10k")):
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
            raise ValueError(
                f"{folder}: {split}: wanted N images and N labels; got {list(x.shape)} and {list(y.shape)}"
            )
    return _images(f"{folder.resolve().name}, {train_x.shape[1]} x {train_x.shape[2]}", *parts)


def _read(folder: Path, name: str) -> np.ndarray:
    """One IDX file of unsigned bytes: magic 0, 0, 8, number of axes; the sizes, big-endian; the bytes."""
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    opener = gzip.open if path.suffix == ".gz" else open
    if not path.is_file():
        raise FileNotFoundError(f"{folder / name}: no such file, nor {name}.gz")
    try:
        with opener(path, "rb") as file:
            raw = file.read()
        (axes,) = struct.unpack_from(">3xB", raw)
        shape = struct.unpack_from(f">{axes}I", raw, 4)
        if raw[:3] != b"\0\0\x08":
            raise ValueError(f"it starts with {raw[:4].hex()}")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not an IDX file of bytes, or damaged: {error}") from error


def _images(name: str, train_x, train_y, test_x, test_y) -> Images:
    train, test = (torch.as_tensor(np.array(x), dtype=torch.float32)[:, None] for x in (train_x, test_x))
    mean, deviation = train.mean(), train.std()
    labels = (torch.as_tensor(np.array(y), dtype=torch.int64) for y in (train_y, test_y))
    train_y, test_y = labels
    return Images(name, (train - mean) / deviation, train_y, (test - mean) / deviation, test_y)
