"""Filtering along edges against dense matrices, and against the eigenvectors of the Laplacian."""

import pytest
import torch

from sixfold.geometry.graph import laplacian
from sixfold.ops.graphfilter import fused, reference
from sixfold.ops.graphfilter.fused import Neighbours

N, H, D = 11, 2, 3
EMPTY = torch.zeros(2, 0, dtype=torch.int64)


def both_ways(pairs):
    pairs = torch.tensor(pairs).T
    return torch.cat([pairs, pairs.flip(0)], dim=1)


GRAPHS = {
    "ring": both_ways([[i, (i + 1) % N] for i in range(N)]),
    "two parts and nodes without edges": both_ways([[0, 1], [1, 2], [2, 0], [5, 6], [6, 8]]),
    "edges twice and a loop": torch.cat(
        [both_ways([[0, 1], [0, 1], [1, 2]]), torch.tensor([[4], [4]])], dim=1
    ),
    "no edges": EMPTY,
}


def dense(edges, n=N):
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    for source, target in edges.T.tolist():
        adjacency[target, source] += 1
    return adjacency


def inputs(order, filters=1, dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(order)
    shapes = (n, H, D), (order + 1, H, filters)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in found]


def run(filtered, x, coefficients, where):
    out = filtered(x, coefficients, where)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad((out * weight).sum(), (x, coefficients)))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_reference_filters_eigenvectors_by_their_eigenvalues(name):
    x, coefficients = (t.detach() for t in inputs(4, filters=D))
    lambdas, vectors = torch.linalg.eigh(laplacian(dense(GRAPHS[name]), normalized=True))
    # T_k(cos t) = cos(k t)
    angle = (lambdas - 1).clamp(-1, 1).acos()
    gains = torch.einsum("khd,ke->hde", coefficients, (torch.arange(5)[:, None] * angle).cos())
    spectrum = torch.einsum("ie,ihd->hde", vectors, x)
    expected = torch.einsum("ie,hde->ihd", vectors, gains * spectrum)
    found = reference.filtered(x, coefficients, GRAPHS[name])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("filters", [1, D])
@pytest.mark.parametrize("order", [0, 1, 2, 7])
@pytest.mark.parametrize("name", GRAPHS)
def test_walking_along_edges_is_the_reference(name, order, filters):
    x, coefficients = inputs(order, filters)
    found = run(fused.filtered, x, coefficients, Neighbours.of(GRAPHS[name], N))
    expected = run(reference.filtered, x, coefficients, GRAPHS[name])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    near = Neighbours.of(GRAPHS["two parts and nodes without edges"], N)
    assert torch.autograd.gradcheck(lambda *t: fused.filtered(*t, near), inputs(3), fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda *t: fused.filtered(*t, near), inputs(3), fast_mode=True
    )


def test_fifth_derivatives_are_those_of_the_reference():
    near = Neighbours.of(GRAPHS["two parts and nodes without edges"], N)
    x, coefficients = inputs(3)

    def fifth(out):
        found = out.sin().sum()
        for _ in range(5):
            parts = torch.autograd.grad(found, (x, coefficients), create_graph=True)
            found = sum(part.sum() for part in parts)
        return found

    expected = fifth(
        reference.filtered(x, coefficients, GRAPHS["two parts and nodes without edges"])
    )
    torch.testing.assert_close(
        fifth(fused.filtered(x, coefficients, near)), expected, rtol=1e-10, atol=0
    )


@pytest.mark.parametrize(("dtype", "fudge"), [(torch.float32, 10), (torch.bfloat16, 2)])
def test_low_precision_errs_little_more_than_dense_matrices(dtype, fudge):
    """A dense product rounds once where a recurrence rounds at each step."""
    near = Neighbours.of(GRAPHS["ring"], N)
    x, coefficients = inputs(4, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, coefficients)]
    golden = run(reference.filtered, *exact, GRAPHS["ring"])
    eager = run(reference.filtered, x, coefficients, GRAPHS["ring"])
    found = run(fused.filtered, x, coefficients, near)
    for gold, low, ours in zip(golden, eager, found, strict=True):
        assert ours.dtype == dtype
        budget = torch.finfo(dtype).eps * gold.abs().mean()
        allowed = fudge * (low.double() - gold).abs().mean() + budget
        assert (ours.double() - gold).abs().mean() <= allowed


def test_a_hub_of_many_neighbours_is_filtered_in_low_precision():
    """A degree of 300 is no number of bfloat16, and eight steps would each round."""
    star = both_ways([[0, i] for i in range(1, 301)])
    x, coefficients = (t.detach() for t in inputs(8, n=301))
    expected = reference.filtered(x.bfloat16().double(), coefficients, star)
    found = fused.filtered(x.bfloat16(), coefficients, Neighbours.of(star, 301))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


def test_no_terms_are_kept():
    x, coefficients = inputs(5)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.append(t.numel()), lambda _: None
    ):
        fused.filtered(x, coefficients, Neighbours.of(GRAPHS["ring"], N))
    assert found.count(x.numel()) == 1


def test_no_nodes():
    x, coefficients = (t.detach() for t in inputs(2, n=0))
    assert fused.filtered(x, coefficients, Neighbours.of(EMPTY, 0)).shape == (0, H, D)


def test_a_filter_reaches_as_many_edges_far_as_its_order():
    path = Neighbours.of(both_ways([[i, i + 1] for i in range(N - 1)]), N)
    impulse = torch.zeros(N, 1, 1, dtype=torch.float64)
    impulse[0] = 1.0
    for order in (1, 3):
        out = fused.filtered(impulse, torch.ones(order + 1, 1, 1), path).flatten()
        assert (out[: order + 1] != 0).all()
        assert not out[order + 1 :].any()


def test_nothing_is_held_of_all_pairs_of_nodes():
    """20,000 nodes: a matrix of pairs would take 1.6 GB, and here 200,000 edges take a moment."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    pairs = torch.randint(0, n, (2, 100_000), generator=generator)
    near = Neighbours.of(torch.cat([pairs, pairs.flip(0)], dim=1), n)
    degree = near.offsets.diff().clamp(min=1).double()
    # sqrt(degree) is the eigenvector of eigenvalue 0, where T_k(-1) = (-1)^k
    x = degree.sqrt()[:, None, None]
    coefficients = torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(fused.filtered(x, coefficients, near), 5.0 * x)


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        (
            torch.tensor([[0, 1, 1], [1, 0, 2]]),
            "both ways, but from 2 to 1 there are fewer than back",
        ),
        (torch.tensor([[2, 1, 0], [1, 0, 1]]), "both ways, but from 1 to 2 there are fewer"),
        (torch.tensor([[2, 0, 1], [0, 1, 0]]), "both ways, but from 0 to 2 there are fewer"),
        (torch.tensor([[0, 11], [11, 0]]), r"nodes in \[0, 11\), got 0 to 11"),
        (torch.tensor([[-1, 0], [0, -1]]), r"got -1 to 0"),
        (torch.tensor([[0, 1], [1, 0]]).int(), r"int64 \(2, e\), got torch.int32"),
        (torch.tensor([0, 1]), r"int64 \(2, e\), got torch.int64 \(2,\)"),
    ],
)
def test_wrong_edges_are_named(edges, said):
    with pytest.raises(ValueError, match=said):
        Neighbours.of(edges, N)
