"""How far apart the nodes of a graph are: in hops, in ohms, in steps of a random walk.

Weights of edges are conductances. Between parts of a graph that do not meet every distance here is
infinite: an answer, not an error, so what sums or averages over pairs must say what it leaves out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sixfold.geometry.graph import laplacian, undirected


class Quartiles(NamedTuple):
    """A quantity over the pairs of nodes at each distance: its middle half, and how many they are.

    distance, low, median, high and count are (k,), distances ascending.
    """

    distance: Tensor
    low: Tensor
    median: Tensor
    high: Tensor
    count: Tensor


def hop_distance(adjacency: Tensor) -> Tensor:
    """Edges of the shortest path between every two nodes, (n, n), float64; infinite without one.

    A breadth-first search from all nodes together, so it takes as many steps as the diameter.

    Args:
        adjacency: (n, n), symmetric, weights 0 or more; any weight above 0 is one hop.

    Raises:
        ValueError: for a matrix that is not square, symmetric, finite and without negative weights.

    >>> from sixfold.geometry.graph import ring
    >>> hop_distance(ring(6))[0]
    tensor([0., 1., 2., 3., 2., 1.], dtype=torch.float64)
    """
    joined = undirected(adjacency) > 0
    edges, distance = joined.double(), torch.full_like(joined, torch.inf, dtype=torch.float64)
    front = torch.eye(len(joined), dtype=torch.float64, device=joined.device)
    hops = 0
    while front.any():
        distance[front > 0] = hops
        hops += 1
        front = ((front @ edges > 0) & distance.isinf()).double()
    return distance


def effective_resistance(adjacency: Tensor) -> Tensor:
    """Resistance between every two nodes where an edge of weight w conducts w, (n, n), float64.

        R_uv = (e_u - e_v)' L^+ (e_u - e_v),   L = D - A

    Infinite between nodes that no path joins. Over the edges of a graph w_uv R_uv sums to the
    number of nodes less that of its parts (Foster).

    Args:
        adjacency: (n, n), symmetric, weights 0 or more.

    Raises:
        ValueError: as `hop_distance`.

    Source: Klein and Randic, J. Math. Chem. 12 (1993); Black et al. 2023 (arXiv:2302.06835),
    section 2.

    >>> from sixfold.geometry.graph import ring
    >>> effective_resistance(ring(4))[0]  # one way of length 2 beside another: 1; 1 beside 3: 3/4
    tensor([0.0000, 0.7500, 1.0000, 0.7500], dtype=torch.float64)
    """
    weights, joined = undirected(adjacency), hop_distance(adjacency).isfinite()
    # constants of each part are all that L sends to 0: with their projector it can be inverted,
    # and what that adds to the inverse is the same at both ends of a pair
    constants = joined.double() / joined.sum(1)
    inverse = torch.linalg.inv(laplacian(weights) + constants)
    at = inverse.diagonal()
    resistance = (at[:, None] + at - (inverse + inverse.T)).clamp(min=0.0).fill_diagonal_(0.0)
    return resistance.masked_fill(~joined, torch.inf)


def commute_time(adjacency: Tensor) -> Tensor:
    """Expected steps of a random walk from u to v and back, (n, n), float64.

        C_uv = R_uv * the sum of all degrees in the part of the graph that holds u and v

    Infinite between nodes that no path joins.

    Args:
        adjacency: (n, n), symmetric, weights 0 or more: a step takes an edge by its weight.

    Raises:
        ValueError: as `hop_distance`.

    Source: Chandra et al., STOC 1989, theorem 2.1.

    >>> from sixfold.geometry.graph import ring
    >>> round(float(commute_time(ring(6))[0, 3]), 9)  # n / 4 ohms, 2 n of degree: n^2 / 2
    18.0
    """
    weights, resistance = undirected(adjacency), effective_resistance(adjacency)
    volume = resistance.isfinite().double() @ weights.sum(1)
    return resistance * volume


def total_resistance(adjacency: Tensor) -> float:
    """The sum of effective resistances over all pairs of nodes: how narrow a graph is, in ohms.

        R = sum over u < v of R_uv = n * sum over lambda > 0 of 1 / lambda

    Infinite for a graph of several parts: take each by itself.

    Args:
        adjacency: (n, n), symmetric, weights 0 or more.

    Raises:
        ValueError: as `hop_distance`.

    Source: Black et al. 2023 (arXiv:2302.06835), section 4.

    >>> from sixfold.geometry.graph import complete
    >>> round(total_resistance(complete(5)), 9)  # n - 1
    4.0
    """
    return float(effective_resistance(adjacency).sum()) / 2


def by_distance(values: Tensor, distance: Tensor) -> Quartiles:
    """Quartiles of a quantity over pairs of nodes, one row for every finite distance.

    Args:
        values: any shape, a number per pair.
        distance: the same shape; pairs that are infinitely far apart are left out.

    Raises:
        ValueError: for shapes that differ, or where every pair is infinitely far apart.

    >>> from sixfold.geometry.graph import ring
    >>> found = by_distance(effective_resistance(ring(4)), hop_distance(ring(4)))
    >>> found.distance.tolist(), [round(x, 6) for x in found.median.tolist()]
    ([0.0, 1.0, 2.0], [0.0, 0.75, 1.0])
    """
    if values.shape != distance.shape:
        raise ValueError(
            f"values and distance must have one shape, got {tuple(values.shape)} and "
            f"{tuple(distance.shape)}"
        )
    places = distance[distance.isfinite()].unique()
    if not len(places):
        raise ValueError("distance must be finite for a pair, got none: no path joins them")
    fractions = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=values.device)
    groups = [values[distance == place].double() for place in places]
    low, median, high = torch.stack([group.quantile(fractions) for group in groups]).unbind(1)
    return Quartiles(places, low, median, high, torch.tensor([len(group) for group in groups]))
