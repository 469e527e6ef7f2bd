"""The names under which mechanisms are known; each is a composition of the four parts."""

from __future__ import annotations

from typing import Any

from sixfold.attention.multihead import MultiHeadAttention
from sixfold.geometry.hexgrid import HexGrid


class HexagonalMultiHeadAttention(MultiHeadAttention):
    """Heads on a hexagonal grid: coordinate-aware projections, mixing between neighbours.

    Args:
        d_model: width of inputs and outputs.
        grid_radius: R; the layer has 3R^2 + 3R + 1 heads.
        d_head: width of a head (`head_dim` elsewhere).
        use_hypernet: projections from a hypernetwork instead of base plus coordinate term.
        use_spectral: not available; raises NotImplementedError naming what is.
        options: any further argument of `MultiHeadAttention`.

    >>> HexagonalMultiHeadAttention(d_model=64, grid_radius=2, d_head=8).heads.num_heads
    19
    """

    def __init__(
        self,
        d_model: int,
        grid_radius: int = 2,
        d_head: int = 64,
        use_hypernet: bool = False,  # noqa: FBT001, FBT002
        use_spectral: bool = False,  # noqa: FBT001, FBT002
        **options: Any,
    ) -> None:
        if use_spectral:
            raise NotImplementedError(
                "use_spectral=True: mixing in the graph's spectrum is not part of this version; "
                "mixers that exist: none, ring, random, dense, hexagonal (the default here)"
            )
        parts = {
            "projection": "hypernetwork" if use_hypernet else "coordinate",
            "mixer": "hexagonal",
        }
        num_heads = HexGrid(grid_radius).num_heads
        super().__init__(d_model, num_heads, head_dim=d_head, **(parts | options))
