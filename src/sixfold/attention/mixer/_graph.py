"""Heads as the nodes of a graph: what the mixers of a graph have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sixfold.contracts import Heads, Rating
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.headmix import fused, reference

SELF_START, EDGE_START = 0.7, 0.05

Ties = tuple[Tensor, Tensor]
"""Class of every node (h,) and of every directed edge (h, h): members share a gain."""


class Entries(NamedTuple):
    """Where each entry of a graph (h, h) stands in [edge gains, self gains, 0].

    nodes (h,) tells the self gain of every head; the counts are those of different gains.
    """

    entries: Tensor
    nodes: Tensor
    num_nodes: int
    num_edges: int

    @classmethod
    def of(cls, adjacency: Tensor, ties: Ties | None) -> Entries:
        """One gain per node and directed edge of a 0/1 matrix (h, h), or per class of them."""
        if ties is None:
            nodes = torch.arange(len(adjacency), device="cpu")
            edges = adjacency.flatten().cumsum(0).view_as(adjacency).long() - 1
        else:
            nodes, edges = ties
        num_nodes, num_edges = int(nodes.max()) + 1, int(edges.max()) + 1
        entries = edges.masked_fill(adjacency == 0, num_edges + num_nodes)
        return cls(entries + torch.diag(nodes - num_nodes), nodes, num_nodes, num_edges)


def graph_of(edge_gain: Tensor, self_gain: Tensor, entries: Tensor) -> Tensor:
    """Self gains on the diagonal, edge gains on the edges, 0 elsewhere, (h, h)."""
    values = torch.cat([edge_gain, self_gain, self_gain.new_zeros(1)])
    return values.index_select(0, entries.flatten()).view_as(entries)


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

    mixes_logits = False

    def __init__(
        self,
        heads: Heads,
        adjacency: Tensor,
        ties: Ties | None = None,
        grid: HexGrid | None = None,
        **factory: object,
    ) -> None:
        super().__init__()
        self.grid, width = grid, heads.head_dim
        self.tied = ties is not None
        entries, nodes, num_nodes, num_edges = Entries.of(adjacency, ties)
        self.weight_self = nn.Parameter(torch.empty(width, width, **factory))
        self.weight_neighbour = nn.Parameter(torch.empty(width, width, **factory))
        self.self_gain = nn.Parameter(torch.full((num_nodes,), SELF_START, **factory))
        self.edge_gain = nn.Parameter(torch.full((num_edges,), EDGE_START, **factory))
        self.gate = nn.Parameter(torch.ones(num_nodes, **factory))
        # saved with the weights: a layer made on the meta device gets its graph from the checkpoint
        self.register_buffer("entries", entries.to(self.gate.device))
        self.register_buffer("nodes", nodes.to(self.gate.device))
        nn.init.normal_(self.weight_self, std=width**-0.5)
        nn.init.normal_(self.weight_neighbour, std=width**-0.5)

    def graph(self) -> Tensor:
        """lambda_i on the diagonal, g_ij on the edges, 0 elsewhere, (h, h)."""
        return graph_of(self.edge_gain, self.self_gain, self.entries)

    def mix_logits(self, rating: Rating) -> Rating:
        """The rating as it is."""
        return rating

    def mix_outputs(self, heads: Tensor, impl: str) -> Tensor:
        """Mix head outputs (b, n, h, d); only ``reference`` can be differentiated twice."""
        mix = reference.mix if impl == "reference" else fused.mix
        gate = self.gate.index_select(0, self.nodes) if self.tied else self.gate
        return mix(heads, self.weight_self, self.weight_neighbour, self.graph(), gate)
