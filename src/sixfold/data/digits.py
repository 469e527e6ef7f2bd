"""1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn.

A copy of the test half of https://archive.ics.uci.edu/dataset/80.
"""

from __future__ import annotations

import numpy as np
import torch

from sixfold.contracts import Batch
from sixfold.data._images import generated_images
from sixfold.data._kinds import LabelledExamples

_TRAIN, _BRIGHTEST = 1437, 16


def build() -> LabelledExamples:
    """Images (N, 1, 8, 8) in [0, 1]; 1,437 for training, 360 for validation, always the same.

    Raises ImportError without scikit-learn.

    >>> build().validation.inputs.shape
    torch.Size([360, 1, 8, 8])
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits need scikit-learn: pip install 'sixfold[images]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / _BRIGHTEST
    return _split(Batch(images, torch.from_numpy(labels).long()), _TRAIN)


def miniature(*, seed: int = 0) -> LabelledExamples:
    """Generated images (N, 1, 8, 8) in [0, 1]: 80 for training, 20 for validation."""
    images, labels = generated_images(seed, 100, 1, 8)
    return _split(Batch(images.float() / 255, labels), 80)


def _split(examples: Batch, train: int) -> LabelledExamples:
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(examples.inputs)))
    first, rest = (Batch(*(x[i] for x in examples)) for i in (order[:train], order[train:]))
    return LabelledExamples(first, rest, num_classes=10)
