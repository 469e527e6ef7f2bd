"""What every combination of projection, score, reach and mixer owes."""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call

from sixfold.attention.cache import KeyValueCache
from sixfold.contracts import Visibility
from sixfold.ops.attend.reference import logits


def gradients(layer, x, **kwargs):
    """Gradients of a fixed weighted sum of the output, by parameter, and of the input."""
    x = x.clone().requires_grad_()
    out = layer(x, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad((out * weight.to(out.dtype)).sum(), [*layer.parameters(), x])
    return dict(zip([*names, "x"], found, strict=True))


def test_all_parts_that_fit_serve_together(fitting, make, tokens):
    layer, x = make(fitting), tokens(2, 6)
    other = x.clone()
    other[:, 4:] = tokens(2, 2, seed=1)
    one, two = layer(x, is_causal=True), layer(other, is_causal=True)
    assert torch.equal(one[:, :4], two[:, :4])
    assert not torch.equal(one, two)


def test_parts_that_do_not_fit_are_refused_by_name(refused, make):
    projection, score, reach, mixer = (part["name"] for part in refused.values())
    said = rf"{projection}.*emits a .*{score}.*rates a|mixer .*{mixer}.*cannot be used .*{reach}"
    with pytest.raises(ValueError, match=said):
        make(refused)


@pytest.mark.parametrize("n", [1, 7, 33])
def test_shape_is_kept(layer, tokens, n):
    x = tokens(3, n)
    out = layer(x, is_causal=n == 7)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert torch.isfinite(out).all()


def test_every_parameter_gets_a_gradient(layer, tokens):
    for kwargs in ({}, {"is_causal": True}):
        for name, gradient in gradients(layer, tokens(2, 33), **kwargs).items():
            assert torch.isfinite(gradient).all(), name
            assert gradient.norm() > 1e-9, name
            # vectors hold one number per head, edge or unit: none may be dead
            if gradient.ndim == 1:
                assert (gradient != 0).all(), name


@pytest.mark.parametrize("how", ["is_causal", "mask", "with_keys"])
def test_the_future_does_not_leak(single, tokens, how, masked):
    if how == "mask" and not masked:
        pytest.skip("takes no mask of pairs")
    x, cut = tokens(2, 33, dtype=torch.float32), 20
    lower = torch.ones(33, 33, dtype=torch.bool).tril()
    real = torch.ones(2, 33, dtype=torch.bool)
    real[1, :3] = False
    kwargs = {
        "is_causal": {"is_causal": True},
        "mask": {"attn_mask": lower},
        "with_keys": {"is_causal": True, "key_mask": real},
    }[how]
    other = x.clone()
    other[:, cut:] = tokens(2, 13, dtype=torch.float32, seed=1)
    one, two = single(x, **kwargs), single(other, **kwargs)
    assert torch.equal(one[:, :cut], two[:, :cut])
    assert not torch.equal(one[:, cut:], two[:, cut:])


def test_a_causal_mask_is_is_causal(layer, tokens, masked):
    x = tokens(2, 9)
    if not masked:
        with pytest.raises(ValueError, match="takes key_mask and is_causal, not attn_mask"):
            layer(x, attn_mask=torch.ones(9, 9, dtype=torch.bool).tril())
        return
    lower = torch.ones(9, 9, dtype=torch.bool).tril()
    flag = layer(x, is_causal=True)
    for mask in (lower, torch.zeros(9, 9).masked_fill(~lower, float("-inf"))):
        torch.testing.assert_close(layer(x, attn_mask=mask), flag, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_does_not_leak(layer, tokens, side, is_causal):
    """Padded rows give what each sequence gives alone, whatever the padding holds."""
    lengths, n = (9, 4, 6), 9
    padded, other = tokens(3, n), tokens(3, n, seed=1)
    real = torch.zeros(3, n, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, slice(n - length, n) if side == "left" else slice(length)] = True
    other[real] = padded[real]
    one, two = (layer(x, key_mask=real, is_causal=is_causal) for x in (padded, other))
    assert torch.equal(one[real], two[real])
    for row in range(3):
        alone = layer(padded[row : row + 1, real[row]], is_causal=is_causal)[0]
        torch.testing.assert_close(one[row, real[row]], alone, rtol=0, atol=1e-12)


def test_batch_rows_are_independent(layer, tokens):
    x = tokens(3, 8)
    other = x.clone()
    other[1:] = tokens(2, 8, seed=1)
    one = layer(x)
    assert torch.equal(one[0], layer(other)[0])
    torch.testing.assert_close(one[:1], layer(x[:1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_segments_equal_one_pass(layer, tokens, padded):
    x, real = tokens(2, 14), torch.ones(2, 14, dtype=torch.bool)
    if padded:
        real[0, :6] = False
    whole = layer(x, key_mask=real, is_causal=True)
    cache, parts = KeyValueCache(), []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 14)):
        seen = {"key_mask": real[:, :end]} if padded else {}
        parts.append(layer(x[:, start:end], is_causal=True, cache=cache, **seen))
        assert cache.length == end
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=1e-12)


def test_gradients_flow_through_segments(layer, tokens):
    x = tokens(2, 9)
    found = []
    for bounds in ((9,), (2, 3, 9)):
        point, cache, parts, start = x.clone().requires_grad_(), KeyValueCache(), [], 0
        for end in bounds:
            parts.append(layer(point[:, start:end], is_causal=True, cache=cache))
            start = end
        found.append(torch.autograd.grad(torch.cat(parts, 1).square().sum(), point)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_cache_can_be_cropped_and_reordered(layer, tokens):
    x, junk, rows = tokens(2, 10), tokens(2, 5, seed=1), torch.tensor([1, 1, 0])
    cache = KeyValueCache()
    layer(x[:, :6], is_causal=True, cache=cache)
    layer(junk, is_causal=True, cache=cache)
    cache.crop(6)
    assert cache.length == 6
    cache.reorder(rows)
    tail = layer(x[rows, 6:], is_causal=True, cache=cache)
    whole = layer(x, is_causal=True)[rows, 6:]
    torch.testing.assert_close(tail, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_weights_are_a_distribution_over_what_is_visible(single, tokens, kind, masked):
    if not masked:
        pytest.skip("takes no mask of pairs")
    x = tokens(2, 9, dtype=torch.float32)
    seen = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, 3] = False
    seen[:, 2, 2] = True
    mask = seen if kind == "bool" else torch.zeros(2, 9, 9).masked_fill(~seen, float("-inf"))
    out, weights = single(x, attn_mask=mask, need_weights=True)
    assert torch.equal(out, single(x, attn_mask=mask))
    assert weights.shape == (2, 7, 9, 9)
    assert (weights[~seen[:, None].expand_as(weights)] == 0).all()
    total = weights.sum(-1)
    blind = (weights == 0).all(-1)
    assert blind[:, :, 3].all()
    assert not blind[:, :, 2].any()
    assert (total[blind] == 0).all()
    torch.testing.assert_close(total[~blind], torch.ones_like(total[~blind]))
    assert (out[:, 3] == 0).all()


def test_the_reference_is_what_is_computed(layer, tokens):
    slow = copy.deepcopy(layer)
    slow.impl = "reference"
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    x = tokens(2, 9)
    for kwargs in ({}, {"is_causal": True, "key_mask": real}):
        torch.testing.assert_close(layer(x, **kwargs), slow(x, **kwargs), rtol=0, atol=1e-12)
        found, expected = (gradients(one, x, **kwargs) for one in (layer, slow))
        for name in expected:
            torch.testing.assert_close(
                found[name], expected[name], rtol=1e-12, atol=1e-11, msg=lambda m, n=name: n + m
            )


def test_the_reference_has_a_second_derivative(options, make, tokens):
    layer = make(options, impl="reference", d_model=4, head_dim=2)
    x = tokens(1, 3, width=4).requires_grad_()
    first = torch.autograd.grad(layer(x, is_causal=True).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), list(layer.parameters()))
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in second)


def test_round_trips_are_exact(options, layer, make, tokens):
    x = tokens(2, 7)
    expected = layer(x, is_causal=True)
    fresh = make(options, seed=1)
    assert not torch.equal(fresh(x, is_causal=True), expected)
    fresh.load_state_dict(layer.state_dict())
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = (
        fresh,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(x, is_causal=True), expected)


def test_gradients_are_those_of_finite_differences(options, make, tokens):
    layer = make(options, d_model=4, head_dim=2)
    names = [name for name, _ in layer.named_parameters()]
    real = torch.tensor([[True, True, False], [True, True, True]])

    def function(x, *values):
        parameters = dict(zip(names, values, strict=True))
        return functional_call(layer, parameters, (x,), {"is_causal": True, "key_mask": real})

    x = tokens(2, 3, width=4).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), fast_mode=True)


