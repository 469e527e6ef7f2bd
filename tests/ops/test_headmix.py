"""The fast head mixes against the one written edge by edge."""

import pytest
import torch

from sixfold.geometry.graph import complete, ring
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.headmix import dense, factored, reference

GRAPHS = {
    "hexagonal7": HexGrid(1).adjacency(),
    "hexagonal19": HexGrid(2).adjacency(),
    "ring": ring(6),
    "complete": complete(4),
    "single": torch.zeros(1, 1),
}


def inputs(name, width=5, dtype=torch.float64):
    """Heads, both weights and signed edge gains, with gradients."""
    generator = torch.Generator().manual_seed(1)
    adjacency = GRAPHS[name].double()
    size = len(adjacency)
    graph = torch.randn(size, size, generator=generator, dtype=torch.float64)
    graph = graph * (adjacency + torch.eye(size, dtype=torch.float64))
    heads = torch.randn(2, 3, size, width, generator=generator, dtype=torch.float64)
    own, other = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (heads, own, other, graph)]


def run(headmix, tensors):
    """Output and all gradients."""
    out = headmix(*tensors)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True))


def test_the_reference_is_the_formula_at_one_head():
    heads, own, other, graph = (t.detach() for t in inputs("ring"))
    near = (graph[2, 1] * heads[1, 2, 1] + graph[2, 3] * heads[1, 2, 3]) @ other
    expected = (graph[2, 2] * heads[1, 2, 2] @ own + near).clamp(min=0)
    found = reference.headmix(heads, own, other, graph)[1, 2, 2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("headmix", [dense.headmix, factored.headmix], ids=["dense", "factored"])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("width", [1, 5, 8])
def test_fast_is_the_reference(headmix, name, width):
    tensors = inputs(name, width)
    for found, expected in zip(
        run(headmix, tensors), run(reference.headmix, tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("headmix", [dense.headmix, factored.headmix], ids=["dense", "factored"])
@pytest.mark.parametrize(("dtype", "fudge"), [(torch.float32, 10), (torch.bfloat16, 1.1)])
def test_low_precision_errs_no_more_than_eager(headmix, dtype, fudge):
    tensors = inputs("hexagonal19", 8, dtype)
    golden = run(reference.headmix, [t.detach().double().requires_grad_() for t in tensors])
    eager, found = run(reference.headmix, tensors), run(headmix, tensors)
    for gold, low, ours in zip(golden, eager, found, strict=True):
        budget = torch.finfo(dtype).eps * gold.abs().mean()
        allowed = fudge * (low.double() - gold).abs().mean() + budget
        assert (ours.double() - gold).abs().mean() <= allowed


def test_gradient_of_the_reference():
    tensors = inputs("ring", 2)
    assert torch.autograd.gradcheck(reference.headmix, tensors)
    assert torch.autograd.gradgradcheck(reference.headmix, tensors)
