"""The hierarchical reach through the whole layer: exact where it must be, causal, cached, refused."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from sixfold.attention.cache import KeyValueCache
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import Visibility

EXACT = {"name": "hierarchical", "block": 8, "capacity": 8, "threshold": 0.0, "scales": 1}
LOOSE = {"name": "hierarchical", "block": 8, "capacity": 3, "threshold": 0.5}
LAYERS = {
    "dot": {},
    "dot, rope": {"rope_theta": 1e4},
    "cosine, rope": {"score": "cosine", "rope_theta": 1e4},
    "l2_squared": {"score": "l2_squared"},
    "kl": {"score": "kl", "projection": "gaussian"},
    "kl, so": {"score": "kl", "projection": {"name": "gaussian", "frames": "so"}},
    "kl, so per token": {
        "score": "kl", "projection": {"name": "gaussian", "frames": "so", "per": "token"},
    },
    "kl_diagonal": {"score": "kl_diagonal", "projection": "gaussian_diagonal"},
    "jeffreys": {"score": "jeffreys", "projection": "gaussian_diagonal"},
    "wasserstein2": {"score": "wasserstein2", "projection": "gaussian_diagonal"},
    "grouped": {"num_kv_heads": 2},
    "l1": {"score": "l1"},
}  # fmt: skip
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def layer(reach, options) -> MultiHeadAttention:
    torch.manual_seed(1)
    return MultiHeadAttention(32, 4, reach=reach, dtype=torch.float64, **options)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 61, 32, dtype=torch.float64)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@every_layer
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_what_padding_holds_reaches_no_output(x, options, impl):
    real = torch.ones(2, 61, dtype=torch.bool)
    real[0, :20] = real[1, 50:] = False
    held = x.masked_fill(~real[..., None], torch.nan)
    condensing = layer(LOOSE, options)
    condensing.impl = impl
    found = condensing(held, key_mask=real, is_causal=True)
    expected = condensing(held.nan_to_num(0.0), key_mask=real, is_causal=True)
    assert torch.equal(found[real], expected[real])


@every_layer
@pytest.mark.parametrize("causal", [True, False])
def test_with_threshold_zero_it_is_full_attention(x, options, causal):
    full, exact = layer("full", options), layer(EXACT, options)
    assert_same(exact(x, is_causal=causal), full(x, is_causal=causal))
    real = torch.ones(2, 61, dtype=torch.bool)
    real[0, :20] = real[1, 50:] = False
    expected = full(x, is_causal=causal, key_mask=real)
    assert_same(exact(x, is_causal=causal, key_mask=real), expected)


@every_layer
def test_segments_are_one_pass_and_a_cut_cache_goes_on(x, options):
    loose, cache = layer(LOOSE, options), KeyValueCache()
    whole = loose(x, is_causal=True)
    cuts = [0, 5, 6, 30, 31, 61]
    parts = [loose(x[:, a:b], is_causal=True, cache=cache) for a, b in pairwise(cuts)]
    assert_same(torch.cat(parts, 1), whole)
    cache.crop(27)
    assert_same(loose(x[:, 27:40], is_causal=True, cache=cache), whole[:, 27:40])
    cache.reorder(torch.tensor([1, 0]))
    swapped = loose(x.flip(0)[:, 40:61], is_causal=True, cache=cache)
    assert_same(swapped, whole.flip(0)[:, 40:61])


@every_layer
@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_says_the_same_and_its_weights_are_weights(x, options, causal):
    loose = layer(LOOSE, options)
    out, weights = loose(x, is_causal=causal, need_weights=True)
    assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if causal:
        assert not weights.triu(1).any()
    loose.impl = "reference"
    assert_same(loose(x, is_causal=causal), out)
    found = loose.statistics(x, is_causal=causal)
    entropy = torch.special.entr(weights).sum(-1)
    assert_same(found.entropy, entropy)


@pytest.mark.parametrize("options", [{"rope_theta": 1e4}, LAYERS["kl"]], ids=["dot", "kl"])
@pytest.mark.parametrize("padded", [True, False])
def test_sinks_are_the_same_in_segments_and_by_the_reference(x, options, padded):
    kept, cache = layer(LOOSE | {"sinks": 2}, options), KeyValueCache()
    real = torch.ones(2, 61, dtype=torch.bool) if padded else None
    if padded:
        real[0, :7] = False
    whole = kept(x, is_causal=True, key_mask=real)
    assert (layer(LOOSE, options)(x, is_causal=True, key_mask=real) != whole).any()
    parts = [
        kept(x[:, a:b], is_causal=True, key_mask=real[:, :b] if padded else None, cache=cache)
        for a, b in pairwise([0, 5, 30, 31, 61])
    ]
    assert_same(torch.cat(parts, 1), whole)
    kept.impl = "reference"
    assert_same(kept(x, is_causal=True, key_mask=real), whole)


@every_layer
def test_what_comes_later_changes_no_bit(x, options):
    loose = layer(LOOSE, options).double()
    later = x.clone()
    later[:, 41:] += 3
    one, other = (loose(tokens, is_causal=True)[:, :41] for tokens in (x, later))
    assert torch.equal(one, other)


def test_every_parameter_and_token_is_reached(x):
    x.requires_grad_()
    for options in LAYERS.values():
        loose = layer(LOOSE, options)
        x.requires_grad_()
        loss = loose(x, is_causal=True)[:, -1].square().sum()
        leaves = [x, *loose.parameters()]
        grads = torch.autograd.grad(loss, leaves)
        assert (grads[0].abs().sum(-1) > 0).all()
        assert all(g.isfinite().all() for g in grads)


def test_with_an_endless_threshold_it_is_a_fixed_pyramid(x):
    fixed = layer({**LOOSE, "threshold": float("inf"), "capacity": 8, "scales": 1}, {})
    q, k, v = fixed.projection(x, x, Visibility(None, is_causal=True), None)
    out = torch.empty_like(v)
    for t in range(61):  # every full block before the last one is its mean, eight times
        far = range(0, (t // 8 - 1) * 8, 8)
        keys = [k[:, :, i : i + 8].mean(2) for i in far]
        values = [v[:, :, i : i + 8].mean(2) for i in far]
        start = max(0, (t // 8 - 1) * 8)
        key = torch.stack([*keys, *k[:, :, start : t + 1].unbind(2)], 2)
        value = torch.stack([*values, *v[:, :, start : t + 1].unbind(2)], 2)
        logits = (q[:, :, t : t + 1] @ key.mT) * k.shape[-1] ** -0.5
        logits[..., : len(far)] += torch.tensor(8.0, dtype=torch.float64).log()
        out[:, :, t] = (logits.softmax(-1) @ value)[:, :, 0]
    assert_same(fixed(x, is_causal=True), fixed.output(out.transpose(1, 2).flatten(2)))


def test_equal_tokens_merge_without_error():
    """Rotated after they condense, equal tokens stay one group only where nothing rotates them."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 32, dtype=torch.float64).repeat_interleave(8, 1)
    reach = {"name": "hierarchical", "block": 8, "capacity": 1, "threshold": 1e-9}
    full, loose = layer("full", {}), layer(reach, {})
    assert_same(loose(x, is_causal=True)[:, :24], full(x, is_causal=True)[:, :24])


