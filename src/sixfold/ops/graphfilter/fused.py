"""Filtering a signal over a graph by walking along its edges: no matrix of n x n numbers.

T_k(L - I) x follows from the two terms before it by one step to the neighbours, so that a filter of
some order takes as many steps. A step adds up the rows of the neighbours of each node, weighted; as
the graph is undirected, a gradient takes the same steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sixfold.ops.precision import wide


class Neighbours(NamedTuple):
    """The rows of L - I in one list: those of node i stand from offsets_i to offsets_i+1.

    sources (e,), offsets (n + 1,), weights (e,), float64. A neighbour weighs -1 / sqrt(deg deg); a
    node without edges has a row of zeros in L, and stands here as its own neighbour: it counts
    among the e.
    """

    sources: Tensor
    offsets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, edges: Tensor, num_nodes: int) -> Neighbours:
        """The neighbours along edges (2, e), int64, from and to.

        Raises ValueError for other shapes, nodes outside [0, num_nodes) and an edge that does not
        come back: the Laplacian of a directed graph has no spectrum to filter.

        >>> Neighbours.of(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 3).weights
        tensor([-0.7071, -0.7071, -0.7071, -0.7071], dtype=torch.float64)
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
            at = int((there != back).nonzero()[0])
            found, returned = int(there[at]), int(back[at])
            ends = (
                divmod(found, num_nodes) if found < returned else divmod(returned, num_nodes)[::-1]
            )
            raise ValueError(
                f"edges must hold every edge both ways, but from {ends[0]} to {ends[1]} "
                f"there are fewer than back"
            )
        alone = (edges[1].bincount(minlength=num_nodes) == 0).nonzero()[:, 0]
        rows = torch.cat([there, alone * (num_nodes + 1)]).sort().values
        ends = torch.arange(num_nodes + 1, device=edges.device) * num_nodes
        sources, offsets = rows % max(num_nodes, 1), torch.searchsorted(rows, ends)
        degree = offsets.diff()
        targets = torch.repeat_interleave(degree)
        return cls(sources, offsets, -(degree[sources] * degree[targets]).double().rsqrt())


def polynomials(x: Tensor, order: int, neighbours: Neighbours) -> list[Tensor]:
    """T_k(L - I) x for k = 0 to an order, of x (n, h, d)."""
    sources, offsets, once = neighbours

    def stepped(term: Tensor, weights: Tensor) -> Tensor:
        near = embedding_bag(
            sources,
            term.flatten(1),
            offsets,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
        return near.view(x.shape)

    terms = [x.contiguous()]
    if order:
        terms.append(stepped(terms[0], once))
    twice = 2 * once
    while len(terms) <= order:
        terms.append(stepped(terms[-1], twice).sub_(terms[-2]))
    return terms


class Filter(torch.autograd.Function):
    """sum over k of a_k T_k(L - I) x. L is symmetric, so the gradient by x is filtered alike."""

    @staticmethod
    def forward(ctx, x: Tensor, coefficients: Tensor, *neighbours: Tensor) -> Tensor:  # noqa: D102
        terms = polynomials(x, len(coefficients) - 1, Neighbours(*neighbours))
        out = coefficients[0] * x
        for a, term in zip(coefficients[1:], terms[1:], strict=True):
            out.addcmul_(a, term)
        later = terms[1:] if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(x, coefficients, *neighbours, *later)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, coefficients, sources, offsets, weights, *later = ctx.saved_tensors
        neighbours = (sources, offsets, weights)
        by_x = by_coefficients = None
        if ctx.needs_input_grad[0]:
            by_x = Filter.apply(gradient, coefficients, *neighbours)
        if ctx.needs_input_grad[1]:
            terms = [x, *later]
            if torch.is_grad_enabled():  # second derivatives go through the terms too
                units = torch.eye(len(coefficients), device="cpu").to(x)[..., None, None]
                terms = [Filter.apply(x, unit, *neighbours) for unit in units]
            parts = [(gradient * term).sum(0) for term in terms]
            by_coefficients = torch.stack(parts).sum_to_size(coefficients.shape)
        return by_x, by_coefficients, None, None, None


def filtered(x: Tensor, coefficients: Tensor, neighbours: Neighbours) -> Tensor:
    """Same as the reference, of neighbours; cost (order) x (n + e) x h d, memory (order) x n x h d.

    In float32 at least: a recurrence rounds at each of its steps.
    """
    exact = wide(x)
    weights = neighbours.weights.to(exact.dtype)
    out = Filter.apply(exact, coefficients.to(exact), *neighbours._replace(weights=weights))
    return out.to(x.dtype)
