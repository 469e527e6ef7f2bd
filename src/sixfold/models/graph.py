"""A classifier of whole graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sixfold.attention.graph import Topology
from sixfold.contracts import Graph
from sixfold.discover import unknown
from sixfold.models._block import given
from sixfold.models.node import NodeClassifier, Norm

POOLINGS = ("mean", "sum", "attention")


class GraphClassifier(NodeClassifier):
    """Blocks of graph attention, one state pooled from the nodes of each graph, a linear head.

    logits_g = W sum over nodes i of graph g of a_i h_i + b,  with a_i = 1 / n_g (``mean``), 1
    (``sum``), or softmax over the graph of w h_i (``attention``)

    Args:
        features: numbers known of a node.
        num_classes: number of classes.
        d_model: width.
        num_layers: blocks.
        attention: options of `SpectralGraphAttention`, for all layers or one mapping per layer.
        norm: ``layer``, ``batch`` or ``none``, as in `NodeClassifier`.
        residual: add what goes into a layer to what comes out of it.
        dropout: probability of dropping a feature after the embedding and after each layer.
        pooling: ``mean``, ``sum`` or ``attention``.

    Raises:
        ValueError: as `NodeClassifier`, and for a pooling that does not exist.

    >>> ring = torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]])
    >>> graph = Graph(torch.randn(4, 5), ring, torch.tensor([0, 0, 0, 1]))
    >>> GraphClassifier(features=5, num_classes=2)(graph).shape
    torch.Size([2, 2])
    """

    def __init__(  # noqa: PLR0913 - as of nodes
        self,
        features: int,
        num_classes: int,
        d_model: int = 64,
        num_layers: int = 2,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {"num_heads": 4},
        norm: Norm = "layer",
        residual: bool = True,  # noqa: FBT001, FBT002 - read from files
        dropout: float = 0.0,
        pooling: Literal["mean", "sum", "attention"] = "mean",
    ) -> None:
        arguments = given(locals())
        super().__init__(
            features, num_classes, d_model, num_layers, attention, norm, residual, dropout
        )
        self.arguments = arguments
        if pooling not in POOLINGS:
            raise ValueError(unknown("pooling", pooling, POOLINGS))
        self.pooling = pooling
        self.rate = nn.Linear(d_model, 1, bias=False) if pooling == "attention" else None

    def forward(self, graph: Graph) -> Tensor:
        """Logits (g, num_classes) of each of the graphs that lie side by side."""
        there = Topology.of(graph)
        return self.head(self.pooled(self.states(graph, there), there))

    def pooled(self, x: Tensor, there: Topology) -> Tensor:
        """One state (g, d_model) for every graph, of states x (n, d_model) of its nodes."""
        rows, real = there.rows(x), there.real[..., None]
        dtype = torch.promote_types(x.dtype, torch.float32)  # of many nodes half would overflow
        if self.pooling == "attention":
            shares = self.rate(rows).masked_fill(~real, -torch.inf).softmax(1, dtype=dtype)
            return (shares * rows).sum(1).to(x.dtype)
        total = rows.sum(1, dtype=dtype)
        return (total if self.pooling == "sum" else total / real.sum(1)).to(x.dtype)


build = GraphClassifier
