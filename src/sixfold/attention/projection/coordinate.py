"""Projections that know where their head sits on the hexagonal grid.

W_h = g_h (W_base_h + B * f(q_h, r_h)) for each of W_Q, W_K, W_V: W_base_h and the row pattern B are
learned, f is a small network on the coordinate giving one number per row, g_h is 1 until a QK-clip
lowers it. The sum is taken on the weights, so the layer runs as one fused matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sixfold.attention.projection.linear import project, split_weight
from sixfold.contracts import Cache, Heads, Point, Visibility
from sixfold.geometry.hexgrid import HexGrid

HIDDEN = 64


def places(grid: HexGrid, groups: int) -> Tensor:
    """Coordinates (q, r) over the radius, averaged over each group of heads: (groups, 2)."""
    cells = torch.tensor(grid.coordinates, dtype=torch.float64, device="cpu")
    return cells.unflatten(0, (groups, -1)).mean(1) / max(grid.radius, 1)


class CoordinateProjection(nn.Module):
    """Base weights plus a pattern modulated by the head's coordinate."""

    def __init__(self, heads: Heads, **factory: object) -> None:
        super().__init__()
        self.heads, self.grid = heads, HexGrid.of(heads.num_heads)
        counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        self.base = nn.Linear(heads.d_model, sum(counts) * heads.head_dim, bias=False, **factory)
        self.pattern = nn.Parameter(torch.empty(3, heads.head_dim, heads.d_model, **factory))
        self.network = nn.Sequential(
            nn.Linear(2, HIDDEN, **factory), nn.GELU(), nn.Linear(HIDDEN, 3 * heads.head_dim, **factory)
        )  # fmt: skip
        for name, count in zip("qkv", counts, strict=True):
            self.register_buffer(f"place_{name}", places(self.grid, count).to(self.pattern))
            self.register_buffer(f"gain_{name}", torch.ones(count, 1, 1, **factory))
        nn.init.normal_(self.base.weight, std=heads.d_model**-0.5)
        nn.init.normal_(self.pattern, std=heads.d_model**-0.5)

    def materialize(self) -> dict[str, Tensor]:
        """Plain weights by role: g_h (W_base_h + B * f(q_h, r_h))."""
        weights = split_weight(self.base.weight, self.heads)
        for role, (name, base) in enumerate(weights.items()):
            shift = self.network(self.get_buffer(f"place_{name}")).chunk(3, dim=-1)[role]
            whole = torch.addcmul(base, shift[..., None], self.pattern[role])
            weights[name] = self.get_buffer(f"gain_{name}") * whole
        return weights

    def forward(
        self, x: Tensor, context: Tensor, visibility: Visibility, cache: Cache | None  # noqa: ARG002
    ) -> Point:
        """Project x (b, n, d_model) and context (b, m, d_model)."""
        weight = torch.cat(list(self.materialize().values())).flatten(0, 1)
        return project(x, context, weight, None, self.heads)

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the base weights by role."""
        gradient = self.base.weight.grad
        return None if gradient is None else split_weight(gradient, self.heads)

    @torch.no_grad()
    def scale_head_(self, head: int, query: float, key: float) -> None:
        """Lower the gain of one head's queries and of its group's keys."""
        self.gain_q[head] *= query
        self.gain_k[head * self.heads.num_kv_heads // self.heads.num_heads] *= key


def build(heads: Heads, **factory: object) -> CoordinateProjection:
    """The projection of `heads`, whose number must fill a hexagonal grid."""
    return CoordinateProjection(heads, **factory)
