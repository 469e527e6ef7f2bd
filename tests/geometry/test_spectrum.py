"""Eigenspaces of graphs against closed forms, and against eigenvectors chosen otherwise."""

import math
from itertools import pairwise

import pytest
import torch

from sixfold.geometry.graph import complete, laplacian, ring
from sixfold.geometry.hexgrid import HexGrid
from sixfold.geometry.spectrum import spectrum

CLOSE = {"rtol": 0, "atol": 1e-12}
# modes and eigenspaces of the grids of radius 1 to 4
GRIDS = {1: (7, 5, 4), 2: (19, 13, 12), 3: (37, 25, 24), 4: (61, 41, 40)}


def weighted(seed=0, radius=2):
    """The grid with a random weight on every edge: no symmetry is left."""
    adjacency = HexGrid(radius).adjacency().double()
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(adjacency.shape, generator=generator, dtype=torch.float64)
    return (weights + weights.T) * adjacency


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    "adjacency",
    [ring(9), complete(5), HexGrid(2).adjacency(), HexGrid(4).adjacency(), weighted()],
    ids=["ring", "complete", "radius 2", "radius 4", "weighted"],
)
def test_projectors_resolve_the_identity_and_the_laplacian(adjacency, normalized):
    found = spectrum(adjacency, normalized=normalized)
    parts, values = found.projectors, torch.tensor(found.eigenvalues, dtype=torch.float64)
    size = len(adjacency)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(parts.sum(0), eye, **CLOSE)
    expected = laplacian(adjacency.double(), normalized=normalized)
    torch.testing.assert_close(torch.einsum("e,eij->ij", values, parts), expected, **CLOSE)
    crossed = torch.einsum("aij,bjk->abik", parts, parts)
    for a in range(len(parts)):
        crossed[a, a] -= parts[a]
    assert crossed.abs().max() < 1e-12
    traces = parts.diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(traces, torch.tensor(found.multiplicities).double(), **CLOSE)
    assert sum(found.multiplicities) == size
    assert all(a < b for a, b in pairwise(found.eigenvalues))
    assert found.eigenvalues[0] == pytest.approx(0, abs=1e-12) and found.eigenvalues[0] >= 0


def test_a_cycle_has_the_eigenvalues_of_its_closed_form():
    found = spectrum(ring(8), normalized=False)
    expected = [2 - 2 * math.cos(2 * math.pi * k / 8) for k in range(5)]
    assert found.eigenvalues == pytest.approx(expected, abs=1e-12)
    assert found.multiplicities == (1, 2, 2, 2, 1)
    half = spectrum(ring(8))
    assert half.eigenvalues == pytest.approx([value / 2 for value in expected], abs=1e-12)


def test_the_wheel_of_seven_has_the_eigenvalues_of_its_closed_form():
    """Rim modes k give 1 - 2/3 cos(pi k / 3); the hub and the even rim give 0 and 4/3."""
    found = spectrum(HexGrid(1).adjacency())
    assert found.eigenvalues == pytest.approx([0, 2 / 3, 4 / 3, 5 / 3], abs=1e-12)
    assert found.multiplicities == (1, 2, 3, 1)


@pytest.mark.parametrize("radius", GRIDS)
def test_grids_have_so_many_eigenspaces(radius):
    modes, plain, normalized = GRIDS[radius]
    adjacency = HexGrid(radius).adjacency()
    found = spectrum(adjacency, normalized=False)
    assert (sum(found.multiplicities), len(found.eigenvalues)) == (modes, plain)
    assert found.multiplicities.count(2) == modes - plain
    assert len(spectrum(adjacency).eigenvalues) == normalized
    assert max(spectrum(adjacency).eigenvalues) < 2


@pytest.mark.parametrize("radius", GRIDS)
def test_any_number_of_modes_is_rounded_up_to_whole_eigenspaces(radius):
    found = spectrum(HexGrid(radius).adjacency())
    turns = [HexGrid(radius).rotation(turn) for turn in range(1, 6)]
    for count in range(1, HexGrid(radius).num_heads + 1):
        kept = found.kept(count)
        held = sum(kept.multiplicities)
        assert held - kept.multiplicities[-1] < count <= held
        # below the cut what is kept, above it what is not
        assert kept.eigenvalues[-1] < kept.cut
        rest = found.eigenvalues[len(kept.eigenvalues) :]
        assert kept.cut < rest[0] if rest else kept.cut == math.inf
        low = kept.projectors.sum(0)
        for place in turns:
            torch.testing.assert_close(low[place][:, place], low, **CLOSE)


