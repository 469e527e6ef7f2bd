"""Mixing of logits between heads: one longer inner product, and what it must not change."""

import copy

import pytest
import torch

from sixfold import MultiHeadAttention
from sixfold.attention.cache import KeyValueCache
from sixfold.contracts import Features, Visibility
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.attend import fused, reference
from sixfold.ops.headmix import logits

CLOSE = {"rtol": 0, "atol": 1e-12}
EVERYTHING = Visibility(None, is_causal=False)
POINTS = ("dot", "cosine", "l2_squared")
BELIEFS = {
    "kl": "gaussian",
    "kl_diagonal": "gaussian_diagonal",
    "jeffreys": "gaussian_diagonal",
    "wasserstein2": "gaussian_diagonal",
}
DISTANCES = ("l1", "l2", "lp", "chebyshev")
OPTIONS = (
    {s: {"score": s} for s in (*POINTS, *DISTANCES)}
    | {s: {"score": s, "projection": p} for s, p in BELIEFS.items()}
)  # fmt: skip
MIXED = {"mixer": "hexagonal_logits"}


class Seen:
    """Keeps the rating of one pass."""

    def observe(self, observation):
        self.rating = observation.rating

    def mark(self, stage):
        """Nothing is timed."""


def rating_of(layer, x):
    """What the heads say of the keys, as a probe is shown it."""
    layer.probe = Seen()
    layer(x)
    seen, layer.probe = layer.probe, None
    return seen.rating


def logits_of(layer, x):
    return reference.logits(rating_of(layer, x), EVERYTHING)


def unmixed(layer, make, **options):
    """The same layer without its mixer."""
    plain = make({k: v for k, v in options.items() if k != "mixer"})
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "mixer" not in k})
    return plain


def by_hand(mixer, found):
    """The sum over neighbours, head by head; gains stand in the order of the cells."""
    cells, index = mixer.grid.coordinates, mixer.grid.index
    total, edge = [], 0
    for head, cell in enumerate(cells):
        near = sorted(index[other] for other in cell.neighbours() if other in index)
        logit = mixer.self_gain[head] * found[:, head]
        for neighbour in near:
            logit = logit + mixer.edge_gain[edge] * found[:, neighbour]
            edge += 1
        total.append(logit)
    assert edge == len(mixer.edge_gain)
    return torch.stack(total, 1)


# ---------------------------------------------------------------- the definition


@pytest.mark.parametrize("kv_heads", [7, 1])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_logits_are_sums_over_neighbours(make, tokens, options, impl, kv_heads):
    options = options | {"num_kv_heads": kv_heads}
    layer, x = make(options | MIXED, impl=impl), tokens(2, 5)
    plain = unmixed(layer, make, **options)
    expected = by_hand(layer.mixer, logits_of(plain, x))
    torch.testing.assert_close(logits_of(layer, x), expected, **CLOSE)
    # and the softmax is of these
    _, weights = layer(x, need_weights=True)
    torch.testing.assert_close(weights, expected.softmax(-1), **CLOSE)


def ring_of(h, kv, width=3, n=5, m=6, b=2):
    """Features, a graph of three slots a head, and values, all of which take gradients."""
    generator = torch.Generator().manual_seed(h + kv)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slots = torch.stack([torch.tensor([h + i - 1, i, i + 1]) % h for i in range(h)])
    graph = torch.zeros(h, h, dtype=torch.float64).scatter(1, slots, drawn(h, 3))
    parts = drawn(b, h, n, width), drawn(b, kv, m, width), drawn(b, kv, m, 4), graph
    return [part.requires_grad_() for part in parts], slots


