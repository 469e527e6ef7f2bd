"""A classifier of the nodes of a graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import relu

from sixfold.attention.allowed import check_flags, check_share, check_whole
from sixfold.attention.graph import SpectralGraphAttention, Topology
from sixfold.contracts import Graph
from sixfold.discover import unknown
from sixfold.models._block import given, per_layer

OPTIONS = tuple(inspect.signature(SpectralGraphAttention).parameters)[1:]
"""What can be said of a layer of graph attention, beside its width."""

NORMS = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
Norm = Literal["none", "layer", "batch"]


class GraphBlock(nn.Module):
    """drop(relu(norm(attention(x) + x))), without the last x where there is no residual."""

    def __init__(
        self,
        d_model: int,
        attention: Mapping[str, Any],
        norm: str,
        dropout: float,
        *,
        residual: bool,
    ) -> None:
        super().__init__()
        self.attention = SpectralGraphAttention(d_model, **attention)
        self.norm, self.drop = NORMS[norm](d_model), nn.Dropout(dropout)
        self.residual = residual

    def forward(self, x: Tensor, graph: Topology) -> Tensor:
        """(n, d_model) in and out."""
        update = self.attention(x, graph)
        return self.drop(relu(self.norm(update + x if self.residual else update)))


class NodeClassifier(nn.Module):
    """Blocks of graph attention over all nodes, and a linear head on each.

    h_0 = drop(W_in nodes + b_in),  h_l = drop(relu(norm(attention_l(h) + h))),  logits = W h + b

    Args:
        features: numbers known of a node.
        num_classes: number of classes.
        d_model: width.
        num_layers: blocks.
        attention: options of `SpectralGraphAttention`, for all layers or one mapping per layer.
        norm: ``layer``, ``batch`` or ``none``. Under ``batch`` nodes meet in training, whatever
            graph they belong to.
        residual: add what goes into a layer to what comes out of it.
        dropout: probability of dropping a feature after the embedding and after each layer.

    Raises:
        ValueError: for sizes below 1, a norm that does not exist, and other nodes.

    Source: what a tuned graph convolution takes, Luo et al., arXiv 2406.08993, section 3.

    >>> import torch
    >>> ring = torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]])
    >>> graph = Graph(torch.randn(3, 5), ring, torch.zeros(3, dtype=torch.int64))
    >>> NodeClassifier(features=5, num_classes=2)(graph).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        d_model: int = 64,
        num_layers: int = 2,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {"num_heads": 4},
        norm: Norm = "layer",
        residual: bool = True,  # noqa: FBT001, FBT002 - read from files
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.arguments = given(locals())
        sizes = {"features": features, "num_classes": num_classes, "d_model": d_model}
        check_whole(**sizes, num_layers=num_layers)
        check_share("dropout", dropout)
        check_flags(residual=residual)
        if norm not in NORMS:
            raise ValueError(unknown("norm", norm, NORMS))
        layers = per_layer(attention, num_layers, OPTIONS)
        self.embedding = nn.Linear(features, d_model)
        nn.init.xavier_uniform_(self.embedding.weight)
        nn.init.zeros_(self.embedding.bias)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            GraphBlock(d_model, options, norm, dropout, residual=residual) for options in layers
        )
        self.head = nn.Linear(d_model, num_classes)
        nn.init.normal_(self.head.weight, std=d_model**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, graph: Graph) -> Tensor:
        """Logits (n, num_classes) of every node of a graph, or of several side by side."""
        return self.head(self.states(graph, Topology.of(graph)))

    def states(self, graph: Graph, there: Topology) -> Tensor:
        """What the blocks make of the nodes, (n, d_model)."""
        features = self.embedding.in_features
        if graph.nodes.ndim != 2 or graph.nodes.shape[1] != features:
            raise ValueError(f"nodes must be (n, {features}), got {tuple(graph.nodes.shape)}")
        if not graph.nodes.is_floating_point():
            raise ValueError(f"nodes must be floating, got {graph.nodes.dtype}")
        x = self.drop(self.embedding(graph.nodes))
        for block in self.blocks:
            x = block(x, there)
        return x


build = NodeClassifier
