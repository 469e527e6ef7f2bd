"""What filtering a signal over a graph means, with every matrix written out."""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.geometry.graph import laplacian


def filtered(x: Tensor, coefficients: Tensor, edges: Tensor) -> Tensor:
    """g_c(L) x_c = sum over k of a_kc T_k(L - I) x_c, channel by channel.

    L is the normalised Laplacian of A, where A_ij counts the edges from j to i, and T_k are
    Chebyshev's polynomials, whose argument then lies in [-1, 1].

    Args:
        x: (n, h, d).
        coefficients: a, (order + 1, h, d), or (order + 1, h, 1) where a head has one filter.
        edges: (2, e), from and to, an undirected edge twice.

    Returns:
        (n, h, d). Takes n^2 numbers for each order.
    """
    adjacency = x.new_zeros(len(x), len(x))
    ones = x.new_ones(edges.shape[1])
    adjacency = adjacency.index_put((edges[1], edges[0]), ones, accumulate=True)
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    shifted = laplacian(adjacency, normalized=True) - identity
    terms = [identity, shifted]
    for _ in range(len(coefficients) - 2):
        terms.append(2 * shifted @ terms[-1] - terms[-2])
    operators = torch.stack(terms[: len(coefficients)])
    weights = coefficients.to(x.dtype).expand(-1, *x.shape[1:])
    return torch.einsum("khd,kij,jhd->ihd", weights, operators, x)
