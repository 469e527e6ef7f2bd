"""Over-squashing: how much a node's output still depends on nodes that are far from it.

    S_vu = || d h_v / d x_u ||   (Frobenius)

with x the nodes a model reads and h what it makes of them. A model that only passes messages to
neighbours has S_vu = 0 beyond as many hops as it has layers, and within them S_vu falls with the
number of walks from u to v; one with attention over all nodes has no such bound.
Source: Topping et al. 2022 (arXiv:2111.14522), section 2; Di Giovanni et al. 2023
(arXiv:2302.02941), section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sixfold.contracts import Graph
from sixfold.geometry.resistance import Quartiles, by_distance, hop_distance


def sensitivity(
    model: Callable[[Graph], Tensor], graph: Graph, targets: Tensor | None = None
) -> Tensor:
    """S (t, n): how much the output of each target depends on each node, exactly, by autograd.

    One backward pass for each target and channel of the output; no gradient reaches parameters. A
    model that draws random numbers, dropout for one, has to be in evaluation mode.

    Args:
        model: a graph to outputs (n, d), logits or states.
        graph: its nodes are what is differentiated by.
        targets: (t,), int64, the nodes whose outputs are looked at; all of them without it.

    Raises:
        ValueError: for nodes that are no real numbers, targets that are no nodes, and outputs that
            are not one row per node.

    >>> graph = Graph(torch.ones(3, 2), torch.tensor([[0, 1], [1, 0]]), torch.zeros(3).long())
    >>> mean = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    >>> sensitivity(lambda graph: mean @ graph.nodes[:, :1], graph)
    tensor([[0.5000, 0.5000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    if not graph.nodes.is_floating_point():
        raise ValueError(f"nodes must be real to differentiate by them, got {graph.nodes.dtype}")
    count = len(graph.nodes)
    chosen = list(range(count)) if targets is None else _numbers(targets, count)
    with torch.enable_grad():
        nodes = graph.nodes.detach().requires_grad_()
        outputs = model(graph._replace(nodes=nodes))
        if outputs.ndim != 2 or len(outputs) != count:
            raise ValueError(f"outputs must be ({count}, d), got {tuple(outputs.shape)}")
        return torch.stack([_row(outputs[target], nodes) for target in chosen])


def _numbers(targets: Tensor, count: int) -> list[int]:
    """Nodes that are looked at, of so many."""
    shown = (
        f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else repr(targets)
    )
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 1:
        raise ValueError(f"targets must be a tensor (t,), int64, of numbers of nodes, got {shown}")
    wrong = [node for node in targets.tolist() if not 0 <= node < count]
    if wrong or not len(targets):
        raise ValueError(f"targets must be nodes in [0, {count}), one or more, got {wrong}")
    return targets.tolist()


def _row(output: Tensor, nodes: Tensor) -> Tensor:
    """|| d output / d nodes_u || for every node u, (n,)."""
    if not output.requires_grad:
        return nodes.new_zeros(len(nodes))
    squares = nodes.new_zeros(len(nodes))
    for channel in output:
        (slope,) = torch.autograd.grad(
            channel, nodes, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        squares += slope.flatten(1).square().sum(1)
    return squares.sqrt()


def sensitivity_by_distance(
    model: Callable[[Graph], Tensor], graph: Graph, targets: Tensor | None = None
) -> Quartiles:
    """Quartiles of S_vu over pairs of a target v and a node u, for each distance in hops.

    Pairs that no path joins are left out.

    Args:
        model: as of `sensitivity`.
        graph: likewise; its edges must be undirected.
        targets: likewise.

    Raises:
        ValueError: as `sensitivity`, and for edges without their reverse.

    >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> graph = Graph(torch.ones(3, 1), edges, torch.zeros(3).long())
    >>> found = sensitivity_by_distance(lambda graph: 2 * graph.nodes, graph)
    >>> found.distance.tolist(), found.median.tolist(), found.count.tolist()
    ([0.0, 1.0, 2.0], [2.0, 0.0, 0.0], [3, 4, 2])
    """
    count = len(graph.nodes)
    adjacency = torch.zeros(count, count, device=graph.edges.device)
    adjacency[graph.edges[0], graph.edges[1]] = 1.0
    hops = hop_distance(adjacency)
    found = sensitivity(model, graph, targets)
    return by_distance(found, hops if targets is None else hops[targets])
