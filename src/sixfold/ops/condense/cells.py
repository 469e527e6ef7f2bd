"""Which cells of a sequence a block of queries sees: near blocks token by token, the far field by
meta-tokens, the coarser the farther.

A cell of scale s spans 2^s blocks. From the near field outward the blocks are tiled by one or two
cells of every scale, as in the fast multipole method: a block sees O(log N) cells.
Source: Greengard and Rokhlin, J. Comput. Phys. 73 (1987), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEAR = 1
"""Blocks on each side of a query's own that are seen token by token."""


class Cell(NamedTuple):
    """Blocks [number * 2^scale, (number + 1) * 2^scale)."""

    scale: int
    number: int

    @property
    def blocks(self) -> range:
        """The blocks it spans, also those beyond the end of a sequence."""
        return range(self.number << self.scale, (self.number + 1) << self.scale)


def before(end: int, scales: int) -> list[Cell]:
    """The cells that tile blocks [0, end), from the end outward.

    >>> [tuple(cell) for cell in before(7, 8)]
    [(0, 6), (1, 2), (2, 0)]
    """
    found, scale = [], 0
    while end > 0:
        found.append(Cell(scale, (end >> scale) - 1))
        end -= 1 << scale
        if end % (2 << scale) == 0 and scale + 1 < scales:
            scale += 1
    return found


def after(start: int, num_blocks: int, scales: int) -> list[Cell]:
    """The cells that tile blocks [start, num_blocks), from the start outward.

    >>> [tuple(cell) for cell in after(3, 8, 8)]
    [(0, 3), (1, 2), (1, 3)]
    """
    found, scale = [], 0
    while start < num_blocks:
        found.append(Cell(scale, start >> scale))
        start += 1 << scale
        if start % (2 << scale) == 0 and scale + 1 < scales:
            scale += 1
    return found


def far(block: int, num_blocks: int, scales: int, *, is_causal: bool) -> list[Cell]:
    """The cells that a block of queries sees by meta-tokens."""
    found = before(block - NEAR, scales)
    return found if is_causal else found + after(block + NEAR + 1, num_blocks, scales)


def earliest(first: int, scales: int, *, is_causal: bool) -> tuple[int, ...]:
    """By scale, a number below which no cell is seen by a block from `first` on.

    The tiles of a later block end later, scale by scale.

    >>> earliest(8, 3, is_causal=True), earliest(8, 3, is_causal=False)
    ((6, 2, 0), (0, 0, 0))
    """
    found = [0] * scales
    for cell in before(first - NEAR, scales) if is_causal else []:
        found[cell.scale] = cell.number  # from the end outward: the last of a scale is its first
    return tuple(found)


def num_cells(num_tokens: int, block: int, scale: int, *, is_causal: bool) -> int:
    """Cells of a scale: those that are full, or all where what comes after is seen too.

    >>> [num_cells(100, 8, scale, is_causal=True) for scale in range(4)]
    [12, 6, 3, 1]
    """
    span = block << scale
    return num_tokens // span if is_causal else -(-num_tokens // span)


def fixed(length: int) -> int:
    """`length` as a plain number: which cells a block sees is compiled anew for every length."""
    return len(range(length))


def num_scales(num_blocks: int, scales: int | None) -> int:
    """Scales that the blocks of a sequence see, at most `scales`.

    One cell at least of every finer scale lies between a block's near field and one of scale s.

    >>> [num_scales(blocks, None) for blocks in (2, 3, 4, 5, 8, 9)]
    [0, 1, 1, 2, 2, 3]
    """
    found = 0
    while num_blocks - NEAR >= 2 << found and found != scales:
        found += 1
    return found


@lru_cache(maxsize=256)
def rows(
    first: int,
    num_blocks: int,
    counts: tuple[int, ...],
    starts: tuple[int, ...],
    *,
    is_causal: bool,
) -> list[list[int]]:
    """What `table` holds."""
    scales, held = len(counts), [c - s for c, s in zip(counts, starts, strict=True)]
    offsets = [o - s for o, s in zip([0, *accumulate(held)], starts, strict=False)]
    seen = (
        far(block, num_blocks, scales, is_causal=is_causal) for block in range(first, num_blocks)
    )
    found = [[offsets[cell.scale] + cell.number for cell in cells] for cells in seen]
    slots = max(map(len, found), default=0)
    return [row + [-1] * (slots - len(row)) for row in found]


@torch.library.custom_op("sixfold::cells_seen", mutates_args=())
def table(
    like: Tensor,
    first: int,
    num_blocks: int,
    counts: Sequence[int],
    starts: Sequence[int],
    is_causal: bool,  # noqa: FBT001 - an operator takes plain values
) -> Tensor:
    """For blocks from `first` on, the cells they see, (blocks, slots); -1 where there is none.

    Cells of all scales are numbered through, finer scales first, of each those from `starts` on;
    counts: how many each scale has; like: a tensor of the device that reads them. An operator, so
    that a compiler takes it whole and does not unroll the loops; it is compiled once a length.
    """
    given = rows(first, num_blocks, tuple(counts), tuple(starts), is_causal=is_causal)
    return torch.tensor(given, dtype=torch.int64, device=like.device)


@table.register_fake
def _(like: Tensor, *given: Any) -> Tensor:
    first, num_blocks, counts, starts, is_causal = given
    sizes = int(first), int(num_blocks), tuple(map(int, counts)), tuple(map(int, starts))
    found = rows(*sizes, is_causal=is_causal)
    return like.new_empty(len(found), len(found[0]), dtype=torch.int64)
