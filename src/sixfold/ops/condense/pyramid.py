"""The meta-tokens of a sequence at every scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sixfold.ops.condense import cells
from sixfold.ops.condense.groups import (
    Divergence,
    Tokens,
    apart,
    beginnings,
    condense,
    places,
    soft_places,
)

Keys = Callable[[Tensor], Tensor]
"""What a score keeps of moments (b, h, n, w)."""


class Rules(NamedTuple):
    """How a sequence condenses.

    block: tokens of a block, seen one by one by it and its neighbours; capacity: meta-tokens of a
    cell, at most; threshold: divergence below which neighbours agree, a number or (h, 1, 1);
    scales: how many there are, or None for as many as the sequence fills; temperature: of soft
    groups, or None for hard ones; sinks: first tokens that condense with no other, fewer than
    `capacity`; noisy: whether soft groups are drawn.
    """

    block: int
    capacity: int
    threshold: float | Tensor
    scales: int | None = None
    temperature: float | None = None
    sinks: int = 0
    noisy: bool = False


class Pyramid(NamedTuple):
    """Meta-tokens by scale, (b, h, cells, capacity), and which of the scale below are theirs.

    places[s] (b, h, cells, n, capacity): of the tokens of a cell of scale 0, or of the meta-tokens
    of both its halves, the share that is at each place, 0 of empty ones; () where that was not
    kept.
    """

    levels: tuple[Tokens, ...]
    places: tuple[Tensor, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """Cells by scale."""
        return tuple(level.size.shape[-2] for level in self.levels)

    def seen(self, first: int, *, is_causal: bool) -> tuple[tuple[int, ...], tuple[Tokens, ...]]:
        """By scale, the first cell that blocks from number `first` on see, and those from it on."""
        starts = cells.earliest(first, len(self.levels), is_causal=is_causal)
        rest = (level.after(start) for level, start in zip(self.levels, starts, strict=True))
        return starts, tuple(rest)


def condensed(below: Tokens, divergence: Divergence, rules: Rules) -> tuple[Tokens, Tensor]:
    """One scale from the one below: tokens (..., cells, n) as meta-tokens, and their places.

    Where hard groups begin is a decision: no gradient goes through it.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and rules.temperature is not None):
        distance = apart(below, divergence)
        if rules.temperature is None:
            begins = beginnings(distance, rules.threshold, rules.capacity)
            where = places(begins, rules.capacity, below.moments.dtype)
        else:
            noise = torch.zeros_like(distance)
            if rules.noisy:
                noise = torch.rand_like(distance).clamp(min=1e-6, max=1 - 1e-6).logit()
            given = (rules.threshold, rules.capacity, rules.temperature)
            where = soft_places(distance, *given, noise)
        where = where * (below.size > 0)[..., None]
    return condense(below, where), where


def build(
    tokens: Tokens, divergence: Divergence, rules: Rules, scales: int, *, is_causal: bool
) -> Pyramid:
    """Condense tokens (b, h, n) scale by scale: cells of one scale become half as many of the next.

    A cell is made of its own tokens alone, so nothing after its end can change it.
    """
    levels: list[Tokens] = []
    where: list[Tensor] = []
    below, width = tokens, rules.block
    for scale in range(scales):
        count = cells.num_cells(tokens.size.shape[-1], rules.block, scale, is_causal=is_causal)
        level, place = condensed(below.cells(width, count), divergence, rules)
        levels.append(level)
        where.append(place)
        below, width = level.joined(), 2 * rules.capacity
    return Pyramid(tuple(levels), tuple(where))


def shares(pyramid: Pyramid) -> list[Tensor]:
    """By scale, which part of each token is at which place of its cell, (b, h, cells, n, capacity).

    n: the tokens of a cell. Parts of a token that is there sum to 1.
    """
    found: list[Tensor] = []
    for where in pyramid.places:
        if found:
            below = found[-1]
            # both halves of a cell; what has no second half yet is not there
            both = below[..., : 2 * where.shape[-3], :, :]
            both = torch.nn.functional.pad(
                both, (0, 0, 0, 0, 0, 2 * where.shape[-3] - both.shape[-3])
            )
            halves = where.unflatten(-2, (2, -1)).flatten(-4, -3)
            found.append((both @ halves).unflatten(-3, (-1, 2)).flatten(-3, -2))
        else:
            found.append(where)
    return found