def test_rows_that_see_nothing_are_zero(x):
    loose = layer(LOOSE, {})
    real = torch.zeros(2, 61, dtype=torch.bool)
    real[:, 30:] = True
    out = loose(x, is_causal=True, key_mask=real)
    assert not out[:, :30].any()
    assert out[:, 30:].any(-1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be a whole number of 1 or more, got 0"),
        ({"block": 2.5}, "block must be a whole number of 1 or more, got 2.5"),
        ({"block": True}, "block must be a whole number of 1 or more, got True"),
        ({"capacity": 0}, "capacity must be a whole number of 1 or more, got 0"),
        ({"capacity": "3"}, "capacity must be a whole number of 1 or more, got '3'"),
        ({"capacity": True}, "capacity must be a whole number of 1 or more, got True"),
        ({"threshold": -1.0}, "threshold must be 0 or more, got -1.0"),
        ({"threshold": "a"}, "threshold must be 0 or more, got 'a'"),
        ({"threshold": float("nan")}, "threshold must be 0 or more, got nan"),
        ({"threshold": True}, "threshold must be 0 or more, got True"),
        ({"scales": 0}, "scales must be a whole number of 1 or more, got 0"),
        ({"scales": True}, "scales must be a whole number of 1 or more, got True"),
        ({"temperature": "a"}, "temperature must be positive and finite, or None, got 'a'"),
        ({"temperature": True}, "temperature must be positive and finite, or None, got True"),
        ({"sinks": -1}, "sinks must be a whole number of 0 or more, got -1"),
        ({"sinks": True}, "sinks must be a whole number of 0 or more, got True"),
        ({"sinks": None}, "sinks must be a whole number of 0 or more, got None"),
        ({"sinks": 16}, "16 sinks stay alone, which takes a capacity of more than 16.*got 16"),
        ({"sinks": 1, "temperature": 1.0}, "give sinks or a temperature"),
        ({"learned": "no"}, "learned must be True or False, got 'no'"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer({"name": "hierarchical", **options}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "l1", "impl": "tiled"}, "reach .*hierarchical.* of score 'l1' needs all logits"),
        ({"softcap": 30.0}, "softcap and sinks cannot be used with reach .*hierarchical"),
        ({"sinks": True}, "softcap and sinks cannot be used with reach .*hierarchical"),
    ],
)
def test_what_cannot_be_joined_with_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer(LOOSE, options)


