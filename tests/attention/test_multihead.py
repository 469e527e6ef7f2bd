"""The module against independent implementations, and what it refuses."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from torch import nn

from sixfold import HexagonalMultiHeadAttention, MultiHeadAttention
from sixfold.attention.cache import KeyValueCache
from sixfold.attention.masks import same_document
from sixfold.attention.multihead import build_part
from sixfold.attention.rotary import rotate
from sixfold.contracts import Heads
from sixfold.discover import load, names

CLOSE = {"rtol": 0, "atol": 1e-12}


def plain(layer, x, context):
    """Cross-attention by einsum, from the weights the layer says it has."""
    weights = layer.materialize()
    groups = layer.heads.num_heads // layer.heads.num_kv_heads
    query = torch.einsum("bnm,hdm->bhnd", x, weights["q"])
    key, value = (
        torch.einsum("bnm,hdm->bhnd", context, weights[role]).repeat_interleave(groups, 1)
        for role in "kv"
    )
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) / math.sqrt(layer.heads.head_dim)
    heads = torch.einsum("bhnm,bhmd->bnhd", scores.softmax(-1), value)
    return heads.flatten(2) @ layer.output.weight.T


@pytest.mark.parametrize("projection", ["linear", "coordinate"])
@pytest.mark.parametrize("kv_heads", [7, 1])
def test_cross_attention_is_the_formula(make, tokens, projection, kv_heads):
    layer = make({"projection": projection}, num_kv_heads=kv_heads)
    x, context = tokens(2, 5), tokens(2, 8, seed=1)
    torch.testing.assert_close(layer(x, context), plain(layer, x, context), **CLOSE)
    torch.testing.assert_close(layer(x), plain(layer, x, x), **CLOSE)


def test_it_is_multihead_attention_of_pytorch(make, tokens):
    layer = make({}, d_model=24, num_heads=6)
    peer = nn.MultiheadAttention(24, 6, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        peer.in_proj_weight.copy_(layer.projection.qkv.weight)
        peer.out_proj.weight.copy_(layer.output.weight)
    x, real = tokens(3, 9), torch.ones(3, 9, dtype=torch.bool)
    real[1, 5:] = False
    lower = torch.ones(9, 9, dtype=torch.bool).tril()
    cases = (
        ({}, {}),
        ({"key_mask": real}, {"key_padding_mask": ~real}),
        ({"is_causal": True}, {"attn_mask": ~lower}),
        (
            {"key_mask": real, "attn_mask": lower},
            {"attn_mask": ~lower, "key_padding_mask": ~real},
        ),
    )
    for ours, theirs in cases:
        point, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, weights = layer(point, **ours, need_weights=True)
        expected, shown = peer(twin, twin, twin, **theirs, average_attn_weights=False)
        torch.testing.assert_close(out, expected, **CLOSE)
        torch.testing.assert_close(weights, shown, **CLOSE)
        mine = (point, layer.projection.qkv.weight, layer.output.weight)
        its = (twin, peer.in_proj_weight, peer.out_proj.weight)
        for one, other in zip(
            torch.autograd.grad(out.square().sum(), mine),
            torch.autograd.grad(expected.square().sum(), its),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


def test_biases_of_the_projection(make, tokens):
    layer = make({"projection": {"name": "linear", "bias": True}}, d_model=24, num_heads=6)
    peer = nn.MultiheadAttention(24, 6, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        peer.in_proj_weight.copy_(layer.projection.qkv.weight)
        peer.in_proj_bias.copy_(layer.projection.qkv.bias)
        peer.out_proj.weight.copy_(layer.output.weight)
        peer.out_proj.bias.zero_()
    x, context = tokens(2, 5), tokens(2, 8, seed=1)
    torch.testing.assert_close(layer(x, context), peer(x, context, context)[0], **CLOSE)


def test_grouped_queries_are_repeated_keys(make, tokens):
    grouped = make({}, num_heads=6, num_kv_heads=2)
    whole = make({}, num_heads=6)
    queries, keys, values = grouped.projection.qkv.weight.split([24, 8, 8])
    repeated = [
        t.unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1) for t in (keys, values)
    ]
    with torch.no_grad():
        whole.projection.qkv.weight.copy_(torch.cat([queries, *repeated]))
        whole.output.weight.copy_(grouped.output.weight)
    x = tokens(2, 9)
    for kwargs in ({}, {"is_causal": True}):
        one, two = (layer(x, need_weights=True, **kwargs) for layer in (grouped, whole))
        for found, expected in zip(one, two, strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


def test_cosine_is_the_cosine_and_its_temperature_is_bounded(make, tokens):
    layer = make({"score": "cosine"})
    x = tokens(2, 5)
    query, key, _ = layer.projection(x, x, None, None)
    cosine = torch.cosine_similarity(query[..., :, None, :], key[..., None, :, :], dim=-1)
    with torch.no_grad():
        layer.score.log_rate[3] = 50.0
    temperature = layer.score.log_rate.exp().clamp(max=100)
    expected = (temperature[:, None, None] * cosine).softmax(-1)
    torch.testing.assert_close(layer(x, need_weights=True)[1], expected, **CLOSE)
    with torch.no_grad():
        layer.projection.qkv.weight.mul_(7.0)
    torch.testing.assert_close(layer(x, need_weights=True)[1], expected, **CLOSE)


def test_a_window_sees_its_width(make, tokens):
    layer = make({"reach": {"name": "window", "width": 3}})
    _, weights = layer(tokens(1, 8), need_weights=True)
    place = torch.arange(8)
    near = (place[:, None] - place).abs() < 3
    assert torch.equal(weights[0, 0] > 0, near)
    _, weights = layer(tokens(1, 8), is_causal=True, need_weights=True)
    assert torch.equal(weights[0, 0] > 0, near.tril())
    wide = make({"reach": {"name": "window", "width": 8}})
    full = make({})
    torch.testing.assert_close(wide(tokens(1, 8)), full(tokens(1, 8)), **CLOSE)


# ---------------------------------------------------------------- rotary


def test_rotation_is_multiplication_by_a_complex_phase(tokens):
    x, theta, offset = tokens(2, 6, 8)[:, None], 100.0, 5
    turned = torch.complex(x[..., :4], x[..., 4:])
    for position in range(6):
        for pair in range(4):
            angle = (offset + position) * theta ** (-pair / 4)
            turned[:, :, position, pair] *= complex(math.cos(angle), math.sin(angle))
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate(x, offset, theta), expected, **CLOSE)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_with_rope_only_relative_position_matters(make, tokens, score):
    layer = make({"score": score}, rope_theta=100.0)
    x = tokens(1, 6)
    shifted = torch.cat([tokens(1, 4, seed=1), x], dim=1)
    real = torch.tensor([[False] * 4 + [True] * 6])
    for is_causal in (False, True):
        alone = layer(x, is_causal=is_causal)
        later = layer(shifted, key_mask=real, is_causal=is_causal)[:, 4:]
        torch.testing.assert_close(later, alone, **CLOSE)
    unordered = make({"score": score})
    assert (layer(x) - unordered(x)).abs().max() > 1e-3


@pytest.mark.parametrize("projection", ["linear", "coordinate", "hypernetwork"])
def test_rope_counts_the_cached_tokens(make, tokens, projection):
    layer = make({"projection": projection}, rope_theta=100.0)
    x, cache = tokens(2, 9), KeyValueCache()
    parts = [layer(part, is_causal=True, cache=cache) for part in x.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, is_causal=True), **CLOSE)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_dropout_is_unbiased_and_only_in_training(make, tokens, impl):
    layer = make({}, dropout=0.4, impl=impl)
    still = make({}, impl=impl)
    x = tokens(1, 6)
    layer.eval()
    assert torch.equal(layer(x), still(x))
    layer.train()
    torch.manual_seed(0)
    draws = layer(x.expand(4000, -1, -1)).detach()
    assert draws.std(0).min() > 0
    # five standard errors of the mean
    assert ((draws.mean(0) - still(x)[0]).abs() < 5 * draws.std(0) / 4000**0.5).all()


def test_weights_are_before_dropout(make, tokens):
    layer, still = make({}, dropout=0.4), make({})
    x = tokens(1, 6)
    assert torch.equal(layer(x, need_weights=True)[1], still(x, need_weights=True)[1])


# ---------------------------------------------------------------- the cache


def test_a_cache_gives_back_what_was_put_in(tokens):
    cache, pieces = KeyValueCache(), tokens(2, 50).split([3, 1, 1, 30, 15], dim=1)
    for count, piece in enumerate(pieces, 1):
        held = cache.append("key", piece)
        assert torch.equal(held, torch.cat(pieces[:count], 1))
    assert cache.length == 50
    for length in (-1, 51):
        with pytest.raises(ValueError, match=f"cannot crop a cache of 50 tokens to {length}"):
            cache.crop(length)
    cache.crop(4)
    again = cache.append("key", pieces[-1])
    assert torch.equal(again, torch.cat([torch.cat(pieces, 1)[:, :4], pieces[-1]], 1))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 5, 4), (2, 1, 5, 4), (2, 3, 5, 6)])
def test_a_cache_holds_one_batch_of_one_layer(shape, learns):
    cache = KeyValueCache()
    cache.append("key", torch.zeros(2, 3, 7, 4, requires_grad=learns))
    with pytest.raises(ValueError, match=r"cache holds key of \(batch, heads, width\) \(2, 3, 4\)"):
        cache.append("key", torch.zeros(shape, requires_grad=learns))
    assert cache.entry("key").shape == (2, 3, 7, 4)


@pytest.mark.parametrize("rows", [[0], torch.tensor([[0]]), torch.tensor([True]), torch.zeros(2)])
def test_a_cache_is_reordered_by_rows(rows):
    cache = KeyValueCache()
    cache.append("key", torch.arange(2.0).reshape(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"rows must be a tensor \(b,\) of int64 or int32, got"):
        cache.reorder(rows)
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.entry("key").flatten().tolist() == [1, 1, 0]


# ---------------------------------------------------------------- the seed's class


def test_the_seeds_call(tokens):
    torch.manual_seed(0)
    layer = HexagonalMultiHeadAttention(d_model=512, grid_radius=2)
    out = layer(torch.randn(4, 128, 512))
    assert out.shape == (4, 128, 512)
    assert layer.heads == (512, 19, 64, 19)
    assert layer.grid.radius == 2
    assert 0.01 < out.std() < 2


def test_the_seeds_class_is_a_composition(make, tokens):
    torch.manual_seed(0)
    named = HexagonalMultiHeadAttention(24, grid_radius=1, d_head=4, dtype=torch.float64)
    torch.manual_seed(0)
    composed = MultiHeadAttention(
        24, 7, 4, projection="coordinate", mixer="hexagonal", dtype=torch.float64
    )
    assert torch.equal(named(tokens(2, 5)), composed(tokens(2, 5)))
    written = HexagonalMultiHeadAttention(24, grid_radius=1, d_head=4, use_hypernet=True)
    assert type(written.projection).__name__ == "HypernetworkProjection"
    swapped = HexagonalMultiHeadAttention(24, 1, 4, mixer="ring")
    assert (swapped.mixer.graph() != 0).sum() == 7 + 14


# ---------------------------------------------------------------- penalties, caps, sinks, documents


def explicitly(layer, x, *, cap=None, sinks=None, slopes=None, seen=None):
    """Causal dot-product attention written out, one row at a time."""
    weights = layer.materialize()
    q, k, v = (torch.einsum("bnc,hdc->bhnd", x, weights[role]) for role in "qkv")
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    out = torch.zeros_like(q)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = [j for j in range(i + 1) if seen is None or seen[b, i, j]]
        s = torch.stack([q[b, h, i] @ k[b, h, j] / q.shape[-1] ** 0.5 for j in keys])
        s = s if cap is None else cap * (s / cap).tanh()
        if slopes is not None:
            s = s - slopes[h] * torch.tensor([i - j for j in keys], dtype=s.dtype)
        rest = 0.0 if sinks is None else sinks[h].exp()
        out[b, h, i] = (s.exp() @ v[b, h, keys]) / (s.exp().sum() + rest)
    return layer.output(out.transpose(1, 2).flatten(2))


EIGHT = [2.0**-i for i in range(1, 9)]


@pytest.mark.parametrize(
    ("heads", "expected"), [(8, EIGHT), (12, [*EIGHT, *(2.0 ** -(i + 0.5) for i in range(4))])]
)
def test_alibi_has_the_published_slopes(make, tokens, heads, expected):
    layer = make({}, num_heads=heads, reach="alibi")
    found = layer(tokens(2, 7), is_causal=True)
    wanted = explicitly(layer, tokens(2, 7), slopes=expected)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(("cap", "sinks"), [(1.5, False), (None, True), (1.5, True)])
def test_caps_and_sinks_are_their_formula(make, tokens, impl, kv_heads, cap, sinks):
    sizes = {"num_heads": 6, "num_kv_heads": kv_heads, "softcap": cap, "sinks": sinks}
    layer, x = make({}, impl=impl, **sizes), 2 * tokens(2, 9).requires_grad_()
    found = layer(x, is_causal=True)
    wanted = explicitly(layer, x, cap=cap, sinks=layer.sinks)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    learned = [x, *layer.parameters()]
    flow = tokens(2, 9, seed=1)
    pairs = zip(*(torch.autograd.grad(y, learned, flow) for y in (found, wanted)), strict=True)
    for ours, exact in pairs:
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("score", ["dot", "cosine", "l1"])
@pytest.mark.parametrize("extra", [{"softcap": 2.0}, {"sinks": True}])
def test_caps_and_sinks_keep_what_a_layer_owes(make, tokens, score, extra):
    layer, x = make({}, score=score, **extra), tokens(2, 9)
    whole = layer(x, is_causal=True)
    cache = KeyValueCache()
    parts = [layer(part, is_causal=True, cache=cache) for part in x.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :3] = False
    alone = layer(x[1:, 3:], is_causal=True)
    padded = layer(x, is_causal=True, key_mask=real)
    torch.testing.assert_close(padded[1:, 3:], alone, rtol=0, atol=1e-12)
    assert (padded[1, :3] == 0).all()
    out, weights = layer(x, is_causal=True, need_weights=True)
    assert torch.equal(out, whole)
    assert weights.shape == (2, 7, 9, 9)
    assert (weights.sum(-1) < 1).all() == ("sinks" in extra)
    found = layer.statistics(x, is_causal=True)
    torch.testing.assert_close(found.received.double(), weights.sum(-2), rtol=0, atol=1e-5)


def test_a_probe_does_not_see_the_sink(make, tokens):
    class Probe:
        def observe(self, observation):
            self.shape = observation.rating.key.shape

        def mark(self, stage):
            pass

    layer, probe = make({}, sinks=True), Probe()
    layer.probe = probe
    layer(tokens(2, 5))
    assert probe.shape[-2] == 5


def test_a_float_mask_passes_the_sink_by(make, tokens):
    layer, x = make({}, sinks=True), tokens(2, 1)
    mask = torch.full((1, 1), 3.0, dtype=torch.float64)
    _, plain = layer(x, need_weights=True)
    _, raised = layer(x, attn_mask=mask, need_weights=True)
    odds = plain / (1 - plain) * torch.tensor(3.0, dtype=torch.float64).exp()
    torch.testing.assert_close(raised, odds / (1 + odds), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"rope_theta": 1e4}, {"reach": "alibi"}, {"score": "l1"}])
def test_packed_documents_do_not_meet(make, tokens, options):
    layer, x = make({}, **options), tokens(1, 9)
    packed = layer(x, is_causal=True, attn_mask=same_document(torch.tensor([[3] * 4 + [1] * 5])))
    alone = [layer(part, is_causal=True) for part in x.split([4, 5], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 23), (2, 3, 5, 24)])
def test_wrong_widths_are_refused(make, shape):
    layer, right = make({}), torch.zeros(2, 5, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x must be \(b, n, d_model\) with d_model 24, got"):
        layer(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"context must be \(b, n, d_model\) with d_model 24"):
        layer(right, torch.zeros(shape, dtype=torch.float64))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "linera"}, "unknown projection 'linera'.*Did you mean 'linear'"),
        ({"score": "cosin"}, "unknown score 'cosin'.*Did you mean 'cosine'"),
        ({"reach": "windows"}, "unknown reach 'windows'.*Did you mean 'window'"),
        ({"mixer": "hexagon"}, "unknown mixer 'hexagon'.*Did you mean 'hexagonal'"),
        ({"reach": "window"}, "reach 'window' needs width: give"),
        (
            {"reach": {"name": "window", "width": 0}},
            "width must be a whole number of 1 or more, got 0",
        ),
        ({"reach": {"name": "window", "width": 2.5}}, "whole number of 1 or more, got 2.5"),
        ({"mixer": None}, "mixer must be a name, or a name with options, got None"),
        ({"mixer": {"tied": True}}, r"mixer needs a name: .* beside \['tied'\]"),
        ({"score": {"name": "dot", "power": 2}}, "score 'dot'.*power"),
        ({"mixer": {"name": "hexagonal", "free": True}}, "mixer 'hexagonal'.*free"),
        (
            {"impl": "fast"},
            "unknown impl 'fast'; choose from: auto, fused, numba, reference, tiled, triton",
        ),
        ({"d_model": 0}, "d_model must be a whole number of 1 or more, got 0"),
        ({"d_model": "64"}, "d_model must be a whole number of 1 or more, got '64'"),
        ({"num_heads": 4.0}, "num_heads must be a whole number of 1 or more, got 4.0"),
        ({"num_heads": 0}, "num_heads must be a whole number of 1 or more, got 0"),
        ({"head_dim": 0}, "head_dim must be a whole number of 1 or more, got 0"),
        ({"head_dim": -4}, "head_dim must be a whole number of 1 or more, got -4"),
        ({"num_heads": 7, "head_dim": None}, "d_model 24 is not a multiple of num_heads 7"),
        ({"num_kv_heads": 4}, "num_kv_heads 4 does not divide num_heads 6"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a whole number of 1 or more, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"head_dim": 3, "rope_theta": 10.0}, "head_dim must be even, got 3"),
        ({"rope_theta": 0.0}, "rope_theta must be positive and finite, or None, got 0.0"),
        ({"rope_theta": -1e4}, "rope_theta must be positive and finite, or None, got -10000"),
        ({"projection": "coordinate"}, "'coordinate'.*no hexagonal grid has 6 heads.*7"),
        ({"projection": "hypernetwork"}, "'hypernetwork'.*no hexagonal grid has 6 heads.*7"),
        ({"mixer": "hexagonal"}, "'hexagonal'.*no hexagonal grid has 6 heads.*7"),
        ({"mixer": "random"}, "'random'.*no hexagonal grid has 6 heads.*7"),
        ({"softcap": 0.0}, "softcap must be positive and finite, or None, got 0.0"),
        ({"softcap": math.inf}, "softcap must be positive and finite, or None, got inf"),
        ({"softcap": math.nan}, "softcap must be positive and finite, or None, got nan"),
        ({"softcap": "a"}, "softcap must be positive and finite, or None, got 'a'"),
        ({"rope_theta": "a"}, "rope_theta must be positive and finite, or None, got 'a'"),
        ({"dropout": "a"}, r"dropout must be in \[0, 1\), got 'a'"),
        ({"dropout": None}, r"dropout must be in \[0, 1\), got None"),
        ({"d_model": None}, "d_model must be a whole number of 1 or more, got None"),
        ({"num_heads": None}, "num_heads must be a whole number of 1 or more, got None"),
        ({"num_heads": True}, "num_heads must be a whole number of 1 or more, got True"),
        ({"softcap": 9.0, "impl": "fused"}, "softcap of score 'dot'.*impl 'fused' never holds"),
        ({"sinks": True, "score": "l1", "impl": "tiled"}, "sinks of score 'l1'.*impl 'tiled'"),
        ({"sinks": True, "score": "l2_squared"}, "sinks cannot be used with score 'l2_squared'"),
        (
            {"mixer": {"name": "random", "graph_seed": None}},
            "graph_seed must be a whole number of 0 or more, got None",
        ),
        ({"sinks": "no"}, "sinks must be True or False, got 'no'"),
        ({"batch_first": 1}, "batch_first must be True or False, got 1"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**({"d_model": 24, "num_heads": 6, "head_dim": 4} | options))


def flags():
    """Every option of a part that is True or False."""
    for kind in ("projection", "score", "reach", "mixer"):
        for name in names(f"sixfold.attention.{kind}"):
            build = inspect.signature(load(f"sixfold.attention.{kind}", name))
            for option in build.parameters.values():
                if isinstance(option.default, bool):
                    yield kind, name, option.name


@pytest.mark.parametrize(("kind", "name", "flag"), list(flags()))
def test_a_flag_is_true_or_false(kind, name, flag):
    with pytest.raises(
        ValueError, match=f"{kind} '{name}': {flag} must be True or False, got 'no'"
    ):
        build_part(kind, {"name": name, flag: "no"}, Heads(28, 7, 4, 7))


@pytest.mark.parametrize("flag", ["use_hypernet", "use_spectral"])
def test_a_flag_of_the_hexagonal_layer_is_true_or_false(flag):
    with pytest.raises(ValueError, match=f"{flag} must be True or False, got 'no'"):
        HexagonalMultiHeadAttention(28, 1, 4, **{flag: "no"})


@pytest.mark.parametrize(
    "shape", [(6, 5), (9,), (2, 4, 5), (3, 5, 5), (2, 3, 5, 5), (1, 1, 1, 5, 5)]
)
def test_wrong_mask_shapes_are_refused(make, tokens, shape):
    layer = make({})
    with pytest.raises(ValueError, match=r"attn_mask must be .* \(2, 7, 5, 5\)"):
        layer(tokens(2, 5), attn_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(5,), (2, 4), (1, 5), (2, 5, 5)])
def test_wrong_key_mask_shapes_are_refused(make, tokens, shape):
    with pytest.raises(ValueError, match=r"key_mask must be .* \(2, 5\)"):
        make({})(tokens(2, 5), key_mask=torch.ones(shape, dtype=torch.bool))


def test_wrong_mask_types_are_refused(make, tokens):
    layer, x = make({}), tokens(2, 5)
    with pytest.raises(ValueError, match=r"boolean .* or float, got torch\.int64"):
        layer(x, attn_mask=torch.ones(5, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="key_mask must be boolean"):
        layer(x, key_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="attn_mask must be a tensor, got ndarray"):
        layer(x, attn_mask=torch.ones(5, 5, dtype=torch.bool).numpy())


def test_inputs_that_cannot_be_meant_are_refused(make, tokens):
    layer, x = make({}), tokens(2, 5)
    with pytest.raises(ValueError, match=r"x must be floating, got torch\.int64: embed tokens"):
        layer(x.long())
    with pytest.raises(ValueError, match="context has a batch of 3, x one of 2"):
        layer(x, tokens(3, 4))
    with pytest.raises(ValueError, match=r"p must be a number in \[1, inf\], got '3'"):
        make({"score": {"name": "lp", "p": "3"}})


@pytest.mark.parametrize(
    "shape", [(5, 5), (1, 5), (5, 1), (2, 5, 5), (1, 1, 5), (2, 7, 5, 5), (1, 7, 1, 5)]
)
@pytest.mark.parametrize("projection", ["linear", "hypernetwork"])
@pytest.mark.parametrize("is_float", [False, True])
def test_masks_broadcast(make, tokens, shape, projection, is_float):
    layer, x = make({"projection": projection}), tokens(2, 5)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=generator) < 0.7
    whole = mask[:, None] if mask.ndim == 3 else mask
    whole = whole.expand(2, 7, 5, 5)
    if projection == "hypernetwork":
        if shape[1:2] == (7,):
            with pytest.raises(
                ValueError, match=r"hypernetwork.*attn_mask that differs between heads"
            ):
                layer(x, attn_mask=mask)
            return
        whole = whole[:, :1]
    if is_float:
        mask, whole = (torch.zeros(m.shape).masked_fill(~m, float("-inf")) for m in (mask, whole))
    torch.testing.assert_close(layer(x, attn_mask=mask), layer(x, attn_mask=whole), **CLOSE)


def test_a_context_has_no_cache_and_no_rope(make, tokens):
    x, context = tokens(2, 3), tokens(2, 4, seed=1)
    with pytest.raises(ValueError, match=r"a cache .* cannot serve a context"):
        make({})(x, context, cache=KeyValueCache())
    with pytest.raises(ValueError, match=r"rope .* cannot serve a context"):
        make({}, rope_theta=10.0)(x, context)


def test_a_hypernetwork_refuses_masks_it_cannot_serve(make, tokens):
    layer = make({"projection": "hypernetwork"})
    x, context = tokens(2, 3), tokens(2, 4, seed=1)
    differs = torch.ones(2, 7, 3, 3, dtype=torch.bool)
    torch.testing.assert_close(layer(x, attn_mask=differs), layer(x), **CLOSE)
    differs[:, 3, :, 0] = False
    with pytest.raises(ValueError, match=r"'hypernetwork'.*attn_mask that differs between heads"):
        layer(x, attn_mask=differs)
    for kwargs in ({"is_causal": True}, {"attn_mask": torch.ones(3, 4, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="'hypernetwork' cannot serve cross-attention"):
            layer(x, context, **kwargs)
    row = torch.tensor([[True, True, False, True]])
    same = layer(x, context, key_mask=row.expand(2, 4))
    torch.testing.assert_close(layer(x, context, attn_mask=row), same, **CLOSE)


@pytest.mark.parametrize("head", [-1, 7])
def test_a_head_that_is_not_there_cannot_be_scaled(make, head):
    with pytest.raises(ValueError, match=rf"head must be in \[0, 7\), got {head}"):
        make({}).scale_head_(head, 1)


# ---------------------------------------------------------------- compilers


GAUGE = {"projection": {"name": "gaussian", "frames": "so"}, "score": "kl", "reach": "others"}


@pytest.fixture
def fresh_compiler():
    """Layers of other tests do not count against the compiler's limit of versions."""
    torch.compiler.reset()


