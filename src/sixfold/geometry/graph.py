"""Head graphs as adjacency matrices, and their Laplacians."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def ring(num_nodes: int) -> Tensor:
    """A cycle: node i is joined to i - 1 and i + 1.

    >>> ring(5).sum(1)
    tensor([2., 2., 2., 2., 2.])
    """
    matrix = torch.zeros(num_nodes, num_nodes, device="cpu")
    nodes = torch.arange(num_nodes, device="cpu")
    matrix[nodes, (nodes + 1) % num_nodes] = 1.0
    matrix = torch.maximum(matrix, matrix.T)
    return matrix.fill_diagonal_(0.0)


def complete(num_nodes: int) -> Tensor:
    """Every node joined to every other.

    >>> int(complete(4).sum())
    12
    """
    return torch.ones(num_nodes, num_nodes, device="cpu").fill_diagonal_(0.0)


def rewire(adjacency: Tensor, seed: int, swaps_per_edge: int = 20) -> Tensor:
    """A random simple graph with the same degree at every node.

    Double edge swaps: (a-b, c-d) become (a-d, c-b) where that makes neither a loop nor a double
    edge. Source: Maslov and Sneppen, Science 296 (2002), the degree-preserving null model.
    """
    generator = np.random.default_rng(seed)
    matrix = adjacency.numpy().astype(bool)
    edges = np.argwhere(np.triu(matrix))
    for _ in range(swaps_per_edge * len(edges)):
        first, second = generator.integers(len(edges), size=2)
        (a, b), (c, d) = edges[first], edges[second][:: generator.choice([1, -1])]
        if len({a, b, c, d}) < 4 or matrix[a, d] or matrix[c, b]:
            continue
        for left, right, present in ((a, b, False), (c, d, False), (a, d, True), (c, b, True)):
            matrix[left, right] = matrix[right, left] = present
        edges[first], edges[second] = (a, d), (c, b)
    return torch.from_numpy(matrix.astype(np.float32))


def undirected(adjacency: Tensor, device: torch.device | str | None = None) -> Tensor:
    """The weights (n, n) of an undirected graph, float64, on the device they are on unless given.

    Raises ValueError for what is no tensor, not square, not symmetric, or holds a weight that is
    not finite or below 0.

    >>> undirected(torch.tensor([[0.0, -1.0], [-1.0, 0.0]]))
    Traceback (most recent call last):
    ValueError: adjacency must hold finite weights of 0 or more, got -1.0 at (0, 1)
    """
    if not isinstance(adjacency, Tensor):
        raise ValueError(f"adjacency must be a tensor (n, n), got a {type(adjacency).__name__}")
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency must be (n, n), got {tuple(adjacency.shape)}")
    weights = adjacency.detach().to(device=device, dtype=torch.float64)
    wrong = (~(weights.isfinite() & (weights >= 0))).nonzero().tolist()
    if wrong:
        row, column = wrong[0]
        raise ValueError(
            "adjacency must hold finite weights of 0 or more, "
            f"got {weights[row, column].item()} at ({row}, {column})"
        )
    if not torch.equal(weights, weights.T):
        worst = (weights - weights.T).abs().max().item()
        raise ValueError(f"adjacency must be symmetric, entries differ by up to {worst:.3g}")
    return weights


def laplacian(adjacency: Tensor, *, normalized: bool = False) -> Tensor:
    """L = D - A, or I - D^(-1/2) A D^(-1/2) with eigenvalues in [0, 2].

    Isolated nodes get a zero row in both. Source: Chung, Spectral Graph Theory (1997), ch. 1.

    >>> laplacian(ring(3)).diagonal()
    tensor([2., 2., 2.])
    """
    degree = adjacency.sum(-1)
    if not normalized:
        return torch.diag(degree) - adjacency
    scale = torch.where(degree > 0, degree.rsqrt(), torch.zeros_like(degree))
    return torch.diag((degree > 0).to(adjacency.dtype)) - scale[:, None] * adjacency * scale
