"""Distances on graphs against closed forms, networkx, and random walks."""

import math

import numpy as np
import pytest
import torch

from sixfold.geometry.graph import complete, laplacian, rewire, ring
from sixfold.geometry.hexgrid import HexGrid
from sixfold.geometry.resistance import (
    by_distance,
    commute_time,
    effective_resistance,
    hop_distance,
    total_resistance,
)


def path(size):
    return torch.diag(torch.ones(size - 1), 1) + torch.diag(torch.ones(size - 1), -1)


def tree(depth):
    """A complete binary tree, its nodes numbered level by level."""
    size = 2 ** (depth + 1) - 1
    matrix = torch.zeros(size, size)
    for child in range(1, size):
        parent = (child - 1) // 2
        matrix[child, parent] = matrix[parent, child] = 1.0
    return matrix


def weighted(size, seed):
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(size, size, generator=generator, dtype=torch.float64).triu(1)
    upper = torch.where(upper > 0.6, upper, 0.0) + torch.diag(
        torch.full((size - 1,), 0.3, dtype=torch.float64), 1
    )
    return upper + upper.T


GRAPHS = {
    "path": path(9),
    "ring": ring(10),
    "complete": complete(7),
    "tree": tree(3),
    "hexagonal": HexGrid(2).adjacency(),
    "rewired": rewire(HexGrid(2).adjacency(), seed=1),
    "weighted": weighted(12, 0),
    "one node": torch.zeros(1, 1),
}
PARTS = torch.block_diag(path(4), complete(3), torch.zeros(1, 1))


@pytest.fixture(params=GRAPHS)
def adjacency(request):
    return GRAPHS[request.param]


def between(size):
    places = torch.arange(size, dtype=torch.float64)
    return (places[:, None] - places).abs()


def test_known_resistances():
    torch.testing.assert_close(effective_resistance(path(8)), between(8))
    around = between(9)
    torch.testing.assert_close(effective_resistance(ring(9)), around * (9 - around) / 9)
    torch.testing.assert_close(
        effective_resistance(complete(6)), 2 / 6 * (1 - torch.eye(6, dtype=torch.float64))
    )
    # there is one way only: every edge of it counts
    torch.testing.assert_close(effective_resistance(tree(3)), hop_distance(tree(3)))


def test_known_sums():
    assert total_resistance(path(7)) == pytest.approx(math.comb(8, 3))
    assert total_resistance(ring(8)) == pytest.approx((8**3 - 8) / 12)
    assert total_resistance(complete(9)) == pytest.approx(8)


def test_series_and_parallel():
    chain = torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 4.0], [0.0, 4.0, 0.0]])
    assert effective_resistance(chain)[0, 2].item() == pytest.approx(1 / 2 + 1 / 4)
    chain[0, 2] = chain[2, 0] = 5.0
    assert effective_resistance(chain)[0, 2].item() == pytest.approx(1 / (5 + 1 / (3 / 4)))


def test_fosters_theorem(adjacency):
    weights = adjacency.double()
    total = (weights * effective_resistance(adjacency)).sum() / 2
    assert total.item() == pytest.approx(len(adjacency) - 1, abs=1e-9)


def test_the_sum_is_that_of_inverse_eigenvalues(adjacency):
    values = torch.linalg.eigvalsh(laplacian(adjacency.double()))[1:]
    expected = len(adjacency) * (1 / values).sum().item()
    assert total_resistance(adjacency) == pytest.approx(expected)


def test_the_definition_by_the_pseudo_inverse(adjacency):
    inverse = np.linalg.pinv(laplacian(adjacency.double()).numpy(), hermitian=True)
    found = effective_resistance(adjacency)
    for u in range(len(adjacency)):
        for v in range(len(adjacency)):
            difference = np.eye(len(adjacency))[u] - np.eye(len(adjacency))[v]
            assert found[u, v].item() == pytest.approx(difference @ inverse @ difference, abs=1e-9)


def test_resistance_is_a_metric_below_the_distance_in_hops(adjacency):
    resistance = effective_resistance(adjacency)
    assert torch.equal(resistance, resistance.T)
    assert resistance.diagonal().abs().max() == 0
    around = resistance[:, :, None] + resistance[None]
    assert (resistance[:, None] <= around.transpose(1, 2) + 1e-9).all()
    if adjacency.max() == 1:
        assert (resistance <= hop_distance(adjacency) + 1e-9).all()


