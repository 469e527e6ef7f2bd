"""A random graph with the hexagonal grid's degrees: does the grid matter, or only its sparsity?"""

from __future__ import annotations

from sixfold.attention.mixer._graph import GraphMixer
from sixfold.contracts import Heads
from sixfold.geometry.graph import rewire
from sixfold.geometry.hexgrid import HexGrid


def build(heads: Heads, *, graph_seed: int = 0, **factory: object) -> GraphMixer:
    """The mixer of `heads`, whose number must fill a grid; `graph_seed` draws the graph."""
    if isinstance(graph_seed, bool) or not isinstance(graph_seed, int) or graph_seed < 0:
        raise ValueError(f"graph_seed must be a whole number of 0 or more, got {graph_seed!r}")
    adjacency = rewire(HexGrid.of(heads.num_heads).adjacency(), seed=graph_seed)
    return GraphMixer(heads, adjacency, **factory)
