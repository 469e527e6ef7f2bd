"""Graphs and Laplacians against closed forms."""

import math

import pytest
import torch

from sixfold.geometry.graph import complete, laplacian, rewire, ring
from sixfold.geometry.hexgrid import HexGrid


def two_parts():
    return torch.block_diag(ring(5), complete(4), torch.zeros(1, 1)).double()


GRAPHS = {
    "ring": ring(8).double(),
    "complete": complete(6).double(),
    "hexagonal": HexGrid(2).adjacency().double(),
    "parts": two_parts(),
}


@pytest.fixture(params=GRAPHS)
def adjacency(request):
    return GRAPHS[request.param]


def components(adjacency):
    """Number of connected components, by closure of the adjacency."""
    closed = torch.eye(len(adjacency), dtype=torch.float64) + adjacency
    for _ in range(len(adjacency)):
        closed = ((closed @ closed) > 0).double()
    return len({tuple(row.tolist()) for row in closed})


def test_laplacian_is_the_quadratic_form_of_differences(adjacency):
    values = torch.randn(len(adjacency), dtype=torch.float64)
    expected = 0.5 * (adjacency * (values[:, None] - values) ** 2).sum()
    torch.testing.assert_close(values @ laplacian(adjacency) @ values, expected)


def test_rows_sum_to_zero_and_the_bound_on_the_spectrum_holds(adjacency):
    matrix = laplacian(adjacency)
    assert matrix.sum(1).abs().max() == 0
    spectrum = torch.linalg.eigvalsh(matrix)
    assert spectrum[0] > -1e-12
    assert spectrum[-1] <= 2 * adjacency.sum(1).max() + 1e-12


def test_one_zero_eigenvalue_per_component(adjacency):
    spectrum = torch.linalg.eigvalsh(laplacian(adjacency))
    assert (spectrum.abs() < 1e-10).sum() == components(adjacency)


def test_normalized_spectrum_lies_in_zero_to_two(adjacency):
    matrix = laplacian(adjacency, normalized=True)
    assert torch.equal(matrix, matrix.T)
    spectrum = torch.linalg.eigvalsh(matrix)
    assert spectrum[0] > -1e-12
    assert spectrum[-1] < 2 + 1e-12
    degree = adjacency.sum(1)
    zero = matrix @ degree.sqrt()
    assert zero.abs().max() < 1e-12


def test_isolated_nodes_have_zero_rows():
    for normalized in (False, True):
        assert laplacian(two_parts(), normalized=normalized)[-1].abs().max() == 0


@pytest.mark.parametrize("size", [3, 4, 7, 12])
def test_ring_spectrum(size):
    expected = sorted(2 - 2 * math.cos(2 * math.pi * k / size) for k in range(size))
    found = torch.linalg.eigvalsh(laplacian(ring(size).double()))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_small_rings():
    assert torch.equal(ring(1), torch.zeros(1, 1))
    assert torch.equal(ring(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("size", [2, 5, 9])
def test_complete_spectrum(size):
    found = torch.linalg.eigvalsh(laplacian(complete(size).double()))
    expected = torch.tensor([0.0] + [size] * (size - 1), dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_bipartite_ring_reaches_two():
    spectrum = torch.linalg.eigvalsh(laplacian(ring(8).double(), normalized=True))
    assert spectrum[-1].item() == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("radius", [2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_rewiring_keeps_degrees_and_changes_the_graph(radius, seed):
    before = HexGrid(radius).adjacency()
    kept = before.clone()
    after = rewire(before, seed=seed)
    assert torch.equal(before, kept)
    assert torch.equal(after.sum(1), before.sum(1))
    assert torch.equal(after, after.T)
    assert after.diagonal().sum() == 0
    assert set(after.unique().tolist()) == {0.0, 1.0}
    shared = (after * before).sum() / before.sum()
    assert shared < 0.5
    assert torch.equal(after, rewire(before, seed=seed))
    assert not torch.equal(after, rewire(before, seed=seed + 2))


def test_a_graph_without_a_swap_stays():
    for rigid in (complete(4), torch.zeros(3, 3)):
        assert torch.equal(rewire(rigid, seed=0), rigid)
