"""Hierarchical attention by the names of the second document.

A cluster is a list of agents, neighbours in the sequence. Consensus is KL both ways below the
threshold between neighbours, in the frame that all share.

A hierarchy is a graph, ``nodes`` and ``edges``. Nodes are listed finer scales first. Edges (2, e)
lead from a part to the whole: row 0 is a child and row 1 its parent, each by its number in `nodes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sixfold.attention import hierarchy
from sixfold.attention.allowed import check_flags, check_whole
from sixfold.attention.beliefs import believe, divergence_score
from sixfold.attention.multihead import Part, check_sizes
from sixfold.attention.named.emergent import EmergentHierarchicalAttention as Attention
from sixfold.attention.reach.hierarchical import check_threshold
from sixfold.compat.gauge.agents import Agent, stack, tokens_as_agents
from sixfold.models._block import Block

__all__ = [
    "EmergentHierarchicalAttention",
    "HierarchicalConfig",
    "HierarchicalTransformerBlock",
    "MetaAgent",
    "SoftConsensusDetector",
    "build_hierarchy_graph",
    "condense",
    "detect_consensus",
    "detect_consensus_groups",
]


class MetaAgent(NamedTuple):
    """What a cluster became: a belief in the frame that all share."""

    mu_q: Tensor
    Sigma_q: Tensor
    constituents: tuple[Agent, ...]
    scale: int = 1


@dataclass(frozen=True)
class HierarchicalConfig:
    """When tokens condense: in every how many layers, and below which divergence.

    Raises ValueError for an interval that is no whole number of 1 or more, and a threshold that is
    no number of 0 or more.
    """

    consensus_check_interval: int = 1
    consensus_kl_threshold: float = 0.01

    def __post_init__(self) -> None:
        check_whole(consensus_check_interval=self.consensus_check_interval)
        check_threshold("consensus_kl_threshold", self.consensus_kl_threshold)


def detect_consensus_groups(
    agents: Sequence[Agent], kl_threshold: float = 0.01
) -> list[list[Agent]]:
    """The longest runs of two or more agents whose neighbours agree.

    Raises ValueError for a threshold that is no number of 0 or more.

    >>> mu = torch.tensor([[0.0], [5.0], [5.1], [5.2]])
    >>> agents = tokens_as_agents(mu, torch.ones(4, 1, 1), torch.zeros(4, 0))
    >>> [[agent.pos for agent in cluster] for cluster in detect_consensus_groups(agents, 0.1)]
    [[1, 2, 3]]
    """
    check_threshold("kl_threshold", kl_threshold)
    ordered = sorted(agents, key=lambda agent: agent.pos)
    found = hierarchy.consensus(believe(*stack(ordered)), kl_threshold)
    runs = [ordered[group.start : group.stop] for group in found]
    return [run for run in runs if len(run) > 1]


def detect_consensus(
    mu: Tensor,
    Sigma: Tensor,  # noqa: N803
    threshold: float = 0.01,
    phi: Tensor | None = None,
) -> list[list[Agent]]:
    """The same of tokens (n, d), (n, d, d), which share one frame where there is no phi."""
    check_threshold("threshold", threshold)
    return detect_consensus_groups(tokens_as_agents(mu, Sigma, frames(mu, phi)), threshold)


def condense(agents: Sequence[Agent]) -> MetaAgent:
    """A cluster as one belief, with the mean and the covariance of the mixture of its agents."""
    found = hierarchy.mixture(believe(*stack(agents)))
    return MetaAgent(found.mean[0, 0, 0], found.covariance[0, 0, 0], tuple(agents))


def build_hierarchy_graph(clusters: Sequence[Sequence[Agent]]) -> dict[str, Any]:
    """Which agent is part of which cluster; every node is the positions of its agents.

    Nodes are the agents of all clusters and, after them, the clusters.

    >>> agents = tokens_as_agents(torch.zeros(3, 1), torch.ones(3, 1, 1), torch.zeros(3, 0))
    >>> graph = build_hierarchy_graph([agents[1:]])
    >>> graph["nodes"]
    [(1,), (2,), (1, 2)]
    >>> graph["edges"]
    tensor([[0, 1],
            [2, 2]])
    """
    wholes = [tuple(agent.pos for agent in run) for run in clusters]
    parts = [(position,) for run in wholes for position in run]
    parents = [number for number, run in enumerate(wholes, len(parts)) for _ in run]
    edges = torch.tensor([list(range(len(parts))), parents], dtype=torch.int64)
    return {"nodes": [*parts, *wholes], "edges": edges}


def frames(mu: Tensor, phi: Tensor | None) -> Tensor:
    """Coordinates of frames in so(d), zero unless given."""
    d = mu.shape[-1]
    return mu.new_zeros(*mu.shape[:-1], d * (d - 1) // 2) if phi is None else phi


class EmergentHierarchicalAttention(Attention):
    """The public class, called with beliefs.

    >>> layer = EmergentHierarchicalAttention(2, block=2, threshold=0.5)
    >>> found = layer(torch.zeros(4, 2), torch.eye(2).expand(4, 2, 2), torch.zeros(4, 1))
    >>> sorted(found), found["base_tokens"].shape
    (['base_tokens', 'hierarchy', 'meta_tokens'], torch.Size([4, 2]))
    """

    def __init__(self, d_model: int, *, enable_emergence: bool = True, **options: Any) -> None:
        super().__init__(d_model, **options)
        check_flags(enable_emergence=enable_emergence)
        self.enable_emergence = enable_emergence

    def forward(
        self,
        mu: Tensor,
        Sigma: Tensor,  # noqa: N803
        phi: Tensor | None = None,
        **masks: Any,
    ) -> dict[str, Any]:
        """``base_tokens``, and unless it is disabled ``meta_tokens`` by scale and ``hierarchy``.

        Nodes of the hierarchy are `Group`s: which tokens of which head, and of which scale.
        """
        if not self.enable_emergence:
            return {"base_tokens": self.update(mu, Sigma, phi, **masks).mean}
        found = self.emerge(mu, Sigma, phi, **masks)
        graph = {"nodes": list(found.hierarchy), "edges": hierarchy.edges(found.hierarchy)}
        return {
            "base_tokens": found.base_tokens.mean,
            "meta_tokens": found.meta_tokens,
            "hierarchy": graph,
        }


class SoftConsensusDetector(hierarchy.SoftConsensusDetector):
    """The public class, which returns (meta_mu, cluster_probs).

    >>> detector = SoftConsensusDetector(capacity=3)
    >>> meta_mu, cluster_probs = detector(torch.randn(8, 2), torch.eye(2).expand(8, 2, 2))
    >>> meta_mu.shape, cluster_probs.shape
    (torch.Size([3, 2]), torch.Size([8, 3]))
    """

    def forward(
        self,
        mu: Tensor,
        Sigma: Tensor,  # noqa: N803
        phi: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Means of the groups (capacity, d), and whose every token is (n, capacity)."""
        found = super().forward(mu, Sigma, phi)
        return found.mean, found.assignment


