"""Frames against matrix exponentials and the groups they belong to."""

import pytest
import torch

from sixfold.geometry.frames import ALGEBRAS, NEAR, bounded, cayley, dimension, element, powers
from sixfold.geometry.gaussian import triangle

EXACT = {"rtol": 0, "atol": 1e-12}


def elements(algebra, d=4, count=3):
    coordinates = torch.randn(count, dimension(algebra, d), dtype=torch.float64)
    return element(coordinates, algebra, d)


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 16), (3, 17), (5, 1), (0, 50), (7, 1100)]
)
def test_powers_are_matrix_exponentials(algebra, start, length):
    generator = 0.05 * elements(algebra)
    if length > NEAR**2:
        generator = generator / 50
    found = powers(generator, start, length)
    expected = torch.stack(
        [torch.matrix_exp(i * generator) for i in range(start, start + length)], 1
    )
    torch.testing.assert_close(found, expected, **EXACT)


def test_two_positions_differ_by_their_distance_alone():
    table = powers(elements("so"), 0, 12)
    one = table[:, 7] @ table[:, 4].mT
    torch.testing.assert_close(one, table[:, 11] @ table[:, 8].mT, **EXACT)


@pytest.mark.parametrize("position", [0, 1000, 100_000, 10_000_000])
def test_rotations_stay_rotations_far_from_the_start(position):
    generator = 0.3 * elements("so").float()
    found = powers(generator, position, 40)
    eye = torch.eye(4).expand_as(found)
    torch.testing.assert_close(found @ found.mT, eye, rtol=0, atol=2e-6)
    expected = torch.matrix_exp((position + 39) * generator.double())
    atol = 1e-6 + 1e-13 * position
    torch.testing.assert_close(found[:, -1].double(), expected, rtol=0, atol=atol)


def test_so_gives_rotations():
    for frame in (powers(elements("so"), 0, 9), cayley(elements("so"))):
        eye = torch.eye(4, dtype=torch.float64).expand_as(frame)
        torch.testing.assert_close(frame @ frame.mT, eye, **EXACT)
        torch.testing.assert_close(torch.linalg.det(frame), torch.ones(frame.shape[:-2]).double())


def test_the_inverse_of_a_cayley_frame_is_that_of_the_opposite_element():
    turn = bounded(elements("gl"))
    eye = torch.eye(4, dtype=torch.float64).expand_as(turn)
    torch.testing.assert_close(cayley(turn) @ cayley(-turn), eye, **EXACT)


def test_bounded_elements_keep_clear_of_the_pole():
    large = 1e3 * elements("gl", count=50)
    assert torch.linalg.matrix_norm(bounded(large)).max() < 1
    assert torch.linalg.cond(cayley(bounded(large))).max() < 10
    small = 1e-4 * elements("gl")
    torch.testing.assert_close(bounded(small), small, rtol=1e-6, atol=0)


def test_so_is_antisymmetric_and_gl_is_everything():
    turn = elements("so")
    assert torch.equal(turn, -turn.mT)
    assert torch.linalg.matrix_rank(element(torch.eye(6), "so", 4).flatten(1)) == 6
    assert torch.linalg.matrix_rank(element(torch.eye(16), "gl", 4).flatten(1)) == 16


def test_a_triangle_has_its_diagonal():
    scales, below = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    expected = torch.tensor([[1.0, 0.0, 0.0], [4.0, 2.0, 0.0], [5.0, 6.0, 3.0]])
    assert torch.equal(triangle(scales, below), expected)


def test_an_unknown_algebra_is_refused():
    with pytest.raises(ValueError, match="unknown algebra 'sl'; choose from: gl, so"):
        dimension("sl", 3)
