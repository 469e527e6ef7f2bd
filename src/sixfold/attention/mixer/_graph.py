"""Heads as the nodes of a graph: what the mixers of a graph have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sixfold.contracts import Heads
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.headmix import dense, factored

SELF_START, EDGE_START = 0.7, 0.05
DENSE_UP_TO = 512
"""Width h d up to which one dense product beats two thin ones (benchmarks/ops.py, CPU)."""


class GraphMixer(nn.Module):
    """H_i + gate_i * relu(lambda_i W_self H_i + sum over neighbours j of g_ij W_neighbour H_j).

    The gate is 1 in a fresh layer; at 0 the layer computes what it would without mixing.

    Args:
        heads: sizes of the layer.
        adjacency: 0/1 matrix (h, h).
        ties: optional (self_class (h,), edge_class (h, h)): members of a class share lambda and
            gate, or one edge gain. Free by default.
        grid: the hexagonal grid the heads sit on, if they do.
    """

    def __init__(
        self,
        heads: Heads,
        adjacency: Tensor,
        ties: tuple[Tensor, Tensor] | None = None,
        grid: HexGrid | None = None,
        **factory: object,
    ) -> None:
        super().__init__()
        self.grid, width = grid, heads.head_dim
        if ties is None:
            nodes = torch.arange(heads.num_heads)
            edges = (adjacency.flatten().cumsum(0).view_as(adjacency) - 1).long()
        else:
            nodes, edges = ties
        self.register_buffer("adjacency", adjacency.to(**factory), persistent=False)
        self.register_buffer("nodes", nodes.to(factory.get("device")), persistent=False)
        self.register_buffer("edges", edges.clamp(min=0).to(factory.get("device")), persistent=False)
        num_nodes, num_edges = int(nodes.max()) + 1, int(edges.max()) + 1
        self.weight_self = nn.Parameter(torch.empty(width, width, **factory))
        self.weight_neighbour = nn.Parameter(torch.empty(width, width, **factory))
        self.self_gain = nn.Parameter(torch.full((num_nodes,), SELF_START, **factory))
        self.edge_gain = nn.Parameter(torch.full((max(num_edges, 0),), EDGE_START, **factory))
        self.gate = nn.Parameter(torch.ones(num_nodes, **factory))
        nn.init.normal_(self.weight_self, std=width**-0.5)
        nn.init.normal_(self.weight_neighbour, std=width**-0.5)

    def graph(self) -> Tensor:
        """lambda_i on the diagonal, g_ij on the edges, (h, h)."""
        edges = self.edge_gain[self.edges] * self.adjacency if len(self.edge_gain) else self.adjacency
        return edges + torch.diag(self.self_gain[self.nodes])

    def mix_outputs(self, heads: Tensor) -> Tensor:
        """Mix head outputs (b, n, h, d)."""
        wide = heads.shape[2] * heads.shape[3] > DENSE_UP_TO
        headmix = factored.headmix if wide else dense.headmix
        mixed = headmix(heads, self.weight_self, self.weight_neighbour, self.graph())
        return torch.addcmul(heads, mixed, self.gate[self.nodes, None])
