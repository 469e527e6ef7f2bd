"""Filtering a signal over a graph by walking along its edges: no matrix of n x n numbers.

T_k(L - I) x follows from the two terms before it by one step to the neighbours, so that a filter of
some order takes as many steps. A step adds up the rows of the neighbours of each node; as the graph
is undirected, a gradient takes the same step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Neighbours(NamedTuple):
    """The neighbours of all nodes in one list: those of node i stand from offsets_i to offsets_i+1.

    sources (e,), offsets (n + 1,).
    """

    sources: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, edges: Tensor, num_nodes: int) -> Neighbours:
        """The neighbours along edges (2, e), int64, from and to.

        Raises ValueError for other shapes, nodes outside [0, num_nodes) and an edge that does not
        come back: the Laplacian of a directed graph has no spectrum to filter.

        >>> Neighbours.of(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 3)
        Neighbours(sources=tensor([1, 0, 2, 1]), offsets=tensor([0, 1, 3, 4]))
        """
        if edges.ndim != 2 or len(edges) != 2 or edges.dtype != torch.int64:
            raise ValueError(f"edges must be int64 (2, e), got {edges.dtype} {tuple(edges.shape)}")
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < num_nodes:
            raise ValueError(
                f"edges must join nodes in [0, {num_nodes}), got {int(edges.min())} "
                f"to {int(edges.max())}"
            )
        there = (edges[1] * num_nodes + edges[0]).sort().values
        back = (edges[0] * num_nodes + edges[1]).sort().values
        if not torch.equal(there, back):
            one = int(torch.minimum(there, back)[(there != back).nonzero()[0]])
            raise ValueError(
                f"edges must hold every edge both ways, but there are not as many "
                f"from {one // num_nodes} to {one % num_nodes} as back"
            )
        ends = torch.arange(num_nodes + 1, device=edges.device) * num_nodes
        return cls(there % max(num_nodes, 1), torch.searchsorted(there, ends))


class Sum(torch.autograd.Function):
    """A x: the sum over the neighbours of each node, for x (n, width). A is its own transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, sources: Tensor, offsets: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(sources, offsets)
        return embedding_bag(sources, x, offsets, mode="sum", include_last_offset=True)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        return Sum.apply(gradient.contiguous(), *ctx.saved_tensors), None, None


def filtered(x: Tensor, coefficients: Tensor, neighbours: Neighbours) -> Tensor:
    """Same as the reference; cost (order) x (n + e) x h d, memory (order) x n x h d."""
    coefficients = coefficients.to(x.dtype)
    degree = neighbours.offsets.diff()[:, None]
    alone = (degree == 0).to(x.dtype)
    scale = degree.clamp(min=1).to(x.dtype).rsqrt()

    def shifted(term: Tensor) -> Tensor:
        """(L - I) term. A node without edges has a row of zeros in L, as its own component."""
        near = Sum.apply((scale * term).contiguous(), *neighbours)
        return -(scale * near) - alone * term

    terms = [x.flatten(1)]
    for k in range(1, len(coefficients)):
        step = shifted(terms[-1])
        terms.append(step if k == 1 else 2 * step - terms[-2])
    parts = (a * term.view_as(x) for a, term in zip(coefficients, terms, strict=True))
    return sum(parts, torch.zeros_like(x))
