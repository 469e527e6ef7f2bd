"""Graph mixing as one matrix product over all concatenated heads."""

from __future__ import annotations

import torch
from torch import Tensor


def operator(weight_self: Tensor, weight_neighbour: Tensor, graph: Tensor) -> Tensor:
    """The linear part as one matrix K, (h d, h d): row block j, column block i.

    K[j, i] = graph_ij * (W_self if i == j else W_neighbour), so that mix = relu(vec(H) K).
    """
    num_heads, width = graph.shape[0], weight_self.shape[0]
    own = torch.diag(graph.diagonal())
    blocks = torch.einsum("ij,ab->jaib", graph - own, weight_neighbour)
    blocks = blocks + torch.einsum("ij,ab->jaib", own, weight_self)
    return blocks.reshape(num_heads * width, num_heads * width)


def headmix(heads: Tensor, weight_self: Tensor, weight_neighbour: Tensor, graph: Tensor) -> Tensor:
    """Same as the reference, in one product: cost b n (h d)^2, cheapest for narrow layers."""
    mixed = heads.flatten(2) @ operator(weight_self, weight_neighbour, graph)
    return torch.relu(mixed).view_as(heads)
