"""Attention over any graph, nodes as tokens: along its edges by a filter, past them by a softmax.

The filter of a head is a polynomial of the graph's Laplacian: it knows the graph and reaches as
many edges far as its degree. The softmax runs over all nodes of the same graph, so that what the
edges would squash through a narrow place has a way around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_share, check_whole
from sixfold.attention.multihead import Part, build_part
from sixfold.attention.projection.linear import split_heads
from sixfold.contracts import Features, Graph, Heads, Visibility
from sixfold.discover import unknown
from sixfold.geometry.spectrum import polynomials
from sixfold.ops.attend import choose
from sixfold.ops.graphfilter import fused, reference
from sixfold.ops.graphfilter.fused import Neighbours

GATE = 0.1
"""Where gates begin: at 0 scores would get no gradient, at 1 filters would learn in their noise."""


class Topology(NamedTuple):
    """What layers need to know of a graph, found once for all of them.

    edges (2, e) and neighbours, the same as lists; member (n,) and place (n,): which graph a node
    belongs to, and its number in there; real (g, m): True where a graph has an m-th node.
    """

    edges: Tensor
    neighbours: Neighbours
    member: Tensor
    place: Tensor
    real: Tensor

    @classmethod
    def of(cls, graph: Graph) -> Topology:
        """The topology of a graph, or of several side by side.

        Raises ValueError for what is no `Graph`, for edges that do not come back or lead to another
        graph, and for members that do not ascend from 0 by steps of 1.

        >>> edges, member = torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 0, 1])
        >>> Topology.of(Graph(torch.zeros(3, 1), edges, member)).real.int().tolist()
        [[1, 1], [1, 0]]
        """
        if not isinstance(graph, Graph):
            raise ValueError(f"graph must be a Graph of nodes, edges and member, got {graph!r:.60}")
        nodes, edges, member = graph
        for name, part in graph._asdict().items():
            if not isinstance(part, Tensor):
                raise ValueError(f"{name} of a graph must be a tensor, got {part!r}")
        if member.shape != nodes.shape[:1] or not len(member) or member.dtype != torch.int64:
            raise ValueError(
                f"member must be int64 (n,) beside nodes (n, features), n 1 or more, "
                f"got {member.dtype} {tuple(member.shape)} beside {tuple(nodes.shape)}"
            )
        if int(member[0]) != 0 or not set(member.diff().unique().tolist()) <= {0, 1}:
            raise ValueError("member must ascend from 0 by steps of 1: every graph has nodes")
        neighbours = Neighbours.of(edges, len(member))
        apart = (member[edges[0]] != member[edges[1]]).nonzero()
        if len(apart):
            source, target = edges[:, int(apart[0])].tolist()
            raise ValueError(
                f"edges must stay in their graph, but nodes {source} and {target} belong to "
                f"graphs {int(member[source])} and {int(member[target])}"
            )
        count = member.bincount()
        place = torch.arange(len(member), device=member.device) - (count.cumsum(0) - count)[member]
        real = torch.arange(int(count.max()), device=member.device) < count[:, None]
        return cls(edges, neighbours, member, place, real)

    def rows(self, of_nodes: Tensor) -> Tensor:
        """(n, ...) as one row for every graph, (g, m, ...), zeros where it has no m-th node."""
        if len(self.real) == 1:
            return of_nodes[None]
        rows = of_nodes.new_zeros(*self.real.shape, *of_nodes.shape[1:])
        return rows.index_put((self.member, self.place), of_nodes)

    def nodes(self, rows: Tensor) -> Tensor:
        """(g, m, ...) as (n, ...)."""
        return rows[0] if len(rows) == 1 else rows[self.member, self.place]


def walk(steps: int) -> Tensor:
    """Chebyshev coefficients (steps + 1,), float64, of a lazy random walk: (1 - lambda / 2)^steps.

    With lambda - 1 = -cos t it is cos(t / 2)^(2 steps), whose cosines are binomial coefficients.

    >>> walk(1)  # 1/2 T_0 - 1/2 T_1(lambda - 1)
    tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    terms = [(-1) ** k * 2 * math.comb(2 * steps, steps - k) / 4**steps for k in range(steps + 1)]
    return torch.tensor([terms[0] / 2, *terms[1:]], dtype=torch.float64, device="cpu")


def check(order: int | None, per: str, score: Part | None, dropout: float, impl: str) -> None:
    """Raise ValueError for options that cannot be meant, or that nothing would read."""
    if order is None and score is None:
        raise ValueError("order and score cannot both be None: nodes would not meet")
    if order is not None and (isinstance(order, bool) or not isinstance(order, int) or order < 0):
        raise ValueError(f"order must be a whole number of 0 or more, or None, got {order!r}")
    if per not in ("head", "channel"):
        raise ValueError(unknown("per", per, ("head", "channel")))
    check_share("dropout", dropout)
    if order is None and per != "head":
        raise ValueError(f"per says whose a filter is, and order None has none: got {per!r}")
    if score is None:
        choose.check(Features, impl)
        if dropout:
            raise ValueError(f"dropout drops weights of a score, which is None: got {dropout}")