COMPILED = {
    "plain": {},
    "hexagonal": {"projection": "coordinate", "mixer": "hexagonal"},
    "hypernetwork": {
        "projection": "hypernetwork", "score": "cosine", "reach": {"name": "window", "width": 3},
    },
    "features": {"score": "l2_squared"},
    "beliefs": {"projection": "gaussian_diagonal", "score": "kl_diagonal"},
    "gauge": GAUGE,
    "tiles": {"score": "chebyshev"},
    "capped": {"reach": "alibi", "softcap": 2.0},
    "sinks": {"sinks": True},
}  # fmt: skip


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_it_compiles_as_one_graph(make, tokens, options, fresh_compiler):
    layer = make(options)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = tokens(2, 7).requires_grad_()
    found, expected = (one(x, is_causal=True) for one in (compiled, layer))
    torch.testing.assert_close(found, expected, **CLOSE)
    one, two = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_it_compiles_with_any_length(make, tokens, options, fresh_compiler):
    layer = make(options)
    compiled = torch.compile(
        copy.deepcopy(layer), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (7, 12, 33):
        x = tokens(2, n)
        torch.testing.assert_close(compiled(x, is_causal=True), layer(x, is_causal=True), **CLOSE)


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_it_exports(make, tokens, options):
    layer, x = make(options).eval(), tokens(2, 7)
    exported = torch.export.export(layer, (x,), {"is_causal": True}).module()
    torch.testing.assert_close(exported(x, is_causal=True), layer(x, is_causal=True), **CLOSE)


@torch.no_grad()
def test_default_device_and_dtype_are_followed():
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        layer = HexagonalMultiHeadAttention(24, 1, 4)
        assert layer(torch.randn(1, 3, 24)).dtype == torch.float64
    finally:
        torch.set_default_dtype(kept)
