"""The grid against cube coordinates, where distance and rotation are plain."""

import itertools
import math

import pytest
import torch

from sixfold.geometry.hexgrid import DIRECTIONS, HexCoordinate, HexGrid, cartesian

RADII = (0, 1, 2, 3, 4)


def cubes(radius):
    """All integer triples that sum to zero within the radius."""
    span = range(-radius, radius + 1)
    return [(x, y, z) for x, y, z in itertools.product(span, repeat=3) if x + y + z == 0]


def cube(cell):
    return (cell.q, cell.r, -cell.q - cell.r)


@pytest.mark.parametrize(("radius", "count"), [(0, 1), (1, 7), (2, 19), (3, 37), (4, 61)])
def test_number_of_heads(radius, count):
    grid = HexGrid(radius)
    assert grid.num_heads == len(grid.coordinates) == len(grid.index) == count
    assert HexGrid.of(count) == grid


@pytest.mark.parametrize("radius", RADII)
def test_cells_are_the_cubes_within_the_radius(radius):
    assert {cube(cell) for cell in HexGrid(radius).coordinates} == set(cubes(radius))


def test_distance_is_the_largest_cube_difference():
    cells = HexGrid(3).coordinates
    for a, b in itertools.product(cells, repeat=2):
        expected = max(abs(x - y) for x, y in zip(cube(a), cube(b), strict=True))
        assert a.distance(b) == expected


@pytest.mark.parametrize("radius", RADII)
def test_rings_partition_the_grid(radius):
    grid = HexGrid(radius)
    rings = [grid.ring(distance) for distance in range(radius + 1)]
    assert [len(ring) for ring in rings] == [max(6 * distance, 1) for distance in range(radius + 1)]
    assert sorted(head for ring in rings for head in ring) == list(range(grid.num_heads))
    assert grid.ring(radius + 1) == ()


def test_six_neighbours_at_distance_one_in_steps_of_sixty_degrees():
    centre = HexCoordinate(2, -3)
    around = centre.neighbours()
    assert len(set(around)) == 6
    assert all(centre.distance(cell) == 1 for cell in around)
    angles = [math.degrees(math.atan2(*reversed(cartesian(*step)))) % 360 for step in DIRECTIONS]
    assert angles == pytest.approx([0, 60, 120, 180, 240, 300])


def test_rotation_turns_the_plane():
    for cell, sixths in itertools.product(HexGrid(2).coordinates, range(-6, 13)):
        x, y = cartesian(*cell)
        turn = sixths * math.pi / 3
        expected = (
            x * math.cos(turn) - y * math.sin(turn),
            x * math.sin(turn) + y * math.cos(turn),
        )
        assert cartesian(*cell.rotate(sixths)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("radius", [1, 2, 3, 4])
def test_rotation_is_a_permutation_of_order_six_that_keeps_the_graph(radius):
    grid = HexGrid(radius)
    heads, once = torch.arange(grid.num_heads), grid.rotation()
    power = heads
    for turn in range(1, 7):
        power = once[power]
        assert torch.equal(power, grid.rotation(turn))
        assert torch.equal(power, heads) == (turn == 6)
    adjacency = grid.adjacency()
    assert torch.equal(adjacency[once][:, once], adjacency)


@pytest.mark.parametrize("radius", RADII)
def test_orbits_are_the_closures_of_the_rotation(radius):
    grid = HexGrid(radius)
    orbits = grid.orbits()
    assert len(orbits.unique()) == 1 + (grid.num_heads - 1) // 6
    for head, cell in enumerate(grid.coordinates):
        members = {grid.index[cell.rotate(turn)] for turn in range(6)}
        assert members == set(torch.nonzero(orbits == orbits[head]).flatten().tolist())


@pytest.mark.parametrize(("radius", "edges"), [(0, 0), (1, 12), (2, 42), (3, 90), (4, 156)])
def test_adjacency_has_the_analytic_degrees(radius, edges):
    grid = HexGrid(radius)
    adjacency, degree = grid.adjacency(), grid.adjacency().sum(1)
    assert adjacency.sum() == 2 * edges == 2 * (9 * radius**2 + 3 * radius)
    assert torch.equal(adjacency, adjacency.T)
    assert adjacency.diagonal().sum() == 0
    for head, cell in enumerate(grid.coordinates):
        inside = cell.distance() < radius
        corner = 0 in cube(cell)
        assert degree[head] == (6 if inside else 0 if radius == 0 else 3 if corner else 4)


def test_adjacent_cells_are_sqrt_three_apart_and_no_others_are_nearer():
    grid = HexGrid(3)
    centres = torch.tensor([cartesian(*cell) for cell in grid.coordinates], dtype=torch.float64)
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    near = grid.adjacency().bool()
    torch.testing.assert_close(
        apart[near], torch.full_like(apart[near], math.sqrt(3)), rtol=0, atol=1e-12
    )
    assert apart[~near & ~torch.eye(grid.num_heads, dtype=torch.bool)].min() > 2.99


@pytest.mark.parametrize("count", [-7, 0, 2, 6, 8, 12, 20, 36])
def test_a_number_that_fills_no_grid_is_refused_with_the_nearest_sizes(count):
    with pytest.raises(ValueError, match=f"no hexagonal grid has {count} heads"):
        HexGrid.of(count)


def test_the_refusal_names_the_nearest_sizes():
    with pytest.raises(ValueError, match="7, 19, 37"):
        HexGrid.of(20)


@pytest.mark.parametrize("radius", [-1, 1.5, "2", True, None])
def test_a_radius_that_is_none_is_refused(radius):
    message = f"grid_radius must be a whole number of 0 or more, got {radius!r}"
    with pytest.raises(ValueError, match=message):
        HexGrid(radius)


def test_the_grid_does_not_follow_the_default_device():
    with torch.device("meta"):
        grid = HexGrid(1)
        tensors = (grid.adjacency(), grid.rotation(), grid.orbits())
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
