"""The second document's hierarchy by its own names: the three phases of its roadmap."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import sixfold
from sixfold.compat.gauge.agents import tokens_as_agents
from sixfold.compat.gauge.attention import aggregate_beliefs, compute_kl_attention
from sixfold.compat.gauge.hierarchy import (
    EmergentHierarchicalAttention,
    HierarchicalConfig,
    HierarchicalTransformerBlock,
    SoftConsensusDetector,
    build_hierarchy_graph,
    condense,
    detect_consensus,
    detect_consensus_groups,
)

CLOSE = {"rtol": 0, "atol": 1e-10}
N, D = 9, 2


@pytest.fixture
def beliefs():
    """Nine agents of which 3, 4, 5 agree, and 7, 8."""
    torch.manual_seed(0)
    mu = 3.0 * torch.arange(N, dtype=torch.float64)[:, None].expand(N, D).clone()
    for near, other in ((4, 3), (5, 3), (8, 7)):
        mu[near] = mu[other] + 0.02 * torch.randn(D)
    root = 0.01 * torch.randn(N, D, D, dtype=torch.float64)
    return mu, torch.eye(D) + (root + root.mT) / 2, torch.zeros(N, 1, dtype=torch.float64)


def divergence(agents, i, j):
    one, other = (MultivariateNormal(agents[k].mu, agents[k].Sigma) for k in (i, j))
    return kl_divergence(one, other)


def test_tokens_3_4_5_reach_consensus_and_form_a_meta_token(beliefs):
    """The document's step 3 with its own condition, and step 4."""
    agents, threshold = tokens_as_agents(*beliefs), 0.01
    pairs = [(3, 4), (4, 5), (3, 5)]
    assert all(divergence(agents, i, j) < threshold for i, j in pairs)
    clusters = detect_consensus_groups(agents, kl_threshold=threshold)
    assert [[agent.pos for agent in cluster] for cluster in clusters] == [[3, 4, 5], [7, 8]]
    meta_agent = condense([agents[3], agents[4], agents[5]])
    mu, sigma = beliefs[0][3:6], beliefs[1][3:6]
    torch.testing.assert_close(meta_agent.mu_q, mu.mean(0), **CLOSE)
    spread = (mu - mu.mean(0)).T @ (mu - mu.mean(0)) / 3
    torch.testing.assert_close(meta_agent.Sigma_q, sigma.mean(0) + spread, **CLOSE)
    assert meta_agent.constituents == (agents[3], agents[4], agents[5])
    assert meta_agent.scale == 1


def test_agents_out_of_order_are_ordered(beliefs):
    agents = tokens_as_agents(*beliefs)
    clusters = detect_consensus_groups(agents[::-1])
    assert [[agent.pos for agent in cluster] for cluster in clusters] == [[3, 4, 5], [7, 8]]


def test_consensus_is_in_the_frame_that_all_share(beliefs):
    mu, sigma, _ = beliefs
    turn = torch.linspace(0, 3, N, dtype=torch.float64)
    by = torch.stack(
        [torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])]
    ).movedim(-1, 0)
    given = (by @ mu[..., None])[..., 0], by @ sigma @ by.mT
    found = [
        [[agent.pos for agent in cluster] for cluster in detect_consensus(*given, 0.01, phi)]
        for phi in (turn[:, None], -turn[:, None])
    ]
    assert found.count([[3, 4, 5], [7, 8]]) == 1  # one sign of phi turns them back
    assert detect_consensus(mu, sigma, 0.0) == []


def test_the_documents_forward_pass(beliefs):
    """Phase 2, line by line: attention, consensus of what it gave, meta-tokens, graph."""
    mu, Sigma, phi = beliefs
    beta = compute_kl_attention(mu, Sigma, phi)
    mu_out = aggregate_beliefs(mu, beta)
    clusters = detect_consensus(mu_out, Sigma, 0.01)
    meta_tokens = [condense(cluster) for cluster in clusters]
    hierarchy = build_hierarchy_graph(clusters)
    assert [len(meta.constituents) for meta in meta_tokens] == [3, 2]
    assert hierarchy["nodes"] == [(3,), (4,), (5,), (7,), (8,), (3, 4, 5), (7, 8)]
    assert hierarchy["edges"].tolist() == [[0, 1, 2, 3, 4], [5, 5, 5, 6, 6]]
    assert build_hierarchy_graph([])["edges"].shape == (2, 0)
    layer = EmergentHierarchicalAttention(
        D, kappa=1.0, block=16, threshold=0.01, scales=1, dtype=torch.float64
    )
    found = layer(mu, Sigma, phi)
    torch.testing.assert_close(found["base_tokens"], mu_out, **CLOSE)
    ends = [(group.start, group.stop) for group in found["hierarchy"]["nodes"]]
    assert [pair for pair in ends if pair[1] - pair[0] > 1] == [(3, 6), (7, 9)]
    (meta,) = found["meta_tokens"]
    assert meta.size[0, 0, : len(ends)].tolist() == [stop - start for start, stop in ends]
    for place, expected in ((3, mu_out[3:6].mean(0)), (5, mu_out[7:].mean(0))):
        torch.testing.assert_close(meta.mean[0, 0, place], expected, **CLOSE)


