"""A simulator of fields on a periodic grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from sixfold.models._block import blocks, given

HEAD_STD = 0.02


class PhysicsSimulator(nn.Module):
    """One step of a field on the torus: u(t + dt) = u(t) + f(u(t)), dt being that of the data.

    Patches are read by a convolution that overlaps and wraps around, and the only positions are
    learned terms on the logits, one per head and offset on the torus. A field shifted by a multiple
    of the patch is therefore answered by the same answer, shifted. No norm stands before the head,
    so that the field's own scale can pass.

    Args:
        channels: channels of the field.
        grid_size: points along each of the two axes.
        patch: points along each side of a patch; divides grid_size.
        d_model: width.
        num_layers: blocks.
        attention: options of `MultiHeadAttention`, for all layers or one mapping per layer.
        mlp_ratio: hidden width of the MLP over d_model.

    Raises:
        ValueError: for a grid_size that is no multiple of patch, and for other fields.

    Source: Liu et al., Swin Transformer, arXiv 2103.14030, eq. 4 (relative bias), here periodic.

    >>> model = PhysicsSimulator(channels=1, grid_size=16)
    >>> model.rollout(torch.zeros(2, 1, 16, 16), steps=3).shape
    torch.Size([2, 3, 1, 16, 16])
    """

    def __init__(
        self,
        channels: int,
        grid_size: int,
        patch: int = 2,
        d_model: int = 64,
        num_layers: int = 2,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {"num_heads": 4},
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.arguments = given(locals())
        if patch < 1 or grid_size < 1 or grid_size % patch:
            raise ValueError(f"grid_size must be a multiple of patch, got {grid_size} and {patch}")
        self.patch, side = patch, grid_size // patch
        self.field_shape = (channels, grid_size, grid_size)
        self.patches = nn.Conv2d(
            channels, d_model, 3 * patch, stride=patch, padding=patch, padding_mode="circular"
        )
        self.blocks = blocks(num_layers, d_model, attention, mlp_ratio, dropout=0.0)
        self.offsets = nn.ParameterList(
            torch.zeros(block.attention.heads.num_heads, side**2) for block in self.blocks
        )
        self.head = nn.Linear(d_model, channels * patch**2)
        self.register_buffer("pairs", torus_offsets(side), persistent=False)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, field: Tensor) -> Tensor:
        """The next field (b, channels, grid_size, grid_size) of fields of that shape."""
        if field.ndim != 4 or field.shape[1:] != self.field_shape:
            raise ValueError(
                f"fields must be (b, {', '.join(map(str, self.field_shape))}), "
                f"got {tuple(field.shape)}"
            )
        x = self.patches(field)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        for block, offsets in zip(self.blocks, self.offsets, strict=True):
            x = block(x, attn_mask=offsets[:, self.pairs][None])
        change = self.head(x).transpose(1, 2).unflatten(2, (side, side))
        return field + pixel_shuffle(change, self.patch)

    def rollout(self, u0: Tensor, steps: int) -> Tensor:
        """The `steps` fields that follow u0, each from the one before: (b, steps, c, s, s)."""
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        fields = [self(u0)]
        for _ in range(steps - 1):
            fields.append(self(fields[-1]))
        return torch.stack(fields, dim=1)

    def outer_flops(self, tokens: int) -> int:
        """FLOPs of the patches and of the head, for one field."""
        return 2 * tokens * (self.patches.weight.numel() + self.head.weight.numel())


def torus_offsets(side: int) -> Tensor:
    """For tokens i, j of a side x side torus, the number of the offset j - i: (side^2, side^2).

    >>> torus_offsets(2)[3]
    tensor([3, 2, 1, 0])
    """
    place = torch.arange(side)
    step = (place[None, :] - place[:, None]) % side
    rows, columns = step[:, None, :, None], step[None, :, None, :]
    return (rows * side + columns).reshape(side**2, side**2)


build = PhysicsSimulator
