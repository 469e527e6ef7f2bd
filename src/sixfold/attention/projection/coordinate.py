"""Projections that know where their head sits on the hexagonal grid.

W_h = W_base_h + B * f(q_h, r_h) for each of W_Q, W_K, W_V: W_base_h and the row pattern B are
learned, f is a small network on the coordinate giving one number per row. The sum is taken on the
weights, so the layer runs as one fused matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sixfold.attention.projection.linear import called, project, split_weight
from sixfold.contracts import Cache, Emission, Heads, Visibility
from sixfold.geometry.hexgrid import HexGrid

HIDDEN = 64


def places(grid: HexGrid, groups: int) -> Tensor:
    """Coordinates (q, r) over the radius, averaged over each group of heads: (groups, 2)."""
    cells = torch.tensor(grid.coordinates, dtype=torch.float64, device="cpu")
    return cells.unflatten(0, (groups, -1)).mean(1) / max(grid.radius, 1)


class CoordinateProjection(nn.Module):
    """Base weights plus a pattern modulated by the head's coordinate."""

    schema = "point"
    ordered = None

    def __init__(self, heads: Heads, **factory: object) -> None:
        super().__init__()
        self.heads, self.grid = heads, HexGrid.of(heads.num_heads)
        rows = heads.num_heads + 2 * heads.num_kv_heads
        self.base = nn.Linear(heads.d_model, rows * heads.head_dim, bias=False, **factory)
        self.pattern = nn.Parameter(torch.empty(3, heads.head_dim, heads.d_model, **factory))
        self.network = nn.Sequential(
            nn.Linear(2, HIDDEN, **factory),
            nn.GELU(),
            nn.Linear(HIDDEN, 3 * heads.head_dim, **factory),
        )
        for name, count in (("q", heads.num_heads), ("kv", heads.num_kv_heads)):
            self.register_buffer(f"place_{name}", places(self.grid, count).to(self.pattern))
        nn.init.normal_(self.base.weight, std=heads.d_model**-0.5)
        nn.init.normal_(self.pattern, std=heads.d_model**-0.5)

    def shifted(self, place: Tensor, roles: slice, rows: slice) -> Tensor:
        """W of some roles (of q, k, v), flat, whose heads sit at `place` and in `rows`."""
        f = self.network(place).unflatten(-1, (3, -1))[:, roles].transpose(0, 1)
        whole = self.base.weight.view(-1, *self.pattern.shape[1:])[rows].view(*f.shape, -1)
        return torch.addcmul(whole, f[..., None], self.pattern[roles, None]).flatten(0, 2)

    def weight(self) -> Tensor:
        """All of W, ((h + 2 h_kv) d, d_model)."""
        count = self.heads.num_heads
        if count == self.heads.num_kv_heads:
            return self.shifted(self.place_q, slice(None), slice(None))
        query = self.shifted(self.place_q, slice(1), slice(count))
        return torch.cat([query, self.shifted(self.place_kv, slice(1, None), slice(count, None))])

    def materialize(self) -> dict[str, Tensor]:
        """Plain weights by role: W_base_h + B * f(q_h, r_h)."""
        return split_weight(self.weight(), self.heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        visibility: Visibility,  # noqa: ARG002
        cache: Cache | None,  # noqa: ARG002
    ) -> Emission:
        """Project x (b, n, d_model) and context (b, m, d_model)."""
        if type(self.base) is nn.Linear:
            return project(x, context, self.weight(), None, self.heads)
        base = called(self.base, x, context, self.heads)
        shift = project(x, context, self.weight() - self.base.weight, None, self.heads)
        return Emission(*(one + other for one, other in zip(base, shift, strict=True)))

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the base weights by role."""
        gradient = self.base.weight.grad
        return None if gradient is None else split_weight(gradient, self.heads)


def build(heads: Heads, **factory: object) -> CoordinateProjection:
    """The projection of `heads`, whose number must fill a hexagonal grid."""
    return CoordinateProjection(heads, **factory)
