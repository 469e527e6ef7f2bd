"""Neighbours in consensus condense: what a group of tokens becomes, and where groups begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Of moments (..., w) and (..., w): (...), symmetric, 0 where they agree."""


class Tokens(NamedTuple):
    """Tokens, or the meta-tokens that stand for them.

    moments (..., n, w), whose mean over a group describes the group; value (..., n, d_v);
    size (..., n): how many tokens each stands for, 0 where a place is empty.
    """

    moments: Tensor
    value: Tensor
    size: Tensor

    def cells(self, width: int, count: int) -> Tokens:
        """The first `count` cells of `width` places: (..., n, w) to (..., count, width, w).

        Places beyond the end are empty.
        """
        missing = count * width - self.size.shape[-1]
        moments, value = (
            pad(t, (0, 0, 0, missing)).unflatten(-2, (count, width))
            for t in (self.moments, self.value)
        )
        return Tokens(moments, value, pad(self.size, (0, missing)).unflatten(-1, (count, width)))

    def after(self, cell: int) -> Tokens:
        """The cells from number `cell` on."""
        return Tokens(
            self.moments[..., cell:, :, :], self.value[..., cell:, :, :], self.size[..., cell:, :]
        )

    def packed(self) -> Tensor:
        """Every cell as one row, (..., cells, places (w + d_v + 1))."""
        parts = (self.moments, self.value.to(self.moments.dtype), self.size[..., None])
        return torch.cat(parts, dim=-1).flatten(-2)

    @staticmethod
    def unpacked(rows: Tensor, places: int, like: Tokens) -> Tokens:
        """The inverse of `packed`; widths and dtype of values are those of `like`."""
        widths = [like.moments.shape[-1], like.value.shape[-1], 1]
        moments, value, size = rows.unflatten(-1, (places, -1)).split(widths, dim=-1)
        return Tokens(moments, value.to(like.value.dtype), size[..., 0])

    def joined(self) -> Tokens:
        """The places of all cells in one row: the inverse of `cells`."""
        moments, value = (t.flatten(-3, -2) for t in (self.moments, self.value))
        return Tokens(moments, value, self.size.flatten(-2))


def apart(tokens: Tokens, divergence: Divergence) -> Tensor:
    """How far each token is from the one before it in its cell, (..., n).

    Empty places are passed over and get -inf, the first token of a cell inf.
    """
    there = tokens.size > 0
    places = torch.arange(tokens.size.shape[-1], device=there.device).expand(there.shape)
    latest = torch.where(there, places, -1).cummax(-1).values
    previous = pad(latest[..., :-1], (1, 0), value=-1)
    index = previous.clamp(min=0)[..., None].expand(tokens.moments.shape)
    found = divergence(tokens.moments, tokens.moments.gather(-2, index))
    return found.masked_fill(previous < 0, torch.inf).masked_fill(~there, -torch.inf)


def beginnings(apart: Tensor, threshold: float | Tensor, capacity: int) -> Tensor:
    """Where a group begins, (..., n): at the first token, and where neighbours do not agree.

    Consensus is strict: neighbours at exactly the threshold stay apart. Of more than `capacity`
    groups those merge whose neighbours are closest.
    """
    first = apart.isposinf()
    if capacity == 1:
        return first
    inner = apart.masked_fill(first, -torch.inf)
    kept = min(capacity - 1, inner.shape[-1])
    farthest = inner.topk(kept, dim=-1).indices
    chosen = torch.zeros_like(first).scatter_(-1, farthest, value=True)
    return first | (chosen & (inner >= threshold) & ~inner.isneginf())


def condense(tokens: Tokens, begins: Tensor, capacity: int) -> tuple[Tokens, Tensor]:
    """Each group as one meta-token: the size-weighted means of moments and values.

    Args:
        tokens: (..., n) of a cell.
        begins: (..., n), where groups begin.
        capacity: places for the meta-tokens of a cell.

    Returns:
        The meta-tokens (..., capacity), and the place of each token's group, (..., n).
    """
    place = (begins.long().cumsum(-1) - 1).clamp(min=0)
    size = torch.zeros_like(tokens.size[..., :1].expand(*place.shape[:-1], capacity))
    size = size.scatter_add(-1, place, tokens.size)
    part = tokens.size / size.gather(-1, place).clamp(min=1)
    share = torch.zeros(*place.shape, capacity, dtype=tokens.moments.dtype, device=place.device)
    share = share.scatter(-1, place[..., None], part[..., None].to(share.dtype))
    moments = share.mT @ tokens.moments
    return Tokens(moments, share.mT @ tokens.value, size), place
