"""Near tokens and far meta-tokens under one softmax, a block of queries at a time, on SDPA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sixfold.contracts import Features
from sixfold.ops.attend.features import columns, equal_widths
from sixfold.ops.condense import cells
from sixfold.ops.condense.groups import Tokens
from sixfold.ops.condense.pyramid import Keys, Pyramid, Rules

EMPTY = {torch.float16: -1e4}
"""Logit of a place that nothing is in, far below what a dtype's logits can be: -1e30 elsewhere."""


def in_blocks(tokens: Tensor, block: int, front: int = 0) -> Tensor:
    """(..., m, w) to (..., blocks, block, w), zeros at `front` and at the end."""
    behind = -(front + tokens.shape[-2]) % block
    return pad(tokens, (0, 0, front, behind)).unflatten(-2, (-1, block))


def filled(key: Tensor, value: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (..., w) with the logarithm of their size (...), and values; zeros in empty places.

    What an empty place held, padding say, must not come near a product. A query that sees empty
    places alone reads zeros.
    """
    empty = (size == 0)[..., None]
    key, value = key.masked_fill(empty, 0.0), value.masked_fill(empty, 0.0)
    own = size[..., None].masked_fill(empty, 1.0).log()
    own = own.masked_fill(empty, EMPTY.get(key.dtype, -1e30))
    rounded = own.to(key.dtype)
    rest = [(own - rounded.to(own.dtype)).to(key.dtype)] * (columns(key.dtype) - 1)
    return torch.cat([key, rounded, *rest], dim=-1), value


def beside(places: Tensor, first: int, *, is_causal: bool) -> Tensor:
    """Each block from `first` on with its neighbours: (..., blocks, near places, w)."""
    after = 0 if is_causal else cells.NEAR
    padded = pad(places, (0, 0, 0, 0, cells.NEAR, after))
    count = places.shape[-3] - first
    near = [padded.narrow(-3, first + shift, count) for shift in range(cells.NEAR + 1 + after)]
    return torch.cat(near, dim=-2)


def seen(first: int, num_blocks: int, block: int, *, is_causal: bool) -> Tensor:
    """Which near places a query sees, (blocks, block, near places)."""
    number = torch.arange(first, num_blocks, device="cpu")[:, None, None]
    query = number * block + torch.arange(block, device="cpu")[:, None]
    near = (cells.NEAR + 1 + (0 if is_causal else cells.NEAR)) * block
    key = (number - cells.NEAR) * block + torch.arange(near, device="cpu")
    inside = (key >= 0) & (key < num_blocks * block)
    return inside & (key <= query) if is_causal else inside.expand(-1, block, -1)


def attend(
    rating: Features,
    keys: Keys,
    tokens: Tokens,
    pyramid: Pyramid,
    rules: Rules,
    *,
    is_causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax of the reference's logits over the values, (b, h, n, d_v), never held.

    Cost n (near places + capacity cells), where a query sees O(log m) cells.
    """
    query, key, scale = rating
    n, m, block = query.shape[-2], key.shape[-2], rules.block
    num_blocks, first = -(-m // block), (m - n) // block
    ones = query.new_full((1,), 1 / scale).expand(*query.shape[:-1], columns(query.dtype))
    query = in_blocks(torch.cat([query, ones], -1), block, front=(m - n) % block)
    skip = max(first - cells.NEAR, 0) if is_causal else 0  # blocks that none sees token by token
    parts = (key, tokens.value, tokens.size[..., None])
    *both, size = (in_blocks(part[..., skip * block :, :], block) for part in parts)
    near = filled(*both, size[..., 0])
    key, value = (beside(part, first - skip, is_causal=is_causal) for part in near)
    mask = seen(first, num_blocks, block, is_causal=is_causal)
    starts, levels = pyramid.seen(first, is_causal=is_causal)
    table = cells.table(query, first, num_blocks, pyramid.counts, starts, is_causal)
    if table.numel():
        flat = [level.joined() for level in levels]
        ready = [filled(keys(t.moments), t.value, t.size) for t in flat]
        far = [picked(parts, table, rules.capacity) for parts in zip(*ready, strict=True)]
        key, value = torch.cat([key, far[0]], -2), torch.cat([value, far[1]], -2)
        there = (table >= 0).repeat_interleave(rules.capacity, 1)
        mask = torch.cat([mask.to(query.device), there[:, None].expand(-1, block, -1)], -1)
    out = joined(query, key, value, mask.to(query.device), scale, dropout)
    front = (m - n) % block
    return out[..., front : front + n, : tokens.value.shape[-1]]


def picked(levels: tuple[Tensor, ...], table: Tensor, capacity: int) -> Tensor:
    """Cells as each block sees them: (b, h, cells * capacity, w) to (b, h, blocks, places, w)."""
    index = table.clamp(min=0).flatten()
    chosen = torch.cat(levels, dim=2).unflatten(2, (-1, capacity)).index_select(2, index)
    return chosen.unflatten(2, table.shape).flatten(3, 4)


def joined(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float
) -> Tensor:
    """One softmax for every block of queries: (b, h, blocks, places, w) to (b, h, n, d_v)."""
    batch, _, count = query.shape[:3]
    parts = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    query, key, value = equal_widths(*parts)
    mask = mask[:, None].repeat(batch, 1, 1, 1)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
