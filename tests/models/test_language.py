import pytest
import torch
from torch.nn.functional import log_softmax

from sixfold import LanguageModel
from sixfold.attention.cache import KeyValueCache
from sixfold.models import parameters
from sixfold.models.language import sample

V, CONTEXT = 23, 12
ATTENTIONS = {
    "linear": {"num_heads": 4},
    "cosine": {"num_heads": 4, "score": "cosine", "num_kv_heads": 2},
    "hexagonal": {"num_heads": 7, "head_dim": 4, "projection": "coordinate", "mixer": "hexagonal"},
    "hypernetwork": {"num_heads": 7, "head_dim": 4, "projection": "hypernetwork"},
    "window": {"num_heads": 4, "reach": {"name": "window", "width": 4}},
}


def model_of(attention="linear", **options):
    torch.manual_seed(0)
    model = LanguageModel(V, CONTEXT, 16, 2, ATTENTIONS[attention], **options).double().eval()
    # rows of unit size make the distributions far from uniform
    torch.nn.init.normal_(model.embedding.weight)
    return model


def tokens_of(batch, length, seed=0):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def drawn(model, prompt, count, **settings):
    generator = torch.Generator().manual_seed(3)
    return torch.stack([*model.generate(prompt, count, generator=generator, **settings)], dim=1)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_bit_of_the_past_depends_on_the_future(attention, positions):
    model, tokens = model_of(attention, positions=positions).float(), tokens_of(2, CONTEXT)
    before = model(tokens)
    for cut in (1, 5, 11):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % V
        after = model(changed)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_reading_in_segments_equals_reading_at_once(attention, positions):
    model, tokens = model_of(attention, positions=positions), tokens_of(2, CONTEXT)
    caches = [KeyValueCache() for _ in model.blocks]
    parts = [model(part, caches=caches) for part in tokens.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 5, "top_p": 0.8}])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_cache_never_changes_what_is_drawn_even_past_the_context(attention, settings):
    model, prompt = model_of(attention), tokens_of(3, 4)
    count = 2 * CONTEXT
    cached = drawn(model, prompt, count, **settings)
    assert torch.equal(cached, drawn(model, prompt, count, use_cache=False, **settings))
    assert cached.shape == (3, count)


def test_greedy_generation_follows_the_most_likely_token():
    model, tokens = model_of(positions="learned"), tokens_of(2, 3)
    found = drawn(model, tokens, 15, temperature=0.0)
    for step in range(15):
        expected = model(tokens[:, -CONTEXT:])[:, -1].argmax(-1)
        assert torch.equal(found[:, step], expected)
        tokens = torch.cat([tokens, expected[:, None]], dim=1)


def test_a_prompt_longer_than_the_context_is_read_from_its_end():
    model, prompt = model_of(positions="learned"), tokens_of(1, 30)
    short = drawn(model, prompt[:, -CONTEXT:], 5)
    assert torch.equal(drawn(model, prompt, 5), short)


def test_generation_streams_and_gives_the_mode_back():
    model = model_of().train()
    stream = model.generate(tokens_of(2, 3), 4, temperature=0.0)
    assert model.training
    graphs = []
    hook = model.norm.register_forward_hook(lambda *seen: graphs.append(seen[2].requires_grad))
    assert next(stream).shape == (2,)
    hook.remove()
    assert graphs == [False]
    assert not model.training
    stream.close()
    assert model.training
    assert len([*model.generate(tokens_of(1, 3), 4)]) == 4
    assert [*model.generate(tokens_of(1, 3), 0)] == []


def test_rows_of_a_prompt_do_not_meet():
    model, prompt = model_of(), tokens_of(3, 4)
    together = drawn(model, prompt, 6, temperature=0.0)
    apart = torch.cat([drawn(model, row[None], 6, temperature=0.0) for row in prompt])
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_that_cannot_be_meant_raise_at_the_call(settings, message):
    with pytest.raises(ValueError, match=message):
        model_of().generate(tokens_of(1, 3), 4, **settings)


def test_a_prompt_needs_a_token():
    for prompt in (tokens_of(1, 0), tokens_of(1, 3)[0]):
        with pytest.raises(ValueError, match=r"prompt must be \(b, n\) with n >= 1"):
            model_of().generate(prompt, 4)


# ---------------------------------------------------------------- sampling


def allowed(logits, temperature, top_k, top_p):
    """Tokens that may be drawn from one row, by the definition, with sets and sorting."""
    p = (logits / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k is not None:
        ranked = ranked[:top_k]
    total = sum(p[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += p[i] / total
        if top_p is not None and mass >= top_p:
            break
    return kept, [p[i] / sum(p[j] for j in kept) for i in kept]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.7, 3, None),
        (1.3, None, 0.6),
        (2.0, 5, 0.7),
        (1.0, 99, 1.0),
        (1.0, None, 1e-9),
    ],
)
def test_sampling_is_its_definition(temperature, top_k, top_p):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(5)).double() * 2
    draws = 4000
    generator = torch.Generator().manual_seed(1)
    for row in logits:
        found = sample(row.expand(draws, -1), temperature, top_k, top_p, generator)
        share = torch.bincount(found, minlength=9) / draws
        kept, p = allowed(row, temperature, top_k, top_p)
        expected = torch.zeros(9, dtype=torch.float64)
        expected[kept] = torch.tensor(p, dtype=torch.float64)
        assert (share[expected == 0] == 0).all()
        # a share has a deviation of at most sqrt(p (1 - p) / draws): five of these
        error = (share - expected).abs()
        assert (error <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-12).all()


