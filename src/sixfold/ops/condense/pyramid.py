"""The meta-tokens of a sequence at every scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sixfold.ops.condense import cells
from sixfold.ops.condense.groups import Divergence, Tokens, apart, beginnings, condense

Keys = Callable[[Tensor], Tensor]
"""What a score keeps of moments (b, h, n, w)."""


class Rules(NamedTuple):
    """How a sequence condenses.

    block: tokens of a block, seen one by one by it and its neighbours; capacity: meta-tokens of a
    cell, at most; threshold: divergence below which neighbours agree; scales: how many there are,
    or None for as many as the sequence fills.
    """

    block: int
    capacity: int
    threshold: float
    scales: int | None = None


class Pyramid(NamedTuple):
    """Meta-tokens by scale, (b, h, cells, capacity); places: where each token's group is.

    places[s] (b, h, n): the place of a token's group within its cell of scale s; 0 where that cell
    is not there yet.
    """

    levels: tuple[Tokens, ...]
    places: tuple[Tensor, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Cells by scale."""
        return tuple(level.size.shape[-2] for level in self.levels)


def condensed(below: Tokens, divergence: Divergence, rules: Rules) -> tuple[Tokens, Tensor]:
    """One scale from the one below: tokens (..., cells, places) of each cell as meta-tokens.

    Where groups begin is a decision: no gradient goes through it.
    """
    with torch.no_grad():
        begins = beginnings(apart(below, divergence), rules.threshold, rules.capacity)
    return condense(below, begins, rules.capacity)


def build(
    tokens: Tokens, divergence: Divergence, rules: Rules, scales: int, *, is_causal: bool
) -> Pyramid:
    """Condense tokens (b, h, n) scale by scale: cells of one scale become half as many of the next.

    A cell is made of its own tokens alone, so nothing after its end can change it.
    """
    n = tokens.size.shape[-1]
    token = torch.arange(n, device=tokens.size.device)
    levels: list[Tokens] = []
    places: list[Tensor] = []
    below, width = tokens, rules.block
    for scale in range(scales):
        count = cells.num_cells(n, rules.block, scale, is_causal=is_causal)
        level, place = condensed(below.cells(width, count), divergence, rules)
        # a token is where its group of the scale below is
        slot = token if not places else token // (rules.block << (scale - 1)) * rules.capacity
        slot = slot + (places[-1] if places else 0)
        flat = place.flatten(-2)
        known = slot < flat.shape[-1]
        slot = slot.clamp(max=flat.shape[-1] - 1).expand(*flat.shape[:-1], n)
        places.append(flat.gather(-1, slot).masked_fill(~known, 0))
        levels.append(level)
        below, width = level.joined(), 2 * rules.capacity
    return Pyramid(tuple(levels), tuple(places))