def test_emergence_can_be_disabled(beliefs):
    layer = EmergentHierarchicalAttention(D, kappa=1.0, enable_emergence=False).double()
    found = layer(*beliefs)
    assert found.keys() == {"base_tokens"}
    layer.enable_emergence = True
    assert layer(*beliefs).keys() == {"base_tokens", "meta_tokens", "hierarchy"}
    torch.testing.assert_close(layer(*beliefs)["base_tokens"], found["base_tokens"], **CLOSE)


def test_edges_go_from_scale_to_scale(beliefs):
    layer = EmergentHierarchicalAttention(D, block=2, capacity=2, threshold=0.5).double()
    graph = layer(*beliefs)["hierarchy"]
    nodes = graph["nodes"]
    assert {node.scale for node in nodes} == {0, 1, 2}
    for child, parent in graph["edges"].T.tolist():
        assert nodes[parent].scale == nodes[child].scale + 1
        assert nodes[parent].start <= nodes[child].start < nodes[child].stop <= nodes[parent].stop
    parents = [child for child, _ in graph["edges"].T.tolist()]
    assert parents == [i for i, node in enumerate(nodes) if node.scale < 2]


def test_edges_mean_the_same_in_both_hierarchies(beliefs):
    """Both rows are numbers of nodes, child and parent; the parent holds the child's positions."""
    layer = EmergentHierarchicalAttention(D, block=2, capacity=2, threshold=0.5).double()
    found = layer(*beliefs)["hierarchy"]
    built = build_hierarchy_graph(detect_consensus_groups(tokens_as_agents(*beliefs)))
    spans = [{*range(group.start, group.stop)} for group in found["nodes"]]
    for graph, held in ((found, spans), (built, [{*node} for node in built["nodes"]])):
        assert graph.keys() == {"nodes", "edges"} and len(graph["nodes"]) == len(held)
        assert graph["edges"].shape[1] > 0 and graph["edges"].dtype == torch.int64
        assert all(child < parent for child, parent in graph["edges"].T.tolist())
        assert all(held[child] <= held[parent] for child, parent in graph["edges"].T.tolist())


def test_soft_meta_tokens_are_those_of_the_public_class(beliefs):
    mu, Sigma, phi = beliefs
    detector = SoftConsensusDetector(capacity=5, threshold=0.1, temperature=0.2).double().eval()
    meta_mu, cluster_probs = detector(mu, Sigma)
    public = sixfold.SoftConsensusDetector(5, 0.1, 0.2).double().eval()(mu, Sigma, phi)
    torch.testing.assert_close(meta_mu, public.mean, **CLOSE)
    torch.testing.assert_close(cluster_probs, public.assignment, **CLOSE)
    assert cluster_probs.shape == (N, 5)
    torch.testing.assert_close(cluster_probs.sum(-1), torch.ones(N).double())
    torch.testing.assert_close(
        meta_mu, cluster_probs.T @ mu / cluster_probs.sum(0)[:, None], **CLOSE
    )


def test_a_block_condenses_in_every_nth_layer():
    config = HierarchicalConfig(consensus_check_interval=3, consensus_kl_threshold=0.02)
    blocks = [HierarchicalTransformerBlock(8, 2, config, layer=i, block=4) for i in range(4)]
    assert [block.attention.reach.condenses for block in blocks] == [True, False, False, True]
    assert blocks[0].attention.reach.given.threshold == 0.02
    assert HierarchicalConfig() == HierarchicalConfig(1, 0.01)
    x = torch.randn(2, 19, 8)
    for block in blocks:
        x = block(x, is_causal=True)
    assert x.shape == (2, 19, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ((every,), f"consensus_check_interval must be a whole number .* got {every!r}")
            for every in (0, 1.5, "2", True)
        ),
        *(
            ((1, threshold), f"consensus_kl_threshold must be 0 or more, got {threshold!r}")
            for threshold in (float("nan"), -1, "a")
        ),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalConfig(*fields)


def test_whether_anything_emerges_is_yes_or_no():
    with pytest.raises(ValueError, match="enable_emergence must be True or False, got 'no'"):
        EmergentHierarchicalAttention(D, enable_emergence="no")


@pytest.mark.parametrize("threshold", [float("nan"), -1, "a", None])
def test_a_threshold_that_cannot_be_meant_is_refused(beliefs, threshold):
    with pytest.raises(ValueError, match=f"^kl_threshold must be 0 or more, got {threshold!r}"):
        detect_consensus_groups(tokens_as_agents(*beliefs), threshold)
    with pytest.raises(ValueError, match=f"^threshold must be 0 or more, got {threshold!r}"):
        detect_consensus(*beliefs[:2], threshold)
