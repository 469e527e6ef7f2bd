"""Heads on a hexagonal grid, which speak to their neighbours or are filtered over the grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sixfold.attention.allowed import check_flags, check_whole
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.attention.named._own import check_own, check_part
from sixfold.geometry.hexgrid import HexGrid


class HexagonalMultiHeadAttention(MultiHeadAttention):
    """Heads on a hexagonal grid: coordinate-aware projections, mixing over the grid.

    Args:
        d_model: width of inputs and outputs.
        grid_radius: R; the layer has 3R^2 + 3R + 1 heads.
        d_head: width of a head (`head_dim` elsewhere).
        use_hypernet: projections from a hypernetwork instead of base plus coordinate term.
        use_spectral: heads mix through the spectrum of the grid instead of with their neighbours.
        options: any further argument of `MultiHeadAttention`; parts that are asked for already may
            come as a table, ``mixer={"name": "spectral", "filter": "rational"}``.

    Raises:
        ValueError: for a radius that is no whole number of 0 or more, a projection or mixer beside
            `use_hypernet` or `use_spectral` that is another, and as `MultiHeadAttention`.

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
        check_own(type(self).__name__, options, num_heads="grid_radius", head_dim="d_head")
        check_flags(use_hypernet=use_hypernet, use_spectral=use_spectral)
        if use_hypernet:
            check_part(options, "projection", "hypernetwork", "where use_hypernet is True")
        if use_spectral:
            check_part(options, "mixer", "spectral", "where use_spectral is True")
        parts = {
            "projection": "hypernetwork" if use_hypernet else "coordinate",
            "mixer": "spectral" if use_spectral else "hexagonal",
        }
        num_heads = HexGrid(grid_radius).num_heads
        super().__init__(d_model, num_heads, head_dim=d_head, **(parts | options))


class SpectralHexagonalAttention(MultiHeadAttention):
    """Heads on a hexagonal grid, mixed by learned filters of the grid's spectrum.

    Tokens attend to tokens in every head, whatever their number; what the heads found is then
    filtered over the grid: H + gate relu(g(L) H W), g one function of the eigenvalues of the
    normalised Laplacian L per group of channels. Projections are plain: the grid enters by its
    spectrum alone. `mixer.response` and `mixer.frequency_penalty` show and restrain the filters.

    Args:
        d_model: width of inputs and outputs.
        grid_radius: R; the layer has 3R^2 + 3R + 1 heads.
        k_eigenvectors: how many modes of the grid pass at least, the slowest first. The number is
            rounded up to whole eigenspaces; a grid with fewer modes keeps all.
        d_head: width of a head (`head_dim` elsewhere).
        filter: ``bands``, ``smooth``, ``chebyshev`` or ``rational``.
        order: number of bands or knots, degree, or number of poles.
        spatial: mix with the neighbours on the grid as well.
        options: any further argument of `MultiHeadAttention`; ``mixer`` as a table, for instance
            ``{"name": "spectral", "groups": 2}``, says more of the mixer and goes before the above.

    Raises:
        ValueError: for a k that is no whole number of 1 or more, a filter that does not exist, an
            order that would learn more numbers than eigenspaces are kept, another mixer, and as
            `HexagonalMultiHeadAttention`.

    Source: filters of a graph's spectrum, Defferrard et al., arXiv 1606.09375, section 2.1.

    >>> import torch
    >>> layer = SpectralHexagonalAttention(32, 1, k_eigenvectors=2, d_head=8)
    >>> layer(torch.randn(2, 5, 32)).shape, sum(layer.mixer.multiplicities)
    (torch.Size([2, 5, 32]), 3)
    """

    def __init__(
        self,
        d_model: int,
        grid_radius: int = 2,
        k_eigenvectors: int = 32,
        d_head: int = 64,
        filter: str = "bands",  # noqa: A002 - the mixer's word
        order: int | None = None,
        *,
        spatial: bool = False,
        **options: Any,
    ) -> None:
        check_own(type(self).__name__, options, num_heads="grid_radius", head_dim="d_head")
        check_part(options, "mixer", "spectral", "in SpectralHexagonalAttention")
        check_whole(k_eigenvectors=k_eigenvectors)
        num_heads = HexGrid(grid_radius).num_heads
        mixer = {
            "name": "spectral",
            "filter": filter,
            "order": order,
            "modes": min(k_eigenvectors, num_heads),
            "spatial": spatial,
        }
        table = options.pop("mixer", {})
        mixer |= table if isinstance(table, Mapping) else {}
        super().__init__(d_model, num_heads, head_dim=d_head, mixer=mixer, **options)
