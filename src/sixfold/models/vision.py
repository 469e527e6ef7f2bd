"""A vision transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_whole
from sixfold.models._block import blocks, given

POSITION_STD = 0.02


class VisionTransformer(nn.Module):
    """Patches as tokens, bidirectional blocks, the mean of all tokens, and a linear head.

    x_yx = W_patch patch_yx + row_y + column_x,  logits = W mean(norm(h)) + b

    Args:
        image_size: height and width of the square images.
        patch_size: height and width of a patch; divides image_size.
        num_classes: number of classes.
        channels: channels of the images.
        d_model: width.
        num_layers: blocks.
        attention: options of `MultiHeadAttention`, for all layers or one mapping per layer.
        mlp_ratio: hidden width of the MLP over d_model.
        dropout: probability of dropping a residual update.

    Raises:
        ValueError: for sizes below 1, an image_size that is no multiple of patch_size, and for
            other images.

    Source: Dosovitskiy et al., arXiv 2010.11929; mean pooling as in Beyer et al., arXiv 2205.01580.

    >>> model = VisionTransformer(image_size=28, patch_size=4, num_classes=10)
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(  # noqa: PLR0913 - four sizes of the data, then what all models share
        self,
        image_size: int,
        patch_size: int,
        num_classes: int,
        channels: int = 1,
        d_model: int = 64,
        num_layers: int = 4,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {"num_heads": 4},
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.arguments = given(locals())
        check_whole(image_size=image_size, patch_size=patch_size)
        check_whole(num_classes=num_classes, channels=channels, d_model=d_model)
        if image_size % patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}"
            )
        side = image_size // patch_size
        self.image_shape = (channels, image_size, image_size)
        self.patches = nn.Conv2d(channels, d_model, patch_size, stride=patch_size)
        self.row = nn.Parameter(torch.empty(side, 1, d_model))
        self.column = nn.Parameter(torch.empty(1, side, d_model))
        self.drop = nn.Dropout(dropout)
        self.blocks = blocks(num_layers, d_model, attention, mlp_ratio, dropout)
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, num_classes)
        for position in (self.row, self.column):
            nn.init.normal_(position, std=POSITION_STD)
        nn.init.normal_(self.head.weight, std=d_model**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (b, channels, image_size, image_size)."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must be (b, {', '.join(map(str, self.image_shape))}), "
                f"got {tuple(images.shape)}"
            )
        x = self.patches(images).permute(0, 2, 3, 1) + self.row + self.column
        x = self.drop(x.flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))

    def outer_flops(self, tokens: int) -> int:
        """FLOPs of the patches and of the head, for one image."""
        return 2 * tokens * self.patches.weight.numel() + 2 * self.head.weight.numel()


build = VisionTransformer