@pytest.mark.parametrize(("h", "kv"), [(7, 7), (19, 19), (6, 3), (6, 2), (6, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_fused_path_is_naive_talking_heads(h, kv, is_causal):
    """Output, and gradients of queries, keys, values and gains; keys and values may be shared."""
    (query, key, value, graph), slots = ring_of(h, kv)
    inputs, visibility = (query, key, value, graph), Visibility(None, is_causal)
    found = fused.attend(logits.mix(Features(query, key, 0.3), graph, slots), value, visibility, 0)
    keys, values = (t.repeat_interleave(h // kv, 1) for t in (key, value))
    scores = torch.einsum("gh,bhnm->bgnm", graph, 0.3 * query @ keys.mT)
    if is_causal:
        late = torch.ones(5, 6, dtype=torch.bool).triu(2)
        scores = scores.masked_fill(late, float("-inf"))
    expected = scores.softmax(-1) @ values
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    ours, naive = (torch.autograd.grad((o * weight).sum(), inputs) for o in (found, expected))
    for one, other, name in zip(ours, naive, ("query", "key", "value", "graph"), strict=True):
        if name == "graph":  # an entry outside the slots is no gain: it has no gradient
            one, other = one.gather(1, slots), other.gather(1, slots)
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("kv", [6, 3, 1])
def test_gradients_are_those_of_finite_differences(kv):
    (query, key, _, graph), slots = ring_of(6, kv, n=2, m=3)

    def mixed(query, key, graph):
        return reference.logits(logits.mix(Features(query, key, 0.5), graph, slots), EVERYTHING)

    assert torch.autograd.gradcheck(mixed, (query, key, graph), fast_mode=True)
    assert torch.autograd.gradgradcheck(mixed, (query, key, graph), fast_mode=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nineteen_heads_fused_are_those_of_the_reference(make, tokens, options):
    part = {"name": "hexagonal_logits", "outputs": True}
    layer = make(options | {"mixer": part}, num_heads=19)
    slow, x = copy.deepcopy(layer), tokens(2, 6)
    slow.impl = "reference"
    out, expected = layer(x, is_causal=True), slow(x, is_causal=True)
    torch.testing.assert_close(out, expected, **CLOSE)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    for one, other, name in zip(
        torch.autograd.grad((out * weight).sum(), list(layer.parameters())),
        torch.autograd.grad((expected * weight).sum(), list(slow.parameters())),
        dict(layer.named_parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: n + m)


# ---------------------------------------------------------------- what stands in the row


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_every_row_holds_the_head_and_its_neighbours_once(make, radius):
    grid = HexGrid(radius)
    mixer = make(MIXED, num_heads=grid.num_heads, d_model=8).mixer
    assert mixer.slots.shape == (grid.num_heads, 7 if radius else 1)
    for head, row in enumerate(mixer.slots.tolist()):
        cell = grid.coordinates[head]
        near = {grid.index[other] for other in cell.neighbours() if other in grid.index}
        assert len(set(row)) == len(row)
        assert near | {head} <= set(row)
        # whoever else stands there is not heard
        others = [other for other in row if other not in near | {head}]
        assert (mixer.graph()[head, others] == 0).all()


@torch.no_grad()
def test_a_row_is_at_most_seven_heads_wide(make, tokens):
    for num_heads, kv_heads, width in ((7, 7, 28), (19, 19, 28), (19, 1, 4)):
        layer = make(MIXED, num_heads=num_heads, num_kv_heads=kv_heads)
        rating = rating_of(layer, tokens(1, 5))
        assert rating.query.shape[-1] == rating.key.shape[-1] == width


@torch.no_grad()
def test_only_neighbours_are_heard(make, tokens):
    layer, x = make(MIXED, num_heads=19), tokens(1, 5)
    before, grid = logits_of(layer, x), layer.mixer.grid
    own, d = 9, layer.heads.head_dim
    layer.projection.qkv.weight[own * d : (own + 1) * d] *= 2
    moved = (logits_of(layer, x) - before).abs().amax((0, 2, 3)) > 1e-9
    near = {grid.index[cell] for cell in grid.coordinates[own].neighbours()}
    assert set(torch.nonzero(moved).flatten().tolist()) == near | {own}


# ---------------------------------------------------------------- where it starts


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_layer_computes_what_it_would_without_mixing(tokens, tied):
    torch.manual_seed(0)
    mixer, x = {"name": "hexagonal_logits", "tied": tied}, tokens(2, 9)
    sizes = {"d_model": 24, "num_heads": 7, "head_dim": 4, "dtype": torch.float64}
    layer, plain = MultiHeadAttention(**sizes, mixer=mixer), MultiHeadAttention(**sizes)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "mixer" not in k})
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-15)
    layer(x).square().sum().backward()
    assert (layer.mixer.edge_gain.grad != 0).all()
    assert (layer.mixer.self_gain.grad != 0).all()


@pytest.mark.parametrize("outputs", [False, True])
def test_converted_attention_computes_what_it_computed(tokens, outputs):
    from sixfold.integrations.convert import convert

    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(28, 7, batch_first=True, dtype=torch.float64)}
    )
    x = tokens(2, 6, 28)
    expected = model["attention"](x, x, x, need_weights=False)[0]
    convert(model, mixer={"name": "hexagonal_logits", "outputs": outputs})
    found = model["attention"](x, x, x, need_weights=False)[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    found.square().sum().backward()
    mixer = model["attention"].attention.mixer
    assert (mixer.edge_gain.grad != 0).all()
    assert mixer.gate is None or (mixer.gate.grad != 0).all()


# ---------------------------------------------------------------- symmetry


@pytest.mark.parametrize("radius", [1, 2])
@torch.no_grad()
def test_tied_mixing_commutes_with_turning_the_grid(make, tokens, radius):
    grid = HexGrid(radius)
    sizes = (2, grid.num_heads, 5, 4)
    query, key = (tokens(40, grid.num_heads, seed=s)[..., :1].reshape(sizes) for s in (0, 1))
    for tied in (True, False):
        part = {"name": "hexagonal_logits", "tied": tied}
        mixer = make({"mixer": part}, num_heads=grid.num_heads).mixer
        out = reference.logits(mixer.mix_logits(Features(query, key, 1.0)), EVERYTHING)
        worst = 0.0
        for turn in range(1, 6):
            place = grid.rotation(turn).argsort()
            turned = mixer.mix_logits(Features(query[:, place], key[:, place], 1.0))
            gap = reference.logits(turned, EVERYTHING) - out[:, place]
            worst = max(worst, gap.abs().max().item())
        assert (worst < 1e-12) == tied
        assert tied or worst > 1e-3


def test_one_gain_per_directed_edge_and_one_per_tied_orbit(make):
    free = make(MIXED, num_heads=19).mixer
    tied = make({"mixer": {"name": "hexagonal_logits", "tied": True}}, num_heads=19).mixer
    assert [len(free.edge_gain), len(free.self_gain)] == [84, 19]
    assert [len(tied.edge_gain), len(tied.self_gain)] == [14, 4]


# ---------------------------------------------------------------- beside the rest of a layer


@torch.no_grad()
def test_the_cap_falls_on_mixed_logits(make, tokens):
    layer, x = make(MIXED, softcap=0.7), tokens(2, 6)
    plain = unmixed(layer, make)
    capped = 0.7 * torch.tanh(by_hand(layer.mixer, logits_of(plain, x)) / 0.7)
    _, weights = layer(x, need_weights=True)
    torch.testing.assert_close(weights, capped.softmax(-1), **CLOSE)


@pytest.mark.parametrize("score", ["dot", "l1"])
@pytest.mark.parametrize("kv_heads", [7, 1])
@torch.no_grad()
def test_sinks_are_not_mixed(make, tokens, score, kv_heads):
    options = {"score": score, "sinks": True, "num_kv_heads": kv_heads}
    layer, x = make(options | MIXED), tokens(2, 6)
    plain = unmixed(layer, make, **options)
    mixed = by_hand(layer.mixer, logits_of(plain, x))
    sinks = layer.sinks[:, None, None].expand(2, 7, 6, 1)
    expected = torch.cat([sinks, mixed], -1).softmax(-1)[..., 1:]
    out, weights = layer(x, need_weights=True)
    torch.testing.assert_close(weights, expected, **CLOSE)
    slow = copy.deepcopy(layer)
    slow.impl = "reference"
    torch.testing.assert_close(slow(x), out, **CLOSE)


@torch.no_grad()
def test_masks_and_slopes_fall_on_mixed_logits(make, tokens):
    layer, x = make(MIXED | {"reach": "alibi"}), tokens(2, 6)
    plain = unmixed(layer, make, reach="alibi")
    mixed = by_hand(layer.mixer, logits_of(plain, x))
    bias = layer.reach(EVERYTHING, 6, 6, x.device).mask
    _, weights = layer(x, need_weights=True)
    torch.testing.assert_close(weights, (mixed + bias).softmax(-1), **CLOSE)


@pytest.mark.parametrize("options", [{"rope_theta": 100.0}, {"score": "l2_squared"}])
@torch.no_grad()
def test_keys_shared_by_all_heads_serve_a_cache_too(make, tokens, options):
    layer, x = make(options | MIXED | {"num_kv_heads": 1}), tokens(2, 9)
    whole, cache = layer(x, is_causal=True), KeyValueCache()
    parts = [layer(x[:, a:b], is_causal=True, cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("kv_heads", [7, 1])
@torch.no_grad()
def test_dropout_is_unbiased(make, tokens, kv_heads):
    layer, x = make(MIXED | {"num_kv_heads": kv_heads}, dropout=0.3), tokens(1, 6)
    expected = copy.deepcopy(layer).eval()(x)
    many = layer(x.expand(4000, -1, -1))
    error = many.std(0) / 4000**0.5
    assert ((many.mean(0, keepdim=True) - expected).abs() < 5 * error).all()


@pytest.mark.parametrize("options", [{"score": "cosine"}, {"score": "l1"}, {"sinks": True}])
@pytest.mark.parametrize("kv_heads", [7, 1])
@torch.no_grad()
def test_statistics_are_those_of_the_weights(make, tokens, options, kv_heads):
    layer, x = make(options | MIXED | {"num_kv_heads": kv_heads}), tokens(2, 6)
    _, weights = layer(x, need_weights=True, is_causal=True)
    for impl in ("auto", "tiled", "reference"):
        found = layer.statistics(x, is_causal=True, impl=impl)
        torch.testing.assert_close(found.received, weights.sum(-2), rtol=1e-9, atol=1e-9)
        if "sinks" not in options:
            entropy = torch.special.entr(weights).sum(-1)
            torch.testing.assert_close(found.entropy, entropy, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_clip_lowers_the_largest_mixed_logit_of_its_head_alone(make, tokens):
    layer, x = make(MIXED), tokens(2, 6)
    before = layer.statistics(x, largest=True).largest
    layer.scale_head_(3, -2)
    after = layer.statistics(x, largest=True).largest
    before[:, 3] /= 4
    assert torch.equal(after, before)
    assert (layer.score.power == 0).all()


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"score": "l1"}])
def test_it_compiles_as_one_graph(make, tokens, options):
    torch.compiler.reset()
    layer, x = make(options | MIXED), tokens(2, 7).requires_grad_()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    found, expected = (one(x, is_causal=True) for one in (compiled, layer))
    torch.testing.assert_close(found, expected, **CLOSE)
    one, two = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kv_heads", [2, 1])
@torch.no_grad()
def test_what_float16_cannot_hold_does_not_look_like_a_masked_key(kv_heads):
    query = torch.full((1, 2, 1, 8), -6e4, dtype=torch.float16)
    key = torch.tensor([1.0, 0.0], dtype=torch.float16)[:, None].expand(1, kv_heads, 2, 8)
    graph = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    slots = torch.tensor([[0, 1], [0, 1]])
    values = torch.ones(1, kv_heads, 2, 8, dtype=torch.float16)
    rating = logits.mix(Features(query, key, 1.0), graph, slots)
    out = fused.attend(rating, values, EVERYTHING, 0.0)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("impl", ["numba", "tiled", "triton"])
def test_a_kernel_of_distances_that_holds_no_logits_is_refused_by_name(make, impl):
    with pytest.raises(
        ValueError, match=f"mixer 'hexagonal_logits' of score 'l1'.*impl '{impl}' never holds"
    ):
        make(MIXED | {"score": "l1"}, impl=impl)


def test_heads_that_fill_no_grid_are_refused(make):
    with pytest.raises(ValueError, match="'hexagonal_logits'.*no hexagonal grid has 6 heads"):
        make(MIXED, num_heads=6)
