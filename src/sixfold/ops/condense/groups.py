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

    def cells(self, width: int, count: int, first: int = 0) -> Tokens:
        """Cells `first` to `count` of `width` places each: (..., n, w) to (..., cells, width, w).

        Places beyond the end are empty.
        """
        start, missing = first * width, count * width - self.size.shape[-1]
        moments, value = (
            pad(t[..., start:, :], (0, 0, 0, missing)).unflatten(-2, (count - first, width))
            for t in (self.moments, self.value)
        )
        size = pad(self.size[..., start:], (0, missing)).unflatten(-1, (count - first, width))
        return Tokens(moments, value, size)

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

    Empty places are passed over and get -inf, the first token of a cell inf, as what no divergence
    lets agree.
    """
    there = tokens.size > 0
    places = torch.arange(tokens.size.shape[-1], device=there.device).expand(there.shape)
    latest = torch.where(there, places, -1).cummax(-1).values
    previous = pad(latest[..., :-1], (1, 0), value=-1)
    index = previous.clamp(min=0)[..., None].expand(tokens.moments.shape)
    found = divergence(tokens.moments, tokens.moments.gather(-2, index))
    return found.masked_fill(previous < 0, torch.inf).masked_fill(~there, -torch.inf)


def beginnings(apart: Tensor, threshold: float | Tensor, capacity: int) -> Tensor:
    """Where a group begins, (..., n): wherever it is infinitely far, and where neighbours disagree.

    Consensus is strict: neighbours at exactly the threshold stay apart. Of more than `capacity`
    groups those merge whose neighbours are closest.
    """
    farthest = apart.topk(min(capacity, apart.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(apart, dtype=torch.bool).scatter_(-1, farthest, value=True)
    return apart.isposinf() | (chosen & (apart >= threshold))


def places(begins: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """The place of each token's group among `capacity`, as ones and zeros (..., n, capacity)."""
    number = (begins.long().cumsum(-1) - 1).clamp(min=0)
    return torch.nn.functional.one_hot(number, capacity).to(dtype)


def soft_places(
    apart: Tensor, threshold: float | Tensor, capacity: int, temperature: float, noise: Tensor
) -> Tensor:
    """The same where groups begin with a probability, so that gradients decide.

    b_t = sigmoid((log apart_t - log threshold + noise_t) / temperature), 1 at the first token; with
    c_t = sum over s <= t of b_s - 1 a token is at place g with weight softmax over g of
    -(c_t - g)^2 / temperature. A prefix sum sees no later token. At temperature 0 these are the
    places of `beginnings`, as far as there is room; tokens beyond share the last place.

    Args:
        apart: of neighbours, (..., n), as `apart` gives it.
        threshold: positive; broadcast to `apart`.
        capacity: places.
        temperature: positive.
        noise: (..., n), logistic where places are drawn and 0 where they are expected.

    Source: Maddison, Mnih, Teh, The Concrete Distribution, arXiv 1611.00712, section 3.3 (binary
    concrete); Jang, Gu, Poole, arXiv 1611.01144.
    """
    threshold = torch.as_tensor(threshold, dtype=apart.dtype, device=apart.device)
    least = torch.finfo(apart.dtype).tiny
    inner = apart.clamp(min=least, max=1 / least).log() - threshold.log()
    begins = ((inner + noise) / temperature).sigmoid()
    begins = begins.masked_fill(apart.isposinf(), 1.0).masked_fill(apart.isneginf(), 0.0)
    number = (begins.cumsum(-1) - 1).clamp(max=capacity - 1)
    place = torch.arange(capacity, device=apart.device)
    return (-(number[..., None] - place).square() / temperature).softmax(-1)


def condense(tokens: Tokens, places: Tensor) -> Tokens:
    """Each group as one meta-token: the size-weighted means of moments and values.

    tokens (..., n) and their places (..., n, capacity) to meta-tokens (..., capacity).
    """
    share = places * tokens.size[..., None].to(places.dtype)
    size = share.sum(-2)
    share = (share / size.clamp(min=torch.finfo(size.dtype).tiny)[..., None, :]).mT
    moments = share.to(tokens.moments.dtype) @ tokens.moments
    value = share.to(tokens.value.dtype) @ tokens.value
    return Tokens(moments, value, size.to(tokens.size.dtype))
