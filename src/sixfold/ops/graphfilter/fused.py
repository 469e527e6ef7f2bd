"""Filtering a signal over a graph by walking along its edges: no matrix of n x n numbers.

T_k(L - I) x follows from the two terms before it by one step to the neighbours, so that a filter of
some order takes as many steps. A step adds up the rows of the neighbours of each node, weighted; as
the graph is undirected, a gradient takes the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
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


def stepped(x: Tensor, sources: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """(L - I) x, of x (n, w), by the weights of its neighbours."""
    return embedding_bag(
        sources, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


class Step(torch.autograd.Function):
    """The same, differentiable as often as wanted: L is symmetric, a gradient takes such a step."""

    @staticmethod
    def forward(ctx, x: Tensor, *neighbours: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(*neighbours)
        return stepped(x, *neighbours)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        return Step.apply(gradient, *ctx.saved_tensors), None, None, None


def polynomials(
    x: Tensor, order: int, neighbours: Neighbours, step: Callable[..., Tensor] = stepped
) -> list[Tensor]:
    """T_k(L - I) x for k = 0 to an order, of x (n, w)."""
    terms = [x.contiguous()]
    if order:
        terms.append(step(terms[0], *neighbours))
    twice = neighbours._replace(weights=2 * neighbours.weights)
    while len(terms) <= order:
        terms.append(step(terms[-1], *twice).sub_(terms[-2]))
    return terms


def combined(coefficients: Tensor, terms: list[Tensor]) -> Tensor:
    """sum over k of a_k times term k, a (k, w) and terms (n, w)."""
    out = coefficients[0] * terms[0]
    for a, term in zip(coefficients[1:], terms[1:], strict=True):
        out.addcmul_(a, term)
    return out


class Filter(torch.autograd.Function):
    """sum over k of a_k T_k(L - I) x, of x (n, w) and a (k, w).

    L is symmetric, so <T_k x, g> = <x, T_k g>: the terms of a gradient g make both gradients, and
    those of x need not be kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, coefficients: Tensor, *neighbours: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, coefficients, *neighbours)
        terms = polynomials(x, len(coefficients) - 1, Neighbours(*neighbours))
        return combined(coefficients, terms)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, coefficients, *neighbours = ctx.saved_tensors
        step = Step.apply if torch.is_grad_enabled() else stepped
        order = len(coefficients) - 1
        terms = polynomials(gradient, order, Neighbours(*neighbours), step)
        by_x = by_coefficients = None
        if ctx.needs_input_grad[0]:
            by_x = combined(coefficients, terms)
        if ctx.needs_input_grad[1]:
            by_coefficients = torch.stack([(x * term).sum(0) for term in terms])
        return by_x, by_coefficients, None, None, None


def filtered(x: Tensor, coefficients: Tensor, neighbours: Neighbours) -> Tensor:
    """Same as the reference, of neighbours; cost (order) x (n + e) x h d, and kept are n x h d.

    In float32 at least: a recurrence rounds at each of its steps. Heads and their channels are one
    row, so that a coefficient is multiplied along it and not spread over a few channels at a time.
    """
    exact = wide(x).flatten(1)
    weights = neighbours.weights.to(exact.dtype)
    by_channel = coefficients.to(exact).expand(-1, *x.shape[1:]).flatten(1)
    out = Filter.apply(exact, by_channel, *neighbours._replace(weights=weights))
    return out.view(x.shape).to(x.dtype)
