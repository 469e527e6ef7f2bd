"""What the image loaders share: standard channels, and generated pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch
from sixfold.data._kinds import LabelledExamples


def labelled_images(train: Batch, validation: Batch, num_classes: int) -> LabelledExamples:
    """Bytes (N, c, y, x) as float32: ``(x / 255 - mean) / std`` with the channels of `train`."""
    scaled = train.inputs.float() / 255
    std, mean = torch.std_mean(scaled, dim=(0, 2, 3), correction=0, keepdim=True)

    def standard(examples: Batch, pixels: Tensor) -> Batch:
        return Batch((pixels - mean) / std, examples.targets.long())

    return LabelledExamples(
        standard(train, scaled), standard(validation, validation.inputs.float() / 255), num_classes
    )


def generated_images(seed: int, count: int, channels: int, side: int) -> Batch:
    """Bytes (count, channels, side, side) of ten classes: class c lights row c and adds noise."""
    rng = np.random.default_rng(seed)
    labels = torch.arange(count) % 10
    pixels = torch.from_numpy(rng.integers(0, 64, (count, channels, side, side)))
    pixels[torch.arange(count), :, labels * side // 10] += 150
    return Batch(pixels.to(torch.uint8), labels)
