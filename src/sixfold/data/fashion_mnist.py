"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28, ten classes.

Xiao et al. 2017, https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch
from sixfold.data._images import generated_images, labelled_images
from sixfold.data._kinds import LabelledExamples
from sixfold.data._root import find
from sixfold.errors import DataError

FILES = tuple(
    f"fashion-mnist/{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
HOME = "https://github.com/zalandoresearch/fashion-mnist"


def build() -> LabelledExamples:
    """Images (N, 1, 28, 28), standardised; 60,000 for training, 10,000 for validation.

    Raises DataMissing without the four files ``fashion-mnist/*.gz``, DataError for a broken one.
    """
    return labelled_images(_read("train", 60_000), _read("t10k", 10_000), num_classes=10)


def miniature(*, seed: int = 0) -> LabelledExamples:
    """Generated images (N, 1, 28, 28), standardised: 80 for training, 20 for validation."""
    train, validation = (generated_images(seed + i, n, 1, 28) for i, n in enumerate((80, 20)))
    return labelled_images(train, validation, num_classes=10)


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Bytes of `shape` from a gzipped idx file: two zeros, 8 for bytes, the rank, the sizes.

    Raises DataError when the file holds anything else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file; get it again from {HOME}") from error
    sizes = b"".join(size.to_bytes(4, "big") for size in shape)
    header = bytes((0, 0, 8, len(shape))) + sizes
    if not content.startswith(header) or len(content) != len(header) + math.prod(shape):
        raise DataError(f"{path} does not hold bytes of shape {shape}; get it again from {HOME}")
    # a copy, since torch wants memory that it may write
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=len(header)).copy()).view(shape)


def _read(part: str, count: int) -> Batch:
    images = find(f"fashion-mnist/{part}-images-idx3-ubyte.gz", HOME)
    labels = find(f"fashion-mnist/{part}-labels-idx1-ubyte.gz", HOME)
    return Batch(read_idx(images, (count, 28, 28))[:, None], read_idx(labels, (count,)))
