"""Talking heads on a hexagonal grid: each head's logits mixed with its up to six neighbours'.

logit'_i = lambda_i logit_i + sum over neighbours j of g_ij logit_j, before mask, cap and softmax

A fresh layer has lambda = 1 and g = 0 and computes what it would without mixing: the gradient of g
does not vanish there. Tied, lambda and g are shared over the orbits of a 60-degree turn (C6).
Source: Shazeer et al., Talking-Heads Attention, arXiv 2003.02436, section 1, there among all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sixfold.attention.mixer import hexagonal
from sixfold.attention.mixer._graph import Entries, GraphMixer, Ties, graph_of
from sixfold.contracts import Features, Heads, Rating
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.headmix import logits


class LogitMixer(nn.Module):
    """Each head's logits a sum over the head and its neighbours; outputs mixed after it, or not.

    Scores are mixed by their features, at a width up to seven times as large; distances, which have
    none, by all logits at once. What a score leaves out, a term of the query alone, is left out of
    the sum too: it differs from head to head, but not from key to key.

    Args:
        heads: sizes of the layer.
        adjacency: 0/1 matrix (h, h).
        ties: classes of nodes and edges that share a gain; free by default.
        grid: the hexagonal grid the heads sit on.
        outputs: mixes outputs, if anything does.
    """

    mixes_logits = True

    def __init__(
        self,
        heads: Heads,
        adjacency: Tensor,
        ties: Ties | None,
        grid: HexGrid,
        outputs: GraphMixer | None,
        **factory: object,
    ) -> None:
        super().__init__()
        self.grid, self.outputs = grid, outputs
        entries, _, num_nodes, num_edges = Entries.of(adjacency, ties)
        self.self_gain = nn.Parameter(torch.ones(num_nodes, **factory))
        self.edge_gain = nn.Parameter(torch.zeros(num_edges, **factory))
        self.register_buffer("power", torch.zeros(heads.num_heads, **factory))
        # a head, its neighbours, and for heads that have fewer some others, whose entry is 0
        near = adjacency + torch.eye(heads.num_heads, device="cpu")
        count = int(near.sum(1).max())
        slots = near.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        self.register_buffer("entries", entries.to(self.power.device))
        self.register_buffer("slots", slots.to(self.power.device))

    @property
    def gate(self) -> nn.Parameter | None:
        """What opens the mixing of outputs; None where there is none."""
        return None if self.outputs is None else self.outputs.gate

    def graph(self) -> Tensor:
        """lambda_i on the diagonal, g_ij on the edges, 0 elsewhere, rows times 2**power, (h, h)."""
        return graph_of(self.edge_gain, self.self_gain, self.entries) * self.power.exp2()[:, None]

    def mix_logits(self, rating: Rating) -> Features:
        """The rating of the mixed logits."""
        features = rating if isinstance(rating, Features) else logits.explicit(rating)
        return logits.mix(features, self.graph(), self.slots)

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply one head's mixed logits by 2**power; what it tells its neighbours stays."""
        self.power[head] += power

    def mix_outputs(self, heads: Tensor, impl: str) -> Tensor:
        """Heads (b, n, h, d) mixed, or as they are."""
        return heads if self.outputs is None else self.outputs.mix_outputs(heads, impl)


def build(
    heads: Heads, *, tied: bool = False, outputs: bool = False, **factory: object
) -> LogitMixer:
    """The mixer of `heads`, whose number must fill a grid; `outputs` mixes these too."""
    grid = HexGrid.of(heads.num_heads)
    ties = (grid.orbits(), hexagonal.edge_orbits(grid)) if tied else None
    after = hexagonal.build(heads, tied=tied, **factory) if outputs else None
    return LogitMixer(heads, grid.adjacency(), ties, grid, after, **factory)
