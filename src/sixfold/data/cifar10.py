"""CIFAR-10's test images: 10,000 colour pictures, 32 x 32, ten classes, cut 8,000 to 2,000.

Only the official *test* images are used, so an accuracy here does not compare with the published
ones, which train on the other 50,000. Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import zipfile

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch
from sixfold.data._images import generated_images, labelled_images
from sixfold.data._kinds import LabelledExamples
from sixfold.data._root import find
from sixfold.errors import DataError

FILES = ("cifar10-test/cifar10_test_from_bigbench.npz",)
HOME = (
    "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version's test_batch.bin, saved by "
    "numpy.savez as X (10000, 32, 32, 3) and y (10000,), both uint8)"
)
_SHAPE = (10_000, 32, 32, 3)


def build() -> LabelledExamples:
    """Images (N, 3, 32, 32), standardised: of the 10,000 test images 8,000 train, 2,000 validate.

    Of each class's 1,000 images every fifth is for validation.

    Raises DataMissing without the file, DataError when it holds something else.
    """
    path = find(FILES[0], HOME)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            pixels, labels = content["X"], content["y"]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no arrays X and y; get it again from {HOME}") from error
    kinds = {pixels.dtype, labels.dtype}
    if pixels.shape != _SHAPE or labels.shape != _SHAPE[:1] or kinds != {np.dtype(np.uint8)}:
        raise DataError(
            f"{path} must hold bytes X {_SHAPE} and y {_SHAPE[:1]}, not X {pixels.shape} "
            f"{pixels.dtype} and y {labels.shape} {labels.dtype}"
        )
    return _cut(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels))


def miniature(*, seed: int = 0) -> LabelledExamples:
    """Generated images (N, 3, 32, 32), standardised: 80 for training, 20 for validation."""
    return _cut(*generated_images(seed, 100, 3, 32))


def _cut(images: Tensor, labels: Tensor) -> LabelledExamples:
    order = labels.argsort(stable=True)
    held_out = torch.arange(len(order)) % 5 == 4
    train, validation = (Batch(images[i], labels[i]) for i in (order[~held_out], order[held_out]))
    return labelled_images(train, validation, num_classes=10)