class HierarchicalTransformerBlock(Block):
    """A residual block of gauge attention, in which tokens condense in every n-th layer.

    Args:
        d_model: width.
        num_heads: heads.
        config: when tokens condense; n is its `consensus_check_interval`.
        layer: which of a stack this is, from 0.
        block: tokens of a block of the hierarchy.
        options: any further argument of `sixfold.models._block.Block`.

    >>> config = HierarchicalConfig(consensus_check_interval=2)
    >>> stack = [HierarchicalTransformerBlock(8, 2, config, layer=i) for i in range(4)]
    >>> [block.attention.reach.condenses for block in stack]
    [True, False, True, False]
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        config: HierarchicalConfig = HierarchicalConfig(),
        *,
        layer: int = 0,
        block: int = 64,
        **options: Any,
    ) -> None:
        width = check_sizes(d_model, num_heads, None, None).head_dim
        reach: Part = "full"
        if layer % config.consensus_check_interval == 0:
            threshold = config.consensus_kl_threshold
            reach = {"name": "hierarchical", "block": block, "threshold": threshold}
        gauge = {
            "num_heads": num_heads,
            "projection": {"name": "gaussian", "tied": True, "frames": "so"},
            "score": divergence_score(math.sqrt(width), learned=False),
            "reach": reach,
        }
        super().__init__(d_model, gauge, **options)
