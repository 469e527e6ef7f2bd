"""``hamha.topology``: the grid as plain lists and matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sixfold.geometry.hexgrid import HexCoordinate, HexGrid

__all__ = ["HexCoordinate", "build_adjacency_matrix", "generate_hex_grid"]


def generate_hex_grid(radius: int) -> list[HexCoordinate]:
    """Every cell within `radius`, q-major.

    >>> len(generate_hex_grid(2))
    19
    """
    return list(HexGrid(radius).coordinates)


def build_adjacency_matrix(coordinates: Sequence[HexCoordinate]) -> Tensor:
    """0/1 matrix of neighbours among any cells, in their order.

    >>> build_adjacency_matrix([HexCoordinate(0, 0), HexCoordinate(1, 0)])
    tensor([[0., 1.],
            [1., 0.]])
    """
    near = [[float(a.distance(b) == 1) for b in coordinates] for a in coordinates]
    return torch.tensor(near).view(len(coordinates), len(coordinates))