def test_another_edge_lowers_every_resistance():
    before = GRAPHS["hexagonal"].clone()
    after = before.clone()
    after[0, 18] = after[18, 0] = 1.0
    assert (effective_resistance(after) <= effective_resistance(before) + 1e-12).all()
    assert total_resistance(after) < total_resistance(before)


def test_commute_times_are_those_of_the_walk(adjacency):
    """Hitting times solve h = 1 + P h off the target; there and back is their sum."""
    weights, size = adjacency.double(), len(adjacency)
    if size == 1:
        assert commute_time(adjacency).item() == 0
        return
    walk = weights / weights.sum(1, keepdim=True)
    hitting = torch.zeros(size, size, dtype=torch.float64)
    for target in range(size):
        rest = [node for node in range(size) if node != target]
        system = torch.eye(size - 1, dtype=torch.float64) - walk[rest][:, rest]
        solved = torch.linalg.solve(system, torch.ones(size - 1, dtype=torch.float64))
        hitting[rest, target] = solved
    torch.testing.assert_close(commute_time(adjacency), hitting + hitting.T)


def test_networkx_agrees(adjacency):
    networkx = pytest.importorskip("networkx")
    pytest.importorskip("scipy")
    graph = networkx.from_numpy_array(adjacency.numpy())
    hops = dict(networkx.all_pairs_shortest_path_length(graph))
    expected = [[hops[u][v] for v in range(len(graph))] for u in range(len(graph))]
    assert hop_distance(adjacency).tolist() == expected
    if len(graph) > 1:
        known = networkx.resistance_distance(graph, weight="weight", invert_weight=False)
        table = [[known[u][v] for v in range(len(graph))] for u in range(len(graph))]
        torch.testing.assert_close(
            effective_resistance(adjacency), torch.tensor(table, dtype=torch.float64)
        )


def test_parts_are_infinitely_far_apart_and_else_as_alone():
    for measure in (hop_distance, effective_resistance, commute_time):
        found = measure(PARTS)
        torch.testing.assert_close(found[:4, :4], measure(path(4)))
        torch.testing.assert_close(found[4:7, 4:7], measure(complete(3)))
        assert found[7, 7] == 0
        inside = torch.block_diag(*(torch.ones(size, size) for size in (4, 3, 1))) > 0
        assert torch.equal(found.isfinite(), inside)
    assert total_resistance(PARTS) == math.inf


def test_renumbering_nodes_renumbers_distances():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    graph = GRAPHS["weighted"]
    for measure in (hop_distance, effective_resistance, commute_time):
        moved = measure(graph[order][:, order])
        torch.testing.assert_close(moved, measure(graph)[order][:, order])


def test_quartiles_by_distance():
    hops = hop_distance(PARTS)
    values = torch.arange(64.0).view(8, 8)
    found = by_distance(values, hops)
    assert found.distance.tolist() == [0, 1, 2, 3]
    assert found.count.tolist() == [8, 6 + 6, 4, 2]
    for place, low, median, high in zip(*found[:4], strict=True):
        expected = np.quantile(values.numpy()[hops.numpy() == place.item()], [0.25, 0.5, 0.75])
        assert [low.item(), median.item(), high.item()] == pytest.approx(expected.tolist())


def test_what_is_no_undirected_graph_is_refused():
    cases = {
        r"adjacency must be \(n, n\), got \(2, 3\)": torch.zeros(2, 3),
        "adjacency must be a tensor": [[0.0]],
        r"finite weights of 0 or more, got -1.0 at \(0, 1\)": torch.tensor(
            [[0.0, -1.0], [-1.0, 0.0]]
        ),
        "differ by up to 1": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
    }
    for message, matrix in cases.items():
        for measure in (hop_distance, effective_resistance, commute_time, total_resistance):
            with pytest.raises(ValueError, match=message):
                measure(matrix)
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        by_distance(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="no path joins them"):
        by_distance(torch.zeros(2), torch.full((2,), torch.inf))
