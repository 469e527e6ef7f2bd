"""Heads on a hexagonal grid, each mixed with its up to six neighbours.

M_i = relu(lambda_i W_self H_i + sum over neighbours j of g_ij W_neighbour H_j),  out = H + gate * M

Tied, lambda, g and the gate are shared over the orbits of a 60-degree turn (C6); mixing then
commutes with turning the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.attention.mixer._graph import GraphMixer
from sixfold.contracts import Heads
from sixfold.geometry.hexgrid import HexGrid


def edge_orbits(grid: HexGrid) -> Tensor:
    """Class of every directed edge under the six turns, (h, h); -1 where there is no edge."""
    turns = torch.stack([grid.rotation(turn) for turn in range(6)])
    heads = torch.arange(grid.num_heads, device="cpu")
    ends = torch.cartesian_prod(heads, heads)
    codes = turns[:, ends[:, 0]] * grid.num_heads + turns[:, ends[:, 1]]
    first = codes.min(0).values.view(grid.num_heads, -1)
    edges = grid.adjacency().bool()
    classes = torch.full_like(first, -1)
    classes[edges] = torch.unique(first[edges], return_inverse=True)[1]
    return classes


def build(heads: Heads, *, tied: bool = False, **factory: object) -> GraphMixer:
    """The mixer of `heads`, whose number must fill a grid."""
    grid = HexGrid.of(heads.num_heads)
    ties = (grid.orbits(), edge_orbits(grid)) if tied else None
    return GraphMixer(heads, grid.adjacency(), ties, grid, **factory)