class SpectralGraphAttention(nn.Module):
    """Each head filters its values by the spectrum of the graph, and attends to all of its nodes.

    O_h = g_h(L) V_h + gate_h softmax(score(Q_h, K_h)) V_h,   g_h(L) = sum over k of a_hk T_k(L - I)

    L is the normalised Laplacian, T_k are Chebyshev's polynomials. Nothing of the size n x n is
    held, and no eigenvectors are found: a filter takes `order` steps along the edges. Graphs side
    by side do not meet; where they attend, each takes as much room as the largest of them. A fresh
    filter is a lazy random walk of `order` steps, and the gates begin at 0.1. The O_h stand side by
    side; as in a graph convolution, no output map follows.

    Args:
        d_model: width of inputs and outputs.
        num_heads: heads, each with its filter and d_model // num_heads channels.
        order: degree of the filters, or None for attention alone (then without gates).
        per: one filter for each ``head`` or for each ``channel`` of a head.
        score: how nodes rate one another, any score of points of `MultiHeadAttention`, or None for
            filters alone.
        dropout: probability of dropping an attention weight in training.
        impl: as in `MultiHeadAttention`; ``reference`` also filters by dense matrices, and
            serves `torch.func`.
        device: as in PyTorch.
        dtype: as in PyTorch.

    Raises:
        ValueError: for sizes that do not divide, an order below 0, an unknown score or one of
            beliefs, where there is neither order nor score, and for a per or dropout that nothing
            would read.

    Source: Defferrard et al., arXiv 1606.09375, section 2.1 (filters); Alon and Yahav,
    arXiv 2006.05205 (over-squashing, and a layer on all pairs against it).

    >>> ring = torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]])
    >>> graph = Graph(torch.randn(3, 8), ring, torch.zeros(3, dtype=torch.int64))
    >>> layer = SpectralGraphAttention(8, 2, order=2)
    >>> layer(graph.nodes, graph).shape
    torch.Size([3, 8])
    >>> layer.response([0.0, 1.0, 2.0])[0, 0]  # of head 0: (1 - lambda / 2)^2
    tensor([1.0000, 0.2500, 0.0000], grad_fn=<SelectBackward0>)
    """

    def __init__(  # noqa: PLR0913 - an attention module is its vocabulary
        self,
        d_model: int,
        num_heads: int,
        *,
        order: int | None = 3,
        per: Literal["head", "channel"] = "head",
        score: Part | None = "dot",
        dropout: float = 0.0,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole(d_model=d_model, num_heads=num_heads)
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")
        check(order, per, score, dropout, impl)
        self.heads = heads = Heads(d_model, num_heads, d_model // num_heads, num_heads)
        factory = {"device": device, "dtype": dtype}
        self.dropout, self.impl = dropout, impl
        self.value = nn.Linear(d_model, d_model, bias=False, **factory)
        self.queries_keys = self.score = self.coefficients = self.gate = None
        if score is not None:
            self.score = build_part("score", score, heads, **factory)
            if self.score.schema != "point":
                raise ValueError(f"score {score!r} rates a {self.score.schema}, a node is a point")
            choose.check(self.score.gives, impl)
            self.queries_keys = nn.Linear(d_model, 2 * d_model, bias=False, **factory)
        if order is not None:
            filters = (num_heads, heads.head_dim if per == "channel" else 1)
            self.coefficients = nn.Parameter(torch.empty(order + 1, *filters, **factory))
            with torch.no_grad():
                self.coefficients.copy_(walk(order)[:, None, None])
            if score is not None:
                self.gate = nn.Parameter(torch.full((num_heads,), GATE, **factory))
        for linear in (m for m in self.children() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, graph: Graph | Topology) -> Tensor:
        """Filter and attend from nodes x (n, d_model) to those of the same graph.

        Args:
            x: (n, d_model), in the order of the graph's nodes.
            graph: whose edges and members are meant; where several layers see the same graph, its
                `Topology.of` saves finding it for each.

        Returns:
            (n, d_model).

        Raises:
            ValueError: for x of another shape, and for graphs as in `Topology.of`.
        """
        there = graph if isinstance(graph, Topology) else Topology.of(graph)
        if x.shape != (len(there.member), self.heads.d_model) or not x.is_floating_point():
            raise ValueError(
                f"x must be floating (n, d_model) = {(len(there.member), self.heads.d_model)}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        value = self.value(x).unflatten(-1, (-1, self.heads.head_dim))
        if self.coefficients is None:
            return self.attended(x, value, there).flatten(1)
        out = self.filtered(value, there).flatten(1)
        if self.gate is not None:
            gate = self.gate.to(out.dtype)[:, None].expand(-1, self.heads.head_dim).flatten()
            out = torch.addcmul(out, gate, self.attended(x, value, there).flatten(1))
        return out

    def filtered(self, value: Tensor, there: Topology) -> Tensor:
        """g_h(L) V_h of values (n, h, d), same shape out."""
        if self.impl == "reference":
            return reference.filtered(value, self.coefficients, there.edges)
        return fused.filtered(value, self.coefficients, there.neighbours)

    def attended(self, x: Tensor, value: Tensor, there: Topology) -> Tensor:
        """What the nodes x attend to among values (n, h, d), same shape out."""
        query, key = there.rows(self.queries_keys(x)).chunk(2, dim=-1)
        query, key = (split_heads(part, self.heads.head_dim) for part in (query, key))
        rating = self.score(query, self.score.keys(key))
        mask = there.real[:, None, None] if len(there.real) > 1 else None
        visibility = Visibility(mask, is_causal=False)
        dropout = self.dropout if self.training else 0.0
        rows = there.rows(value).transpose(1, 2)
        out = choose.attend(rating, rows, visibility, dropout, self.impl)
        return there.nodes(out.transpose(1, 2))

    def response(self, lambdas: Tensor | Sequence[float]) -> Tensor:
        """g(lambda) at eigenvalues (e,) in [0, 2]: (h, d, e), or (h, 1, e) with one per head.

        Raises ValueError for a layer without filters.
        """
        if self.coefficients is None:
            raise ValueError("a layer with order None has no filters")
        lambdas = torch.as_tensor(lambdas).to(self.coefficients)
        basis = polynomials(lambdas, len(self.coefficients) - 1)
        return torch.einsum("khd,ke->hde", self.coefficients, basis)