def test_bfloat16_errs_at_most_twice_as_much_as_the_reference_in_bfloat16(options, make, tokens):
    low = make(options, dtype=torch.bfloat16)
    slow, golden = copy.deepcopy(low), copy.deepcopy(low).double()
    slow.impl = golden.impl = "reference"
    x = tokens(3, 33, dtype=torch.bfloat16)
    for kwargs in ({}, {"is_causal": True}):
        truth = golden(x.double(), **kwargs)
        ours, theirs = (one(x, **kwargs).double() for one in (low, slow))
        assert torch.isfinite(ours).all()
        rounding = torch.finfo(torch.bfloat16).eps * truth.abs().mean()
        assert (ours - truth).abs().mean() <= 2 * (theirs - truth).abs().mean() + rounding


def test_autocast_runs_forward_and_backward(single, tokens):
    x = tokens(2, 9, dtype=torch.float32)
    for impl in ("auto", "reference"):
        layer = copy.deepcopy(single)
        layer.impl = impl
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, is_causal=True)
        out.float().square().sum().backward()
        truth = single(x, is_causal=True)
        assert (out.float() - truth).norm() < 0.05 * truth.norm()
        for name, parameter in layer.named_parameters():
            assert parameter.grad.dtype == torch.float32, name
            assert torch.isfinite(parameter.grad).all(), name


