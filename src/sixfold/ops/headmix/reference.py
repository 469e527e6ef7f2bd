"""What graph mixing of heads means, written out edge by edge."""

from __future__ import annotations

import torch
from torch import Tensor


def headmix(heads: Tensor, weight_self: Tensor, weight_neighbour: Tensor, graph: Tensor) -> Tensor:
    """Mixture of each head with its neighbours, before the gate.

    M_i = relu(graph_ii * W_self H_i + sum over j != i of graph_ij * W_neighbour H_j)

    Args:
        heads: head outputs H, (b, n, h, d).
        weight_self: W_self, (d, d), applied as H @ W_self.
        weight_neighbour: W_neighbour, (d, d).
        graph: (h, h); the diagonal holds lambda_i, the rest the edge gains g_ij (0: no edge).

    Returns:
        (b, n, h, d).
    """
    mixed = []
    for i in range(heads.shape[2]):
        total = graph[i, i] * (heads[:, :, i] @ weight_self)
        for j in range(heads.shape[2]):
            if j != i:
                total = total + graph[i, j] * (heads[:, :, j] @ weight_neighbour)
        mixed.append(torch.relu(total))
    return torch.stack(mixed, dim=2)


def mix(
    heads: Tensor, weight_self: Tensor, weight_neighbour: Tensor, graph: Tensor, gate: Tensor
) -> Tensor:
    """Gated sum H + gate_i * M_i of heads and their mixture; gate (h,)."""
    mixed = headmix(heads, weight_self, weight_neighbour, graph)
    return heads + gate[:, None] * mixed
