"""The hexagonal grid that heads live on.

Axial coordinates (q, r); the third cube coordinate is s = -q - r. A grid of radius R holds every
cell within distance R of the origin: 3R^2 + 3R + 1 cells, 7, 19, 37, 61 for R = 1 to 4.
Tensors are made on the CPU whatever the default device: layers are built from their values.
Source: Red Blob Games, "Hexagonal Grids" (axial coordinates, distance, rotation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class HexCoordinate(NamedTuple):
    """One cell of the grid, in axial coordinates.

    >>> HexCoordinate(1, -1) + HexCoordinate(0, 2)
    H(1,1)
    """

    q: int
    r: int

    def __add__(self, other: tuple[int, int]) -> HexCoordinate:  # type: ignore[override]
        return HexCoordinate(self.q + other[0], self.r + other[1])

    def __repr__(self) -> str:
        return f"H({self.q},{self.r})"

    def distance(self, other: tuple[int, int] = (0, 0)) -> int:
        """Steps between two cells: ``(|dq| + |dr| + |dq + dr|) / 2``.

        >>> HexCoordinate(2, -1).distance()
        2
        """
        dq, dr = self.q - other[0], self.r - other[1]
        return (abs(dq) + abs(dr) + abs(dq + dr)) // 2

    def neighbours(self) -> tuple[HexCoordinate, ...]:
        """The six adjacent cells, counter-clockwise in steps of 60 degrees."""
        return tuple(self + step for step in DIRECTIONS)

    def rotate(self, sixths: int = 1) -> HexCoordinate:
        """Turn about the origin by sixths * 60 degrees: (q, r) -> (-r, q + r).

        >>> HexCoordinate(1, 0).rotate(), HexCoordinate(1, 0).rotate(6)
        (H(0,1), H(1,0))
        """
        cell = self
        for _ in range(sixths % 6):
            cell = HexCoordinate(-cell.r, cell.q + cell.r)
        return cell


DIRECTIONS = tuple(HexCoordinate(1, 0).rotate(turn) for turn in range(6))


def cartesian(q: float, r: float) -> tuple[float, float]:
    """Centre of a pointy-top cell of unit size: x = sqrt(3) (q + r/2), y = 3r/2."""
    return math.sqrt(3) * (q + r / 2), 1.5 * r


@dataclass(frozen=True)
class HexGrid:
    """All cells within `radius` of the origin, in q-major order.

    Raises ValueError for a radius that is no whole number of 0 or more.

    >>> HexGrid(2).num_heads, HexGrid(1).coordinates[3]
    (19, H(0,0))
    """

    radius: int

    def __post_init__(self) -> None:
        whole = isinstance(self.radius, int) and not isinstance(self.radius, bool)
        if not (whole and self.radius >= 0):
            raise ValueError(
                f"grid_radius must be a whole number of 0 or more, got {self.radius!r}"
            )

    @classmethod
    def of(cls, num_heads: int) -> HexGrid:
        """The grid that has exactly `num_heads` cells.

        Raises ValueError where there is none; the message names the nearest sizes.

        >>> HexGrid.of(37).radius
        3
        """
        radius = round((math.sqrt(12 * num_heads - 3) - 3) / 6) if num_heads > 0 else 0
        grid = cls(radius)
        if grid.num_heads != num_heads:
            sizes = sorted({cls(max(radius + step, 0)).num_heads for step in (-1, 0, 1)})
            raise ValueError(
                f"no hexagonal grid has {num_heads} heads; a grid has 3R^2 + 3R + 1, e.g. "
                + ", ".join(map(str, sizes))
            )
        return grid

    @property
    def num_heads(self) -> int:
        """Number of cells, 3R^2 + 3R + 1."""
        return 3 * self.radius * (self.radius + 1) + 1

    @cached_property
    def coordinates(self) -> tuple[HexCoordinate, ...]:
        """Every cell, q ascending, then r ascending."""
        span = range(-self.radius, self.radius + 1)
        cells = (HexCoordinate(q, r) for q in span for r in span)
        return tuple(cell for cell in cells if cell.distance() <= self.radius)

    @cached_property
    def index(self) -> dict[HexCoordinate, int]:
        """Cell to head number."""
        return {cell: head for head, cell in enumerate(self.coordinates)}

    def ring(self, distance: int) -> tuple[int, ...]:
        """Heads at exactly this distance from the centre."""
        return tuple(h for h, cell in enumerate(self.coordinates) if cell.distance() == distance)

    def rotation(self, sixths: int = 1) -> Tensor:
        """The permutation p of a turn by 60 degrees: head h moves to place p[h]."""
        places = [self.index[cell.rotate(sixths)] for cell in self.coordinates]
        return torch.tensor(places, device="cpu")

    def orbits(self) -> Tensor:
        """Orbit number of every head under the six rotations (C6), shape (num_heads,)."""
        first = [min(self.index[c.rotate(t)] for t in range(6)) for c in self.coordinates]
        return torch.unique(torch.tensor(first, device="cpu"), return_inverse=True)[1]

    def adjacency(self) -> Tensor:
        """Symmetric 0/1 matrix (num_heads, num_heads): 1 between neighbouring cells."""
        matrix = torch.zeros(self.num_heads, self.num_heads, device="cpu")
        for head, cell in enumerate(self.coordinates):
            for neighbour in cell.neighbours():
                if neighbour in self.index:
                    matrix[head, self.index[neighbour]] = 1.0
        return matrix