def test_the_token_axis_may_come_first(options, layer, make, tokens):
    turned = make(options, batch_first=False)
    turned.load_state_dict(layer.state_dict())
    x = tokens(2, 7)
    out, weights = turned(x.transpose(0, 1), is_causal=True, need_weights=True)
    expected, same = layer(x, is_causal=True, need_weights=True)
    assert torch.equal(out.transpose(0, 1), expected)
    assert torch.equal(weights, same)


def test_device_and_dtype_are_honoured(options, layer, make, tokens):
    from sixfold import MultiHeadAttention

    sizes = {"d_model": 24, "num_heads": 7, "head_dim": 4}
    by_keyword = MultiHeadAttention(**sizes, **options, device="meta", dtype=torch.float64)
    with torch.device("meta"):
        by_context = MultiHeadAttention(**sizes, **options, dtype=torch.float64)
    x = tokens(2, 7)
    for empty in (by_keyword, by_context):
        held = [*empty.parameters(), *empty.buffers()]
        assert {tensor.device.type for tensor in held} == {"meta"}
        assert {t.dtype for t in held if t.is_floating_point()} == {torch.float64}
        assert empty(x.to("meta"), is_causal=True).shape == x.shape
        empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
        assert torch.equal(empty(x, is_causal=True), layer(x, is_causal=True))


class Seen:
    """Keeps what the score says in one pass, whoever sees it."""

    def __init__(self):
        self.logits, self.stages = None, []

    def observe(self, observation):
        self.logits = logits(observation.rating, Visibility(None, is_causal=False))

    def mark(self, stage):
        self.stages.append(stage)


