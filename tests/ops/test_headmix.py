"""The fast head mix against the one written edge by edge."""

import pytest
import torch

from sixfold.geometry.graph import complete, ring
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.headmix import fused, reference

GRAPHS = {
    "hexagonal7": HexGrid(1).adjacency(),
    "hexagonal19": HexGrid(2).adjacency(),
    "ring": ring(6),
    "complete": complete(4),
    "single": torch.zeros(1, 1),
}


def inputs(name, width=5, dtype=torch.float64):
    """Heads, both weights, signed edge gains and signed gates (one closed), with gradients."""
    generator = torch.Generator().manual_seed(1)
    adjacency = GRAPHS[name].double()
    size = len(adjacency)
    graph = torch.randn(size, size, generator=generator, dtype=torch.float64)
    graph = graph * (adjacency + torch.eye(size, dtype=torch.float64))
    heads = torch.randn(2, 3, size, width, generator=generator, dtype=torch.float64)
    own, other = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    gate = torch.randn(size, generator=generator, dtype=torch.float64)
    gate[0] *= size == 1
    return [t.to(dtype).requires_grad_() for t in (heads, own, other, graph, gate)]


def run(mix, tensors):
    """Output and all gradients."""
    out = mix(*tensors)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    total = (out * weight).sum()
    return (out, *torch.autograd.grad(total, tensors, materialize_grads=True))


def test_the_reference_is_the_formula_at_one_head():
    heads, own, other, graph, gate = (t.detach() for t in inputs("ring"))
    near = (graph[2, 1] * heads[1, 2, 1] + graph[2, 3] * heads[1, 2, 3]) @ other
    mixture = (graph[2, 2] * heads[1, 2, 2] @ own + near).clamp(min=0)
    found = reference.headmix(heads, own, other, graph)[1, 2, 2]
    torch.testing.assert_close(found, mixture, rtol=0, atol=1e-12)
    found = reference.mix(heads, own, other, graph, gate)[1, 2, 2]
    torch.testing.assert_close(found, heads[1, 2, 2] + gate[2] * mixture, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["tokens_first", "heads_first"])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("width", [1, 5, 8])
def test_fused_is_the_reference(name, width, layout):
    tensors = inputs(name, width)
    if layout == "heads_first":
        turned = tensors[0].detach().transpose(1, 2).contiguous().transpose(1, 2)
        tensors[0] = turned.requires_grad_()
    for found, expected in zip(run(fused.mix, tensors), run(reference.mix, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_gradient_handed_in_is_not_altered():
    tensors = inputs("single")
    out = fused.mix(*tensors)
    given = torch.randn_like(out)
    kept = given.clone()
    torch.autograd.grad(out, tensors, given)
    assert torch.equal(given, kept)


@pytest.mark.parametrize(("dtype", "fudge"), [(torch.float32, 10), (torch.bfloat16, 1.1)])
@pytest.mark.parametrize("name", ["hexagonal7", "hexagonal19"])
def test_low_precision_errs_no_more_than_eager(name, dtype, fudge):
    """The budget added is the rounding of the result to its dtype."""
    tensors = inputs(name, 8, dtype)
    golden = run(reference.mix, [t.detach().double().requires_grad_() for t in tensors])
    eager, found = run(reference.mix, tensors), run(fused.mix, tensors)
    for gold, low, ours in zip(golden, eager, found, strict=True):
        assert ours.dtype == dtype
        budget = torch.finfo(dtype).eps * gold.abs().mean()
        allowed = fudge * (low.double() - gold).abs().mean() + budget
        assert (ours.double() - gold).abs().mean() <= allowed


def test_gradients_are_those_of_finite_differences():
    tensors = inputs("ring", 2)
    assert torch.autograd.gradcheck(reference.mix, tensors)
    assert torch.autograd.gradcheck(fused.mix, tensors)


def test_only_the_reference_can_be_differentiated_twice():
    tensors = inputs("complete", 2)
    assert torch.autograd.gradgradcheck(reference.mix, tensors, fast_mode=True)
    first = torch.autograd.grad(fused.mix(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()
