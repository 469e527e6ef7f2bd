"""Fused attention against the materialised definition, and the definition against a loop."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sixfold.contracts import Features, Visibility
from sixfold.ops.attend import fused, reference

INF = float("inf")


def inputs(n, m, kv_heads=4, width=8, dtype=torch.float64, seed=0):
    """Queries, keys and values with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, n, width), (2, kv_heads, m, width), (2, kv_heads, m, width))
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [tensor.requires_grad_() for tensor in made]


def run(attend, tensors, visibility, scale=0.3):
    """Output and the gradients of a fixed weighted sum of it."""
    query, key, value = tensors
    out = attend(Features(query, key, scale), value, visibility, 0.0)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad((out * weight).sum(), tensors))


def loop(tensors, visibility, scale=0.3):
    """One query at a time, in plain arithmetic."""
    query, key, value = (t.detach() for t in tensors)
    batch, heads, n, _ = query.shape
    m, group = key.shape[2], heads // key.shape[1]
    out = torch.zeros(batch, heads, n, value.shape[-1], dtype=query.dtype)
    mask = visibility.mask
    whole = None if mask is None else mask.expand(batch, heads, n, m)
    for b, h, i in itertools.product(range(batch), range(heads), range(n)):
        scores = {}
        for j in range(m):
            bias = 0.0
            if whole is not None:
                cell = whole[b, h, i, j]
                bias = float(cell) if mask.dtype != torch.bool else (0.0 if cell else -INF)
            if visibility.is_causal and j > i + m - n:
                bias = -INF
            if bias > -INF:
                scores[j] = scale * float(query[b, h, i] @ key[b, h // group, j]) + bias
        if scores:
            top = max(scores.values())
            total = sum(math.exp(s - top) for s in scores.values())
            for j, s in scores.items():
                out[b, h, i] += math.exp(s - top) / total * value[b, h // group, j]
    return out


@pytest.mark.parametrize(("n", "m", "kv_heads"), [(5, 5, 4), (3, 7, 2), (7, 3, 1), (1, 6, 4)])
def test_the_reference_is_the_loop(masks, kind, n, m, kv_heads):
    tensors, kinds = inputs(n, m, kv_heads), masks(n, m)
    found = reference.attend(Features(*tensors[:2], 0.3), tensors[2], kinds[kind], 0.0)
    torch.testing.assert_close(found.detach(), loop(tensors, kinds[kind]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "m", "kv_heads"),
    [(33, 33, 4), (33, 33, 2), (33, 7, 4), (7, 33, 1), (1, 1, 4), (1, 33, 4)],
)
def test_fused_is_the_reference(masks, kind, n, m, kv_heads):
    tensors, kinds = inputs(n, m, kv_heads), masks(n, m)
    expected, found = (run(a, tensors, kinds[kind]) for a in (reference.attend, fused.attend))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_no_more_than_eager(masks, kind, dtype):
    """At most 10 (float32) or 1.1 (bfloat16) times the eager error against float64.

    The budget added is the rounding of the result itself: one unit in the last place of the dtype,
    and of float32 for each of the m keys and d features that are summed.
    """
    n, width = 65, 16
    tensors, kinds = inputs(n, n, 2, width, dtype), masks(n, n)
    golden_tensors = [t.detach().double().requires_grad_() for t in tensors]
    golden = run(reference.attend, golden_tensors, kinds[kind])
    eager = run(reference.attend, tensors, kinds[kind])
    found = run(fused.attend, tensors, kinds[kind])
    fudge = 10 if dtype == torch.float32 else 1.1
    # a bfloat16 softmax rounds its weights to eps; they are then summed over the keys
    budget = torch.finfo(dtype).eps + math.sqrt(n + width) * torch.finfo(torch.float32).eps
    for gold, low, ours in zip(golden, eager, found, strict=True):
        assert ours.dtype == dtype
        for error in (lambda x: x.abs().mean(), lambda x: x.abs().max()):
            allowed = fudge * error(low.double() - gold) + budget * error(gold)
            assert error(ours.double() - gold) <= allowed


@pytest.mark.parametrize("attend", [reference.attend, fused.attend], ids=["reference", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
@pytest.mark.parametrize("m", [6, 33])
def test_blind_rows_are_zero_and_their_gradients_finite(attend, dtype, kind, m):
    n = 9 if m == 6 else 33
    tensors = inputs(n, m, dtype=dtype)
    blind = torch.zeros(n, 1, dtype=torch.bool)
    if kind == "causal":
        blind[: max(n - m, 0)] = True
        visibility = Visibility(None, is_causal=True)
    else:
        blind[[1, 4]] = True
        mask = ~blind.expand(n, m)
        if kind == "float":
            mask = torch.zeros(n, m).masked_fill(~mask, -INF)
        visibility = Visibility(mask, is_causal=False)
    out, *gradients = run(attend, tensors, visibility)
    rows = blind.flatten()
    assert (out[:, :, rows] == 0).all()
    assert (out[:, :, ~rows] != 0).all()
    assert all(torch.isfinite(g).all() for g in gradients)
    assert (gradients[0][:, :, rows] == 0).all()
    weights = reference.weights(Features(*tensors[:2], 0.3), visibility)
    assert (weights[:, :, rows] == 0).all()


def test_gradient_of_the_reference(masks):
    tensors, kinds = inputs(3, 4, 2, 3), masks(3, 4)
    for kind in ("none", "causal", "holes", "causal_keys"):

        def function(query, key, value, seen=kinds[kind]):
            return reference.attend(Features(query, key, 0.7), value, seen, 0.0)

        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_gradient_of_a_float_mask(masks):
    tensors, kinds = inputs(5, 5), masks(5, 5)
    found = []
    for attend in (reference.attend, fused.attend):
        bias = kinds["float"].mask.clone().requires_grad_()
        seen = Visibility(bias, is_causal=False)
        out = attend(Features(*tensors[:2], 0.3), tensors[2], seen, 0.0)
        found.append(torch.autograd.grad(out.square().sum(), bias)[0])
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_fused_never_has_a_second_derivative_in_silence():
    """PyTorch's kernel says so itself; what it composes of small operations has one, and true."""
    found = []
    for attend, backends in (
        (reference.attend, ()),
        (fused.attend, SDPBackend.MATH),
        (fused.attend, SDPBackend.FLASH_ATTENTION),
    ):
        query, key, value = inputs(3, 4)
        with sdpa_kernel(backends) if backends else nullcontext():
            out = attend(Features(query, key, 0.3), value, Visibility(None, False), 0.0)
        first = torch.autograd.grad(out.square().sum(), query, create_graph=True)[0]
        if backends == SDPBackend.FLASH_ATTENTION:
            with pytest.raises(RuntimeError, match="derivative for .* is not implemented"):
                first.square().sum().backward()
        else:
            found.append(torch.autograd.grad(first.square().sum(), query)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_causality_is_aligned_to_the_last_key():
    mask = reference.visible(Visibility(None, is_causal=True), 2, 5, torch.device("cpu"))
    assert mask.tolist() == [[True] * 4 + [False], [True] * 5]


@pytest.mark.parametrize("attend", [reference.attend, fused.attend], ids=["reference", "fused"])
def test_dropout_keeps_the_mean_and_drops_the_share(attend):
    """Values are one-hot, so the output shows the dropped weights: 0 or p / (1 - rate)."""
    torch.manual_seed(0)
    rate, m = 0.3, 64
    features = Features(torch.randn(4, 4, m, 8), torch.randn(4, 4, m, 8), 0.3)
    everything = Visibility(None, is_causal=False)
    shown = attend(features, torch.eye(m).expand(4, 4, m, m), everything, rate)
    weights = reference.weights(features, everything)
    dropped = shown == 0
    count = dropped.numel()
    # four standard deviations of a binomial share
    assert abs(dropped.double().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / count)
    torch.testing.assert_close(shown[~dropped], weights[~dropped] / (1 - rate))


def test_half_precision_that_sums_beyond_its_range_is_no_nan():
    query = torch.full((1, 1, 4, 64), 1500.0, dtype=torch.float16)
    key = torch.full((1, 1, 4, 64), -1500.0, dtype=torch.float16)
    value = torch.ones(1, 1, 4, 64, dtype=torch.float16)
    out = fused.attend(Features(query, key, 1e-6), value, Visibility(None, is_causal=False), 0.0)
    assert torch.equal(out, value)