def observed(layer, x, **kwargs):
    """The logits a probe sees, and the layer's output."""
    layer.probe = Seen()
    out = layer(x, **kwargs)
    seen, layer.probe = layer.probe, None
    assert seen.stages == ["start", "projection", "attention", "mixing", "output"]
    return seen.logits, out


@pytest.mark.parametrize("kv_heads", [7, 1])
@torch.no_grad()
def test_scaling_a_head_is_exact_and_reversible(options, make, tokens, kv_heads):
    layer = make(options, dtype=torch.float32, num_kv_heads=kv_heads)
    x, head = tokens(2, 7, dtype=torch.float32), 2
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    before, expected = observed(layer, x)
    for power in (-3, -2, -1, 1, 4):
        layer.scale_head_(head, power)
        after, moved = observed(layer, x)
        wanted = before.clone()
        wanted[:, head] *= 2.0**power
        assert torch.equal(after, wanted), power
        assert not torch.equal(moved, expected)
        layer.scale_head_(head, -power)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, state[name]), (power, name)
        assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_scalings_add_up(options, make, tokens):
    layer = make(options, dtype=torch.float32)
    x = tokens(1, 5, dtype=torch.float32)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    before, _ = observed(layer, x)
    for power in (-1, -3):
        layer.scale_head_(5, power)
    before[:, 5] *= 2.0**-4
    assert torch.equal(observed(layer, x)[0], before)
    for power in (3, 1):
        layer.scale_head_(5, power)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_a_probe_changes_no_bit(layer, tokens):
    x = tokens(2, 7)
    assert torch.equal(observed(layer, x)[1], layer(x))


@pytest.mark.parametrize("kv_heads", [7, 1])
def test_cross_attention_ignores_padding_and_order_of_the_context(options, make, tokens, kv_heads):
    layer = make(options, num_kv_heads=kv_heads)
    x, context = tokens(2, 4), tokens(2, 6, seed=1)
    if options["reach"]["name"] != "full":
        with pytest.raises(ValueError, match="reach '.*' orders the tokens of one sequence"):
            layer(x, context)
        return
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    other = context.clone()
    other[1, 4:] = tokens(1, 2, seed=2)[0]
    out = layer(x, context, key_mask=real)
    assert out.shape == x.shape
    assert torch.equal(out, layer(x, other, key_mask=real))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = layer(x, context[:, order], key_mask=real[:, order])
    torch.testing.assert_close(out, turned, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1:], layer(x[1:], context[1:, :4]), rtol=0, atol=1e-12)


def test_nothing_gives_nothing(layer, tokens):
    """No sequence, no token: shapes are kept and nothing is seen."""
    for batch, n in ((0, 5), (2, 0)):
        assert layer(tokens(batch, n)).shape == (batch, n, 24)
        found = layer.statistics(tokens(batch, n))
        assert found.entropy.shape == found.log_sum_exp.shape == (batch, 7, n)
        assert found.received.shape == (batch, 7, n)


def test_a_clip_is_kept_wherever_the_state_goes(options, make, tokens):
    """Also where no hook of `load_state_dict` runs, as in loaders that fill tensors by name."""
    layer, x = make(options), tokens(1, 5)
    layer.scale_head_(2, -3)
    expected = layer(x)
    other = make(options)
    state = layer.state_dict()
    torch.testing.assert_close(functional_call(other, state, (x,)), expected, rtol=0, atol=0)
    for name, buffer in other.named_buffers():
        buffer.copy_(state[name])
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_nan_is_seen(options, make, tokens):
    layer, x = make(options), tokens(2, 5)
    with torch.no_grad():
        for name, weight in layer.projection.named_parameters():
            if weight.ndim >= 2 and "network" not in name:
                weight.fill_(float("nan"))
    assert layer(x).isnan().any()
