"""Matrices entry by entry against the same matrices in a batch."""

import pytest
import torch

from sixfold.geometry import lanes
from sixfold.geometry.gaussian import half
from sixfold.geometry.lanes import gram, product, solve

EXACT = {"rtol": 0, "atol": 1e-12}
BLOCKS = (2**20, 700)  # one block, and blocks of 64 of the 150 tokens


def matrices(d, k, seed=0, tokens=150):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, k, tokens, generator=generator, dtype=torch.float64)


def triangles(d, **options):
    lower = matrices(d, d, seed=5, **options).movedim(-1, 0).tril(-1)
    return (lower + 2 * torch.eye(d, dtype=torch.float64)).movedim(0, -1).contiguous()


def batch(entries):
    return entries.movedim(-1, 0)


@pytest.fixture(params=BLOCKS)
def blocks(request, monkeypatch):
    monkeypatch.setattr(lanes, "CACHED", request.param)


@pytest.mark.parametrize("d", [1, 5])
def test_they_are_products_solutions_and_squares(blocks, d):
    one, two, lower = matrices(d, 3), matrices(3, 4, seed=1), triangles(d)
    torch.testing.assert_close(batch(product(one, two)), batch(one) @ batch(two), **EXACT)
    solved = torch.linalg.solve_triangular(batch(lower), batch(one), upper=False)
    torch.testing.assert_close(batch(solve(lower, one)), solved, **EXACT)
    square = half(batch(one) @ batch(one).mT)
    torch.testing.assert_close(gram(one), square, **EXACT)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_their_derivatives_are_those_of_finite_differences(check):
    one, two = matrices(3, 2, tokens=2), matrices(2, 4, seed=1, tokens=2)
    lower = triangles(3, tokens=2)
    for function, inputs in ((product, (one, two)), (solve, (lower, one)), (gram, (one,))):
        assert check(function, tuple(each.requires_grad_() for each in inputs))


def test_gradients_do_not_depend_on_blocks(monkeypatch):
    found = []
    for size in BLOCKS:
        monkeypatch.setattr(lanes, "CACHED", size)
        lower, sides = triangles(5).requires_grad_(), matrices(5, 6).requires_grad_()
        rows = gram(product(lower, solve(lower, sides)))
        weight = torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view_as(rows)
        found.append(torch.autograd.grad((rows * weight).sum(), (lower, sides)))
    torch.testing.assert_close(*found, **EXACT)


def test_nothing_above_the_diagonal_is_read_or_pulled():
    lower, sides = triangles(4), matrices(4, 2)
    above = torch.ones(4, 4).triu(1).bool()
    other = lower.clone()
    other[above] = torch.nan
    other.requires_grad_()
    solved = solve(other, sides)
    assert torch.equal(solved, solve(lower, sides))
    (pulled,) = torch.autograd.grad(solved.square().sum(), other)
    assert (pulled[above] == 0).all()
    assert (pulled[~above] != 0).any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_they_can_be_mapped():
    lower, sides = triangles(3), torch.stack([matrices(3, 2, seed=s) for s in range(4)])
    mapped = torch.func.vmap(lambda side: gram(solve(lower, side)))(sides)
    expected = torch.stack([gram(solve(lower, side)) for side in sides])
    torch.testing.assert_close(mapped, expected, **EXACT)
