"""The fast filtering of heads against the one written head by head."""

import pytest
import torch

from sixfold.ops.headfilter import fused, reference

SIZES = {
    "one group": (7, 6, 1),
    "groups": (7, 6, 3),
    "a group each": (5, 4, 4),
    "one head": (1, 2, 2),
}


def inputs(name, dtype=torch.float64):
    """What is added to, heads, weight, operators and signed gates, with gradients."""
    heads, width, groups = SIZES[name]
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (2, 3, heads, width), (2, 3, heads, width), (width, width), (groups, heads, heads), (heads,),
    ]  # fmt: skip
    found = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [t.to(dtype).requires_grad_() for t in found]


def run(mix, tensors):
    """Output and all gradients."""
    out = mix(*tensors)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad((out * weight).sum(), tensors))


def test_the_reference_is_the_formula_at_one_channel():
    onto, heads, weight, operators, gate = (t.detach() for t in inputs("groups"))
    # channel 3 of 6 in 3 groups belongs to group 1
    passed = operators[1, 4] @ (heads[1, 2] @ weight[:, 3])
    expected = onto[1, 2, 4, 3] + gate[4] * passed.clamp(min=0)
    found = reference.mix(onto, heads, weight, operators, gate)[1, 2, 4, 3]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["tokens_first", "heads_first"])
@pytest.mark.parametrize("name", SIZES)
def test_fused_is_the_reference(name, layout):
    tensors = inputs(name)
    if layout == "heads_first":
        tensors[1] = tensors[1].detach().transpose(1, 2).contiguous().transpose(1, 2)
        tensors[1].requires_grad_()
    for found, expected in zip(run(fused.mix, tensors), run(reference.mix, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "fudge"), [(torch.float32, 10), (torch.bfloat16, 1.1)])
def test_low_precision_errs_no_more_than_eager(dtype, fudge):
    """The budget added is the rounding of the result to its dtype."""
    tensors = inputs("groups", dtype)
    golden = run(reference.mix, [t.detach().double().requires_grad_() for t in tensors])
    eager, found = run(reference.mix, tensors), run(fused.mix, tensors)
    for gold, low, ours in zip(golden, eager, found, strict=True):
        assert ours.dtype == dtype
        budget = torch.finfo(dtype).eps * gold.abs().mean()
        allowed = fudge * (low.double() - gold).abs().mean() + budget
        assert (ours.double() - gold).abs().mean() <= allowed


@pytest.mark.parametrize("mix", [fused.mix, reference.mix], ids=["fused", "reference"])
def test_gradients_are_those_of_finite_differences(mix):
    assert torch.autograd.gradcheck(mix, inputs("one head"))
    assert torch.autograd.gradcheck(mix, inputs("groups"), fast_mode=True)
    assert torch.autograd.gradgradcheck(mix, inputs("a group each"), fast_mode=True)


def test_no_tokens_and_no_batch_keep_their_shapes():
    tensors = [t.detach() for t in inputs("groups")]
    for shape in ((0, 3, 7, 6), (2, 0, 7, 6)):
        empty = torch.zeros(shape, dtype=torch.float64)
        for mix in (fused.mix, reference.mix):
            assert mix(empty, empty, *tensors[2:]).shape == shape
