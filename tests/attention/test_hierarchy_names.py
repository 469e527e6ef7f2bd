"""Soft and learned groups of the reach, what is shown of them, and the classes named after them."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import sixfold
from sixfold import EmergentHierarchicalAttention, GaugeAttention, SoftConsensusDetector
from sixfold.attention.beliefs import believe
from sixfold.attention.cache import KeyValueCache
from sixfold.attention.hierarchy import Group, consensus, edges, hierarchy, mixture
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.geometry.frames import element

CLOSE = {"rtol": 0, "atol": 1e-10}
SOFT = {"block": 8, "capacity": 3, "threshold": 0.5, "temperature": 0.7}
D = 2


def layer(seed=1, **options) -> MultiHeadAttention:
    torch.manual_seed(seed)
    reach = {"name": "hierarchical", **options.pop("reach", SOFT)}
    return MultiHeadAttention(16, 2, reach=reach, dtype=torch.float64, **options)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return (0.3 * torch.randn(2, 45, 16, dtype=torch.float64)).cumsum(1)


def beliefs(n=40, lead=(), seed=0):
    """A walk of means, with covariances and frames in so(2)."""
    generator = torch.Generator().manual_seed(seed)
    mean, root, phi = (
        torch.randn(*lead, n, *size, dtype=torch.float64, generator=generator)
        for size in ((D,), (D, D), (1,))
    )
    covariance = 0.1 * root @ root.mT + torch.eye(D)
    return (0.3 * mean).cumsum(-2), (covariance + covariance.mT) / 2, 0.5 * phi


def in_common(mean, covariance, phi):
    """Each belief moved by the inverse of its frame: a loop."""
    turns = [torch.linalg.inv(torch.matrix_exp(element(p, "so", D))) for p in phi]
    parts = zip(turns, mean, covariance, strict=True)
    moved = [(turn @ m, turn @ s @ turn.T) for turn, m, s in parts]
    return [(m, (s + s.T) / 2) for m, s in moved]


def both_ways(one, other) -> float:
    p, q = MultivariateNormal(*one), MultivariateNormal(*other)
    return (kl_divergence(p, q) + kl_divergence(q, p)).item()


def matched(parts, weights):
    """Mean and covariance of a mixture, centred: a loop."""
    total = sum(weights)
    mean = sum(w * m for w, (m, _) in zip(weights, parts, strict=True)) / total
    spread = [s + torch.outer(m - mean, m - mean) for m, s in parts]
    return mean, sum(w * s for w, s in zip(weights, spread, strict=True)) / total


# ---------------------------------------------------------------- soft and learned groups


def test_groups_are_drawn_in_training_and_hard_in_eval(x):
    soft = layer()
    hard = layer(reach={k: v for k, v in SOFT.items() if k != "temperature"})
    one, two = soft(x, is_causal=True), soft(x, is_causal=True)
    assert not torch.equal(one, two)
    torch.manual_seed(5)
    one = soft(x, is_causal=True)
    torch.manual_seed(5)
    assert torch.equal(one, soft(x, is_causal=True))
    assert torch.equal(soft.eval()(x, is_causal=True), hard(x, is_causal=True))


def test_nearly_cold_groups_without_noise_are_hard(x):
    """Weights are those of the groups that are expected; there is room for every token."""
    rules = {"block": 8, "capacity": 8, "threshold": 0.5, "temperature": 1e-4, "scales": 1}
    soft = layer(reach=rules)
    _, drawn = soft(x, is_causal=True, need_weights=True)
    _, again = soft(x, is_causal=True, need_weights=True)
    assert torch.equal(drawn, again)
    _, hard = soft.eval()(x, is_causal=True, need_weights=True)
    torch.testing.assert_close(drawn, hard, rtol=0, atol=1e-9)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_drawn_groups_are_the_same_on_both_paths(x, impl):
    soft = layer(impl=impl)
    torch.manual_seed(7)
    out = soft(x, is_causal=True)
    other = layer(impl="reference" if impl == "auto" else "auto")
    torch.manual_seed(7)
    torch.testing.assert_close(other(x, is_causal=True), out, **CLOSE)


def test_drawn_groups_do_not_see_the_future(x):
    soft, later = layer(), x.clone()
    later[:, 30:] += 3
    torch.manual_seed(3)
    one = soft(x, is_causal=True)
    torch.manual_seed(3)
    other = soft(later, is_causal=True)
    assert torch.equal(one[:, :30], other[:, :30])
    assert not torch.equal(one[:, 30:], other[:, 30:])


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"rope_theta": 1e4}])
def test_every_key_head_learns_its_threshold(x, options):
    learned = layer(reach=SOFT | {"learned": True}, **options)
    log_threshold = learned.reach.log_threshold
    assert log_threshold.shape == (options.get("num_kv_heads", 2),)
    torch.testing.assert_close(log_threshold.exp(), torch.full_like(log_threshold, 0.5))

    def loss():
        torch.manual_seed(3)
        return learned(x, is_causal=True).square().sum()

    (slope,) = torch.autograd.grad(loss(), log_threshold)
    assert slope.all()
    step, sides = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            log_threshold[0] += sign * step
            sides.append(loss())
    torch.testing.assert_close(slope[0], (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-9)


def test_a_learned_threshold_holds_in_eval(x):
    learned = layer(reach=SOFT | {"learned": True}).eval()
    with torch.no_grad():
        learned.reach.log_threshold.copy_(torch.tensor([math.log(1e-9), math.log(1e9)]))
    found = hierarchy(learned, x[:1], is_causal=True)
    apart = {head: [g.apart for g in found if g.head == head] for head in (0, 1)}
    assert max(apart[1]) > 0
    full = [g for g in found if g.head == 1 and g.scale == 0]
    assert [(g.start, g.stop) for g in full] == [(s, s + 8) for s in range(0, 40, 8)]
    assert sum(g.head == 0 and g.scale == 0 for g in found) == 3 * 5


def test_a_cache_is_refused_where_groups_are_drawn(x):
    soft = layer()
    with pytest.raises(ValueError, match="draws its groups in training, which a cache cannot keep"):
        soft(x, is_causal=True, cache=KeyValueCache())
    soft.eval()
    whole, cache = soft(x, is_causal=True), KeyValueCache()
    parts = [soft(x[:, a:b], is_causal=True, cache=cache) for a, b in pairwise([0, 9, 30, 45])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learned": True}, "learned needs a temperature: hard groups give it no gradient"),
        ({"temperature": 0.0}, "temperature must be positive and finite, or None, got 0.0"),
        ({"temperature": math.inf}, "temperature must be positive and finite, or None, got inf"),
        ({"temperature": 1.0, "threshold": 0.0}, "soft groups need a threshold positive"),
    ],
)
def test_soft_rules_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer(reach=options)


def test_the_printout_names_the_rules():
    learns = repr(layer(reach=SOFT | {"learned": True}).reach)
    assert "temperature=0.7, sinks=0, learned=True" in learns
    assert "temperature=None, sinks=0, learned=False" in repr(layer(reach={}).reach)


# ---------------------------------------------------------------- what condensed, and why


@pytest.mark.parametrize("causal", [True, False])
def test_the_hierarchy_of_a_layer_is_what_a_loop_finds(x, causal):
    """Points with unit covariance: squared distance of keys, groups by the threshold."""
    rules = {"block": 8, "capacity": 8, "threshold": 0.5, "scales": 2}
    points = layer(reach=rules)
    found = hierarchy(points, x, is_causal=causal)
    key = points.projection(x, x, None, None).key.detach()
    expected = []
    for row, head in ((r, h) for r in (0, 1) for h in (0, 1)):
        tokens = key[row, head]
        for start in range(0, 40 if causal else 45, 8):
            end = min(start + 8, 45)
            gaps = [
                math.inf,
                *(tokens[start + 1 : end] - tokens[start : end - 1]).square().sum(-1).tolist(),
            ]
            begins = [i for i, gap in enumerate(gaps) if gap >= 0.5]
            for place, (a, b) in enumerate(pairwise([*begins, end - start])):
                inside, ends = max(gaps[a + 1 : b], default=0.0), (start + a, start + b)
                expected.append(Group(0, head, *ends, inside, gaps[a], row, place))
    finest = [group for group in found if group.scale == 0]
    assert len(finest) == len(expected) > 30
    for ours, theirs in zip(finest, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert any(group.apart > 0 for group in finest)


def test_groups_of_a_scale_tile_its_cells_and_join_those_below(x):
    found = hierarchy(layer(), x, is_causal=True)
    assert {group.scale for group in found} == {0, 1}
    for scale, end in ((0, 40), (1, 32)):
        mine = [g for g in found if (g.scale, g.head, g.row) == (scale, 1, 1)]
        assert mine[0].start == 0
        assert mine[-1].stop == end
        assert all(one.stop == other.start for one, other in pairwise(mine))
    child, parent = edges(found)
    assert len(child) == len({*child.tolist()})
    assert {*child.tolist()} == {i for i, g in enumerate(found) if g.scale == 0 and g.stop <= 32}
    for one, other in zip(child, parent, strict=True):
        part, whole = found[one], found[other]
        assert (part.head, part.row, part.scale + 1) == (whole.head, whole.row, whole.scale)
        assert whole.start <= part.start < part.stop <= whole.stop


def test_the_hierarchy_is_of_real_tokens(x):
    real = torch.ones(2, 45, dtype=torch.bool)
    real[0, :5] = real[1, 12:14] = False
    found = hierarchy(layer(), x, key_mask=real, is_causal=True)
    first = [g for g in found if g.scale == 0]
    assert min(g.start for g in first if g.row == 0) == 5
    assert not {g.start for g in first if g.row == 1} & {12, 13}


@pytest.mark.parametrize("threshold", [0.5, 1e39, math.inf])
def test_sinks_are_the_first_real_tokens_and_stay_alone_at_every_scale(x, threshold):
    """However close they are: here all tokens of a row are nearly alike."""
    real = torch.ones(2, 45, dtype=torch.bool)
    real[0, :5] = False
    alike = x[:, :1] + 1e-3 * x
    rules = {"block": 8, "capacity": 4, "threshold": threshold, "sinks": 2}
    found = hierarchy(layer(reach=rules), alike, key_mask=real, is_causal=True)
    for row, first in ((0, 5), (1, 0)):
        for scale in (0, 1):
            mine = [g for g in found if (g.row, g.scale, g.head) == (row, scale, 0)]
            assert [(g.start, g.stop) for g in mine[:2]] == [
                (first, first + 1),
                (first + 1, first + 2),
            ]
            assert mine[2].start == first + 2
            assert mine[2].stop == 8 << scale
            assert [g.began for g in mine[:3]] == [math.inf] * 3
            assert [g.place for g in mine[:3]] == [0, 1, 2]


def test_sinks_stay_alone_beside_divergences_that_overflow(x):
    far = x.clone()
    far[:, 4:8] *= 1e20
    rules = {"block": 8, "capacity": 4, "threshold": 0.5, "sinks": 2}
    for group in hierarchy(layer(reach=rules), far, is_causal=True):
        assert group.stop - group.start == 1 or group.start >= 2
        assert math.isfinite(group.began) or group.place == 0 or group.start <= 2


def test_only_what_condenses_has_a_hierarchy(x):
    with pytest.raises(ValueError, match="in any other nothing condenses"):
        hierarchy(MultiHeadAttention(16, 2), x)
    assert hierarchy(layer(), x[:, :9], is_causal=True) == ()


# ---------------------------------------------------------------- beliefs that are given


def emergent(**options) -> EmergentHierarchicalAttention:
    return EmergentHierarchicalAttention(D, kappa=0.8, dtype=torch.float64, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("framed", [True, False])
def test_with_threshold_zero_beliefs_hear_all(framed, causal):
    mu, sigma, phi = beliefs()
    phi = phi if framed else None
    exact = emergent(block=4, capacity=4, threshold=0.0, scales=1)
    full = GaugeAttention(D, kappa=0.8, dtype=torch.float64)
    options = {"covariances": True, "need_weights": True, "is_causal": causal}
    found, expected = (part.update(mu, sigma, phi, **options) for part in (exact, full))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    found, expected = (part.settle(mu, sigma, phi, is_causal=causal) for part in (exact, full))
    torch.testing.assert_close(found.mean, expected.mean, **CLOSE)
    torch.testing.assert_close(found.covariance, expected.covariance, **CLOSE)


def test_condensed_weights_give_condensed_beliefs():
    """What is heard is the mixture by the weights that are shown, group by group or not."""
    mu, sigma, phi = beliefs()
    loose = emergent(block=4, capacity=2, threshold=0.5)
    found = loose.update(mu, sigma, phi, covariances=True, need_weights=True, is_causal=True)
    full = GaugeAttention(D, kappa=0.8, dtype=torch.float64).update(
        mu, sigma, phi, is_causal=True, need_weights=True
    )
    assert not torch.allclose(found.weights, full.weights, atol=1e-3)
    parts = in_common(mu, sigma, phi)
    for i in (0, 13, 39):
        mean, covariance = matched(parts, found.weights[0, 0, i])
        turn = torch.matrix_exp(element(phi[i], "so", D))
        torch.testing.assert_close(found.mean[i], turn @ mean, **CLOSE)
        torch.testing.assert_close(found.covariance[i], turn @ covariance @ turn.T, **CLOSE)
    only = loose.update(mu, sigma, phi, is_causal=True)
    assert only.covariance is None
    torch.testing.assert_close(only.mean, found.mean, **CLOSE)


def test_what_emerges_is_what_loops_find():
    mu, sigma, phi = beliefs(n=22)
    loose = emergent(block=4, capacity=4, threshold=0.02)
    found = loose.emerge(mu, sigma, phi, is_causal=True)
    base = loose.update(mu, sigma, phi, covariances=True, is_causal=True)
    torch.testing.assert_close(found.base_tokens.mean, base.mean, **CLOSE)
    torch.testing.assert_close(found.base_tokens.covariance, base.covariance, **CLOSE)
    parts = in_common(base.mean, (base.covariance + base.covariance.mT) / 2, phi)
    gaps = [math.inf, *(both_ways(*pair) for pair in pairwise(parts))]
    finest = [group for group in found.hierarchy if group.scale == 0]
    assert [g.start for g in finest] == [i for i in range(20) if i % 4 == 0 or gaps[i] >= 0.02]
    assert finest[-1].stop == 20  # the sixth block is not full
    assert any(g.stop - g.start > 1 for g in finest)
    for group in finest:
        inside = max(gaps[group.start + 1 : group.stop], default=0.0)
        assert group.apart == pytest.approx(inside, rel=1e-7)
    assert {group.scale for group in found.hierarchy} == {0, 1, 2}
    for scale, meta in enumerate(found.meta_tokens):
        there = meta.size[0, 0] > 0
        groups = [group for group in found.hierarchy if group.scale == scale]
        sizes = meta.size[0, 0][there].tolist()
        assert sizes == [group.stop - group.start for group in groups]
        for group, mean, covariance in zip(
            groups, meta.mean[0, 0][there], meta.covariance[0, 0][there], strict=True
        ):
            inside = parts[group.start : group.stop]
            expected = matched(inside, [1.0] * len(inside))
            torch.testing.assert_close(mean, expected[0], **CLOSE)
            torch.testing.assert_close(covariance, expected[1], **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
def test_scales_stop_where_the_sequence_does(causal):
    """A cell of scale s has 2^s blocks of 2; of these the last may be short if nothing is causal."""
    for n, scales in product((1, 2, 3, 4, 7, 8, 9, 15, 16), (None, 1, 2, 5)):
        blocks = n // 2 if causal else (n + 1) // 2
        fitting = [s for s in range(5 if scales is None else scales) if 2**s <= blocks]
        found = emergent(block=2, scales=scales).emerge(*beliefs(n=n), is_causal=causal)
        assert len(found.meta_tokens) == len(fitting)
        assert {group.scale for group in found.hierarchy} == {*fitting}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            EmergentHierarchicalAttention,
            {"reach": "full"},
            "reach of EmergentHierarchicalAttention is given by block, capacity, .* got reach 'full'",
        ),
        (
            EmergentHierarchicalAttention,
            {"score": "dot"},
            "score of EmergentHierarchicalAttention is given by kappa and .* got score 'dot'",
        ),
        (
            GaugeAttention,
            {"projection": "linear"},
            "projection of GaugeAttention is given by frames and per, got projection 'linear'",
        ),
        (EmergentHierarchicalAttention, {"block": 2.5}, "block must be a whole number .* got 2.5"),
        (EmergentHierarchicalAttention, {"learned": 1}, "learned must be True or False, got 1"),
    ],
)
def test_what_a_named_layer_cannot_mean_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(D, **options)


def test_a_change_of_frames_changes_no_group():
    mu, sigma, phi = beliefs(n=24)
    turn = torch.linspace(0, 2, 24, dtype=torch.float64)[:, None]
    by = torch.stack([torch.matrix_exp(element(t, "so", D)) for t in turn])
    moved = (by @ mu[..., None])[..., 0], by @ sigma @ by.mT, phi + turn  # so(2) commutes
    loose = emergent(block=4, capacity=3, threshold=0.02)
    one, other = loose.emerge(mu, sigma, phi), loose.emerge(*moved)
    assert len(one.hierarchy) == len(other.hierarchy)
    for ours, theirs in zip(one.hierarchy, other.hierarchy, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-7, abs=1e-10)
    for ours, theirs in zip(one.meta_tokens, other.meta_tokens, strict=True):
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        other.base_tokens.mean, (by @ one.base_tokens.mean[..., None])[..., 0], rtol=0, atol=1e-10
    )


def test_heads_rows_and_masks_of_given_beliefs():
    mu, sigma, phi = beliefs(n=16, lead=(2, 3))
    many = EmergentHierarchicalAttention(
        3 * D, 3, kappa=0.8, block=4, threshold=0.02, dtype=torch.float64
    )
    found = many.emerge(mu, sigma, phi, is_causal=True)
    alone = emergent(block=4, threshold=0.02).emerge(
        mu[1, 2], sigma[1, 2], phi[1, 2], is_causal=True
    )
    mine = [g for g in found.hierarchy if (g.row, g.head) == (1, 2)]
    assert [(g.scale, g.start, g.stop) for g in mine] == [
        (g.scale, g.start, g.stop) for g in alone.hierarchy
    ]
    torch.testing.assert_close(found.base_tokens.mean[1, 2], alone.base_tokens.mean, **CLOSE)
    real = torch.ones(2, 16, dtype=torch.bool)
    real[0, 10:] = False
    found = many.emerge(mu, sigma, phi, key_mask=real)
    assert max(g.stop for g in found.hierarchy if g.row == 0) == 10
    assert max(g.stop for g in found.hierarchy if g.row == 1) == 16


def test_gradients_reach_every_constituent_of_a_meta_token():
    mu, sigma, phi = (part.requires_grad_() for part in beliefs(n=12))
    found = emergent(block=4, capacity=1, threshold=9.0).emerge(mu, sigma, phi, is_causal=True)
    meta = found.meta_tokens[-1]
    for given in torch.autograd.grad(meta.mean.sum() + meta.covariance.sum(), (mu, sigma, phi)):
        inside = given[: int(meta.size.max())].flatten(1)
        assert inside.abs().sum(-1).all()
        assert not given[int(meta.size.max()) :].any()


def test_the_layer_is_gauge_attention_of_that_reach():
    torch.manual_seed(0)
    one = EmergentHierarchicalAttention(16, 2, block=4, threshold=0.1, dtype=torch.float64)
    other = GaugeAttention(
        16, 2, reach={"name": "hierarchical", "block": 4, "threshold": 0.1}, dtype=torch.float64
    )
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    assert torch.equal(one(x, is_causal=True), other(x, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_beliefs_of_lower_precision_are_near(dtype):
    given = beliefs(n=24)
    exact = emergent(block=4, capacity=4, threshold=0.0, scales=1).update(*given, covariances=True)
    low = emergent(block=4, capacity=4, threshold=0.0, scales=1).to(dtype)
    found = low.update(*(part.to(dtype) for part in given), covariances=True)
    assert found.mean.dtype == dtype
    bound = 40 * torch.finfo(dtype).eps
    assert (found.mean.double() - exact.mean).abs().max() < bound
    assert (found.covariance.double() - exact.covariance).abs().max() < bound


# ---------------------------------------------------------------- consensus alone


def test_consensus_is_runs_of_neighbours_and_a_mixture_is_their_belief():
    mu, sigma, phi = beliefs(n=15)
    parts = in_common(mu, sigma, phi)
    gaps = [math.inf, *(both_ways(*pair) for pair in pairwise(parts))]
    threshold = sum(sorted(gaps)[6:8]) / 2
    found = consensus(believe(mu, sigma, phi), threshold)
    begins = [i for i, gap in enumerate(gaps) if gap >= threshold]
    assert [(g.start, g.stop) for g in found] == [*pairwise([*begins, 15])]
    assert [g.began for g in found] == pytest.approx([gaps[i] for i in begins])
    expected = matched(parts, [1.0] * 15)
    one = mixture(believe(mu, sigma, phi))
    torch.testing.assert_close(one.mean[0, 0, 0], expected[0], **CLOSE)
    torch.testing.assert_close(one.covariance[0, 0, 0], expected[1], **CLOSE)


def soft_by_loop(gaps, threshold, capacity, tau):
    """The formula of the class, token by token."""
    at, rows = -1.0, []
    for gap in gaps:
        at += 1.0 if math.isinf(gap) else 1 / (1 + (threshold / gap) ** (1 / tau))
        far = [math.exp(-((min(at, capacity - 1) - g) ** 2) / tau) for g in range(capacity)]
        rows.append([value / sum(far) for value in far])
    return torch.tensor(rows, dtype=torch.float64)


def test_soft_groups_are_those_of_the_formula():
    mu, sigma, phi = beliefs(n=9)
    detector = SoftConsensusDetector(4, 0.3, 0.6, dtype=torch.float64).eval()
    found = detector(mu, sigma, phi)
    parts = in_common(mu, sigma, phi)
    gaps = [math.inf, *(both_ways(*pair) for pair in pairwise(parts))]
    places = soft_by_loop(gaps, 0.3, 4, 0.6)
    torch.testing.assert_close(found.assignment, places, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.size, places.sum(0), rtol=0, atol=1e-9)
    for group in range(4):
        mean, covariance = matched(parts, places[:, group].tolist())
        torch.testing.assert_close(found.mean[group], mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.covariance[group], covariance, rtol=0, atol=1e-8)


def test_soft_groups_of_points():
    mu, _, phi = beliefs(n=9, lead=(2,))
    detector = SoftConsensusDetector(3, 0.3, 0.6, dtype=torch.float64).eval()
    found = detector(mu)
    assert found.covariance is None
    gaps = [math.inf, *(mu[1, 1:] - mu[1, :-1]).square().sum(-1).tolist()]
    places = soft_by_loop(gaps, 0.3, 3, 0.6)
    torch.testing.assert_close(found.assignment[1], places, **CLOSE)
    torch.testing.assert_close(found.mean[1], places.T @ mu[1] / places.sum(0)[:, None], **CLOSE)
    with pytest.raises(ValueError, match="phi turns beliefs: give covariance or factor too"):
        detector(mu, phi=phi)


def test_whose_a_token_is_depends_on_the_past_alone():
    mu, sigma, phi = beliefs(n=12)
    later = mu.clone()
    later[7:] += 4
    detector = SoftConsensusDetector(12, 0.3, 0.6, dtype=torch.float64)
    found = []
    for mean in (mu, later):
        torch.manual_seed(2)
        found.append(detector(mean, sigma, phi).assignment)
    assert torch.equal(found[0][:7], found[1][:7])
    assert not torch.equal(found[0][7:], found[1][7:])
    assert not torch.equal(detector(mu, sigma, phi).assignment, found[0])


def test_groups_are_of_the_dtype_of_their_tokens():
    given = [part.float() for part in beliefs(n=24)]
    found = emergent(block=4).float().emerge(*given)
    assert {meta.mean.dtype for meta in found.meta_tokens} == {torch.float32}
    assert found.base_tokens.covariance.dtype == found.meta_tokens[0].covariance.dtype
    soft = SoftConsensusDetector(4)(*given)
    assert {soft.mean.dtype, soft.covariance.dtype, soft.assignment.dtype} == {torch.float32}


def test_hidden_tokens_are_of_no_group():
    mu, sigma, phi = beliefs(n=9, lead=(1,))
    real = torch.tensor([[True] * 4 + [False] * 2 + [True] * 3])
    detector = SoftConsensusDetector(4, 0.3, 0.6, dtype=torch.float64).eval()
    kept = real[0].nonzero().flatten()
    found = detector(mu, sigma, phi, key_mask=real)
    without = detector(mu[:, kept], sigma[:, kept], phi[:, kept])
    torch.testing.assert_close(found.mean, without.mean, **CLOSE)
    torch.testing.assert_close(found.size, without.size, **CLOSE)


def test_gradients_of_soft_groups_are_those_of_finite_differences():
    mu, sigma, phi = (part.requires_grad_() for part in beliefs(n=5))
    detector = SoftConsensusDetector(3, 0.3, 0.6, dtype=torch.float64).eval()

    def found(mu, raw, phi, log_threshold):
        detector.log_threshold.data = log_threshold.data
        given = {"log_threshold": log_threshold}
        symmetric = (raw + raw.mT) / 2
        return torch.func.functional_call(detector, given, (mu, symmetric, phi))

    start = detector.log_threshold.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(found, (mu, sigma, phi, start), fast_mode=True)
    fixed = SoftConsensusDetector(3, learned=False)
    assert not fixed.log_threshold.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity must be a whole number of 1 or more, got 0"),
        ({"capacity": 2.5}, "capacity must be a whole number of 1 or more, got 2.5"),
        ({"capacity": True}, "capacity must be a whole number of 1 or more, got True"),
        ({"threshold": 0.0}, "threshold must be positive and finite, got 0.0"),
        ({"threshold": math.nan}, "threshold must be positive and finite, got nan"),
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"temperature": "a"}, "temperature must be positive and finite, got 'a'"),
        ({"frames": "zz"}, "unknown frames 'zz'; choose from: gl, so"),
        ({"learned": "no"}, "learned must be True or False, got 'no'"),
    ],
)
def test_detectors_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoftConsensusDetector(**{"capacity": 2} | options)


def test_points_that_a_mean_would_truncate_are_refused():
    detector = SoftConsensusDetector(3)
    for points in (torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=f"mean must be floating, got {points.dtype}"):
            detector(points)
    for points in (torch.ones(8), torch.ones(1, 1, 1, 8, 2)):
        with pytest.raises(ValueError, match=r"mean must be \(n, d\), \(b, n, d\) or"):
            detector(points)


@pytest.mark.parametrize("threshold", [-1.0, math.nan, "a", True])
def test_a_threshold_of_consensus_that_is_none_is_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold must be 0 or more, got {threshold!r}"):
        consensus(believe(*beliefs(n=3)), threshold)


def test_the_names_are_public():
    assert {"EmergentHierarchicalAttention", "SoftConsensusDetector"} <= {*sixfold.__all__}