def test_a_mask_of_pairs_and_a_context_are_refused(x):
    loose = layer(LOOSE, {})
    with pytest.raises(ValueError, match="takes key_mask and is_causal, not attn_mask"):
        loose(x, attn_mask=torch.ones(61, 61, dtype=torch.bool).tril())
    for shape in ((1, 61), (2, 4, 1, 61)):
        with pytest.raises(ValueError, match="takes key_mask and is_causal, not attn_mask"):
            loose(x, attn_mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="reach 'hierarchical' orders the tokens"):
        loose(x, x)


@every_layer
@pytest.mark.parametrize("causal", [True, False])
def test_what_padding_holds_does_not_matter(x, options, causal):
    loose = layer(LOOSE, options).float()
    real = torch.ones(2, 61, dtype=torch.bool)
    real[:, 30:] = False
    wild = x.float().clone()
    wild[:, 30:] = 1e5
    plain, other = (loose(t, is_causal=causal, key_mask=real)[:, :30] for t in (x.float(), wild))
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-6)


def test_a_cache_may_be_cut_and_grown_in_any_way(x):
    loose = layer({**LOOSE, "block": 2}, {})
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        cache, tokens = KeyValueCache(), torch.empty(2, 0, 32, dtype=torch.float64)
        for _ in range(4):
            n = int(torch.randint(1, 21, (), generator=random))
            fresh = torch.randn(2, n, 32, dtype=torch.float64, generator=random)
            tokens = torch.cat([tokens, fresh], 1)
            with torch.no_grad():
                out = loose(fresh, is_causal=True, cache=cache)
                whole = loose(tokens, is_causal=True)
            assert_same(out, whole[:, -n:])
            kept = int(torch.randint(0, tokens.shape[1] + 1, (), generator=random))
            cache.crop(kept)
            tokens = tokens[:, :kept]


@pytest.mark.parametrize("name", [name for name in LAYERS if "kl" in name or "wass" in name])
def test_beliefs_far_from_the_origin_keep_their_covariances(name):
    torch.manual_seed(0)
    x = (100 + 1e-3 * torch.randn(1, 40, 32)).requires_grad_()
    loose = layer({**LOOSE, "threshold": 1e9}, LAYERS[name]).float()
    out = loose(x, is_causal=True)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert out.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 9, 32), (2, 0, 32)])
def test_nothing_in_is_nothing_out(shape):
    assert layer(LOOSE, {})(torch.randn(shape, dtype=torch.float64), is_causal=True).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_serves_half_precision(x, dtype):
    loose = layer(LOOSE, {"impl": "reference"}).to(dtype)
    assert loose(x.to(dtype), is_causal=True).dtype == dtype


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_near_the_double_one(x, dtype, most):
    double = layer(LOOSE, {"rope_theta": 1e4})
    expected = double(x, is_causal=True)
    found = copy.deepcopy(double).to(dtype)(x.to(dtype), is_causal=True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=most)


def test_dropout_drops_in_training_and_keeps_the_mean(x):
    kept, dropped = layer(LOOSE, {}), layer(LOOSE, {"dropout": 0.3})
    for impl in ("auto", "reference"):
        dropped.impl = impl
        many = torch.stack([dropped(x, is_causal=True) for _ in range(400)])
        expected = kept(x, is_causal=True)
        assert (many[0] - expected).abs().max() > 1e-3
        error = many.std(0) / 400**0.5
        assert (many.mean(0) - expected).abs().max() < 6 * error.max()
        torch.testing.assert_close(dropped.eval()(x, is_causal=True), expected)
        dropped.train()


def test_what_overflows_is_not_a_new_cell(x):
    x[:, :16:2] = 1e20
    found = layer(LOOSE, {}).float()(x.float(), is_causal=True)
    assert found.shape == x.shape


@pytest.mark.parametrize("name", ["kl", "kl_diagonal"])
def test_what_is_not_a_number_comes_out_as_none(x, name):
    x[0, 3] = torch.nan
    found = layer(LOOSE, LAYERS[name])(x, is_causal=True)
    assert found[0, 40:].isnan().all()
    assert found[1].isfinite().all()


def test_a_cache_serves_what_is_not_causal_too(x):
    loose, cache = layer(LOOSE, {}), KeyValueCache()
    loose(x[:, :40], cache=cache)
    assert_same(loose(x[:, 40:], cache=cache), loose(x)[:, 40:])


@pytest.mark.parametrize("options", [{}, {"score": "l2_squared", "num_kv_heads": 2}])
def test_it_compiles_as_one_graph_for_every_length(x, options):
    torch.compiler.reset()
    plain = layer(LOOSE, options)
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager", fullgraph=True)
    for length in (61, 40):
        given = x[:, :length].requires_grad_()
        found, expected = (one(given, is_causal=True) for one in (compiled, plain))
        assert_same(found, expected)
        one, two = (torch.autograd.grad(out.square().sum(), given)[0] for out in (found, expected))
        assert_same(one, two)