def test_an_eigenspace_that_is_split_does_not_commute_with_turns():
    """The control: one direction of the second eigenspace."""
    vectors = torch.linalg.eigh(laplacian(HexGrid(2).adjacency().double(), normalized=True))[1]
    low, place = vectors[:, :2] @ vectors[:, :2].T, HexGrid(2).rotation()
    assert (low[place][:, place] - low).abs().max() > 0.05


@pytest.mark.parametrize("count", [0, -1, 8, 2.5, "3", True, None])
def test_a_number_of_modes_that_there_is_not_is_refused(count):
    with pytest.raises(ValueError, match=rf"count must be whole and in \[1, 7\].*got {count!r}"):
        spectrum(HexGrid(1).adjacency()).kept(count)


@pytest.mark.parametrize("bands", range(1, 13))
def test_bands_share_out_the_eigenspaces_evenly(bands):
    found = spectrum(HexGrid(2).adjacency())
    cuts = (-math.inf, *found.cuts(bands), math.inf)
    sizes = [sum(a < v < b for v in found.eigenvalues) for a, b in pairwise(cuts)]
    assert sum(sizes) == 12
    assert len(sizes) == bands
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("bands", [0, 5, 2.0, "2", True])
def test_more_bands_than_eigenspaces_are_refused(bands):
    with pytest.raises(ValueError, match=rf"bands must be whole and in \[1, 4\].*got {bands!r}"):
        spectrum(HexGrid(1).adjacency()).cuts(bands)


def test_a_graph_is_told_apart_by_every_weight_and_by_its_laplacian():
    """Nothing that was found before is given for another graph, nor altered by who got it."""
    adjacency = HexGrid(2).adjacency().double()
    first, plain = spectrum(adjacency), spectrum(adjacency, normalized=False)
    assert first.eigenvalues != plain.eigenvalues
    kept = first.projectors.clone()
    first.projectors.zero_()
    assert torch.equal(spectrum(adjacency).projectors, kept)
    changed = adjacency.clone()
    changed[0, 1] = changed[1, 0] = 1.5
    found = spectrum(changed)
    values = torch.tensor(found.eigenvalues, dtype=torch.float64)
    again = torch.einsum("e,eij->ij", values, found.projectors)
    torch.testing.assert_close(again, laplacian(changed, normalized=True), **CLOSE)
    assert (again - laplacian(adjacency, normalized=True)).abs().max() > 0.01
    assert torch.equal(spectrum(adjacency.float()).projectors, kept)


def test_a_parameter_of_weights_is_taken_by_its_value():
    weights = torch.nn.Parameter(weighted())
    found = spectrum(weights)
    assert not found.projectors.requires_grad
    assert len(found.eigenvalues) == 19


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"\(n, n\).*got \(2, 3\)"),
        (torch.ones(0, 0), r"n 1 or more, got \(0, 0\)"),
        (torch.tensor([[0.0, 1.0], [0.5, 0.0]]), "symmetric, entries differ by up to 0.5"),
        (-complete(3), "weights of 0 or more"),
        (torch.full((2, 2), float("nan")), r"finite .*, got nan at \(0, 0\)$"),
        ([[0.0, 1.0], [1.0, 0.0]], r"be a tensor \(n, n\), got a list$"),
    ],
)
def test_what_is_no_graph_is_refused(matrix, message):
    with pytest.raises(ValueError, match=f"adjacency must .*{message}"):
        spectrum(matrix)


def test_isolated_nodes_are_slow():
    found = spectrum(torch.block_diag(complete(3), torch.zeros(2, 2)))
    assert found.multiplicities == (3, 2)
    assert found.eigenvalues == pytest.approx([0, 1.5], abs=1e-12)