def test_rows_are_sampled_apart():
    logits = torch.full((2, 4), -30.0)
    logits[0, 1] = logits[1, 3] = 30.0
    assert sample(logits, top_k=2, top_p=0.5).tolist() == [1, 3]


# ---------------------------------------------------------------- positions, padding, sizes


@pytest.mark.parametrize("attention", ["linear", "cosine", "hexagonal", "hypernetwork"])
def test_left_padding_changes_nothing(attention):
    model, tokens = model_of(attention), tokens_of(2, 6)
    padded = torch.cat([tokens_of(2, 4, seed=9), tokens], dim=1)
    key_mask = torch.arange(10).expand(2, -1) >= 4
    found = model(padded, key_mask=key_mask)[:, 4:]
    # angles are float32 in any precision: an error of 2**-24 times a position below 10
    torch.testing.assert_close(found, model(tokens), rtol=0, atol=10 * 2**-20)


def test_rotary_positions_are_relative_and_have_no_end():
    model, tokens = model_of(), tokens_of(1, 3 * CONTEXT)
    assert model(tokens).shape == (1, 3 * CONTEXT, V)
    assert model.position is None


def test_learned_positions_end_and_say_so():
    model = model_of(positions="learned")
    with pytest.raises(ValueError, match="sequence of 13 tokens is longer than the context of 12"):
        model(tokens_of(1, 13))
    caches = [KeyValueCache() for _ in model.blocks]
    model(tokens_of(1, 12), caches=caches)
    with pytest.raises(ValueError, match="sequence of 13 tokens"):
        model(tokens_of(1, 1), caches=caches)


def test_order_matters_under_both():
    for positions in ("rotary", "learned"):
        model, tokens = model_of(positions=positions), tokens_of(1, 8)
        swapped = tokens[:, [1, 0, 2, 3, 4, 5, 6, 7]]
        assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3


def test_unknown_positions_are_named():
    with pytest.raises(ValueError, match=r"unknown positions 'rotari'.*Did you mean 'rotary'"):
        model_of(positions="rotari")


@pytest.mark.parametrize("name", ["vocab_size", "context", "d_model"])
@pytest.mark.parametrize("size", [0, 2.5, None, True])
def test_sizes_that_cannot_be_meant_are_named(name, size):
    sizes = {"vocab_size": V, "context": CONTEXT, "d_model": 16}
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more, got {size}"):
        LanguageModel(**{**sizes, name: size})


def test_tokens_are_whole_numbers():
    with pytest.raises(ValueError, match=r"tokens must be int64 or int32, got torch.float64"):
        model_of()(tokens_of(1, 4).double())
    assert torch.equal(model_of()(tokens_of(1, 4).int()), model_of()(tokens_of(1, 4)))


def test_a_layer_may_go_without_positions():
    torch.manual_seed(0)
    model = LanguageModel(
        V, CONTEXT, 16, 2, [{"num_heads": 2}, {"num_heads": 2, "rope_theta": None}]
    )
    assert [block.attention.rope_theta for block in model.blocks] == [10_000.0, None]


def test_a_fresh_model_expects_every_token_alike():
    torch.manual_seed(0)
    model = LanguageModel(65, 64)
    tokens = torch.randint(65, (8, 65))
    logits = log_softmax(model(tokens[:, :-1]), -1)
    found = -logits.gather(-1, tokens[:, 1:, None]).mean()
    # logits are 128 products of unit features with weights of 0.02, and add half their variance
    assert abs(found - torch.tensor(65.0).log() - 0.5 * 128 * 0.02**2) < 0.03
    assert abs(model.embedding.weight.std() - 0.02) < 0.001


@pytest.mark.parametrize(
    ("sizes", "attention", "expected"),
    [
        # nanoGPT prints 0.80M and 10.65M, positions left out as here: 12 L d^2 + (2 L + 1) d + V d
        ((65, 64, 128, 4), {"num_heads": 4}, 795_904),
        ((65, 256, 384, 6), {"num_heads": 6}, 10_646_784),
        # GPT-2's 124,439,808 without the 102,144 of its biases
        ((50257, 1024, 768, 12), {"num_heads": 12}, 124_439_808 - 102_144),
    ],
)
def test_sizes_are_those_of_nanogpt(sizes, attention, expected):
    with torch.device("meta"):
        positions = "learned" if sizes[0] == 50257 else "rotary"
        model = LanguageModel(*sizes, attention, positions=positions)
    assert parameters(model) == expected
