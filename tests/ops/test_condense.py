"""Meta-tokens: what condenses, what it costs in accuracy, and that the fast path is the reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sixfold.contracts import Features, Visibility
from sixfold.ops.attend import reference as attention
from sixfold.ops.condense import bound, cells, fused, groups, pyramid, reference
from sixfold.ops.condense.groups import Tokens
from sixfold.ops.condense.pyramid import Rules


def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).square().sum(-1)


def same(moments: torch.Tensor) -> torch.Tensor:
    return moments


class Sequence:
    """Random queries, keys and values, and attention over them in every way."""

    def __init__(self, rules, *, n=61, m=61, heads=(4, 2), causal=True, key=None, seed=0) -> None:
        torch.manual_seed(seed)
        h, h_kv = heads
        self.rules, self.causal, self.groups = rules, causal, h // h_kv
        self.query = torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True)
        key = torch.randn(2, h_kv, m, 8, dtype=torch.float64) if key is None else key
        self.key = key.requires_grad_()
        self.value = torch.randn(2, h_kv, m, 5, dtype=torch.float64, requires_grad=True)
        self.leaves = (self.query, self.key, self.value)

    @property
    def rating(self) -> Features:
        return Features(self.query, self.key, 0.4)

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.key, self.value, torch.ones_like(self.key[..., 0]))

    @property
    def pyramid(self) -> pyramid.Pyramid:
        m, block = self.key.shape[-2], self.rules.block
        scales = cells.num_scales(-(-m // block), self.rules.scales)
        return pyramid.build(self.tokens, distance, self.rules, scales, is_causal=self.causal)

    def fused(self) -> torch.Tensor:
        given = (self.rating, same, self.tokens, self.pyramid, self.rules)
        return fused.attend(*given, is_causal=self.causal)

    def explicit(self) -> torch.Tensor:
        given = (self.rating, same, self.pyramid, self.rules)
        found = reference.logits(*given, is_causal=self.causal)
        n, m = found.shape[-2:]
        mask = attention.visible(Visibility(None, self.causal), n, m, found.device)
        weights = attention.masked(found, mask).softmax(-1)
        return weights @ self.value.repeat_interleave(self.groups, 1)

    def full(self) -> torch.Tensor:
        return attention.attend(self.rating, self.value, Visibility(None, self.causal), 0.0)


RULES = [
    Rules(8, 4, 1.0), Rules(8, 8, 0.0, 1), Rules(8, 1, 100.0), Rules(16, 3, 30.0, 2),
    Rules(8, 4, 10.0, temperature=0.7),
]  # fmt: skip
LENGTHS = [(61, 61), (64, 64), (5, 61), (1, 57), (7, 7), (200, 200)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scales", [1, 2, 8])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7, 16, 37])
def test_cells_tile_the_far_field(num_blocks, scales, causal):
    for block in range(num_blocks):
        found = cells.far(block, num_blocks, scales, is_causal=causal)
        spanned = [b for cell in found for b in cell.blocks if b < num_blocks]
        last = block if causal else block + cells.NEAR
        near = range(max(0, block - cells.NEAR), min(num_blocks, last + 1))
        everything = range(block + 1) if causal else range(num_blocks)
        assert sorted([*spanned, *near]) == list(everything)
        by_scale = [sum(cell.scale == s for cell in found) for s in range(scales - 1)]
        assert max(by_scale, default=0) <= (2 if causal else 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scales", [1, 2, None])
def test_the_number_of_scales_is_that_of_the_farthest_cell_seen(scales, causal):
    for num_blocks in range(1, 70):
        most = 9 if scales is None else scales
        seen = [cells.far(block, num_blocks, most, is_causal=causal) for block in range(num_blocks)]
        coarsest = max((cell.scale for found in seen for cell in found), default=-1)
        assert cells.num_scales(num_blocks, scales) == coarsest + 1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_the_fast_path_is_the_reference(n, m, rules, causal):
    sequence = Sequence(rules, n=n, m=m, causal=causal)
    out, expected = sequence.fused(), sequence.explicit()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    flow = torch.randn_like(out)
    ours = torch.autograd.grad(out, sequence.leaves, flow)
    theirs = torch.autograd.grad(expected, sequence.leaves, flow)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_threshold_zero_is_full_attention(causal):
    for m in (61, 128):
        sequence = Sequence(Rules(8, 8, 0.0, 1), n=m, m=m, causal=causal)
        torch.testing.assert_close(sequence.fused(), sequence.full(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("causal", [True, False])
def test_equal_neighbours_merge_without_error(causal):
    key = torch.randn(2, 2, 16, 8, dtype=torch.float64).repeat_interleave(8, 2)
    # one group for every eight tokens, and for the two of a cell of the next scale
    sequence = Sequence(Rules(16, 2, 1e-12, 1), n=128, m=128, causal=causal, key=key)
    assert (sequence.pyramid.levels[0].size > 0).sum() == 2 * 2 * 16
    torch.testing.assert_close(sequence.fused(), sequence.full(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rules", [Rules(8, 4, 1e9), Rules(8, 4, 1e9, temperature=0.5)], ids=str)
def test_what_empty_places_are_rated_reaches_no_logit(rules):
    # all logits are near -1e4, far below the 0 of a place that nothing is in, or nearly nothing
    torch.manual_seed(0)
    key = torch.randn(2, 2, 61, 8, dtype=torch.float64) - 3000
    sequence = Sequence(rules, key=key)
    sequence.query = sequence.query.abs()
    torch.testing.assert_close(sequence.explicit(), sequence.fused(), rtol=0, atol=1e-11)


def test_groups_far_below_the_largest_of_a_cell_have_logits_in_half_precision():
    torch.manual_seed(0)
    key = 10 * torch.randn(2, 2, 61, 8, dtype=torch.float64)
    sequence = Sequence(Rules(8, 8, 0.0, 1), key=key)
    rating = Features(*(t.detach().half() for t in (sequence.query, key)), 0.4)
    given = (rating, torch.Tensor.half, sequence.pyramid, sequence.rules)
    found = reference.logits(*given, is_causal=True)
    assert found.dtype == torch.float16
    assert found.isfinite().all()


def test_a_weighted_logsumexp_is_exact_under_autocast_and_of_what_overflows():
    torch.manual_seed(0)
    rated = torch.randn(2, 7, 4)
    share = torch.rand(2, 9, 4)
    expected = (rated[:, :, None] + share[:, None].log()).logsumexp(-1)
    torch.testing.assert_close(reference.weighted_logsumexp(rated, share), expected)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(reference.weighted_logsumexp(rated, share), expected)
    rated[0, 3], rated[1, 2, 1:] = -torch.inf, -200.0
    rated.requires_grad_()
    share[1, 5, 0] = 0.0
    found = reference.weighted_logsumexp(rated, share)
    assert found[0, 3].isneginf().all()
    assert found[1, 2, 5].isneginf()  # of places 200 nats below the one it has no part of
    (grad,) = torch.autograd.grad(found[found.isfinite()].sum(), rated)
    assert grad.isfinite().all()


def test_groups_are_what_the_threshold_says():
    moments = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.1, 5.0, 5.0, 9.0])[None, :, None]
    tokens = Tokens(moments, moments, torch.ones(1, 8))
    apart = groups.apart(tokens, distance)
    begins = groups.beginnings(apart, 0.02, 8)
    assert begins[0].tolist() == [True, False, False, True, False, True, False, True]
    places = groups.places(begins, 8, moments.dtype)
    assert places[0].argmax(-1).tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    found = groups.condense(tokens, places)
    assert found.size[0].tolist() == [3, 2, 2, 1, 0, 0, 0, 0]
    expected = torch.tensor([0.1, 1.05, 5.0, 9.0, 0, 0, 0, 0])
    torch.testing.assert_close(found.moments[0, :, 0], expected)
    # strict: neighbours exactly at the threshold stay apart, and 0 keeps equal ones apart too
    assert groups.beginnings(apart, 0.0, 8).all()
    # no room for four groups: the two that are closest to each other become one
    assert groups.beginnings(apart, 0.02, 3)[0].nonzero().flatten().tolist() == [0, 5, 7]


def test_a_cell_begins_whatever_is_no_number_in_it():
    nan = torch.nan
    distance = torch.tensor([[torch.inf, nan, nan, 9.0], [torch.inf, torch.inf, nan, nan]])
    begins = groups.beginnings(distance, 0.5, 2)
    assert begins.tolist() == [[True, False, False, False], [True, True, False, False]]


def test_empty_places_are_passed_over():
    moments = torch.tensor([0.0, 7.0, 7.0, 0.1])[None, :, None]
    tokens = Tokens(moments, moments, torch.tensor([[2.0, 0.0, 0.0, 1.0]]))
    apart = groups.apart(tokens, distance)
    torch.testing.assert_close(apart[0], torch.tensor([torch.inf, -torch.inf, -torch.inf, 0.01]))
    begins = groups.beginnings(apart, 1.0, 2)
    found = groups.condense(tokens, groups.places(begins, 2, moments.dtype))
    torch.testing.assert_close(found.moments[0, 0, 0], torch.tensor(0.1 / 3))
    assert found.size[0].tolist() == [3.0, 0.0]


@pytest.mark.parametrize("rules", [Rules(8, 4, 1.0), Rules(8, 2, 100.0, 3)], ids=str)
def test_every_token_counts_once(rules):
    sequence = Sequence(rules, m=100, n=100)
    for scale, level in enumerate(sequence.pyramid.levels):
        assert (level.size.sum(-1) == 8 << scale).all()
    alike = Sequence(rules, n=100, m=100)
    alike.value = torch.ones_like(alike.value)
    torch.testing.assert_close(alike.fused(), torch.ones_like(alike.fused()))


@pytest.mark.parametrize("moved", [3, 40, 63, 64, 99])
def test_the_past_does_not_see_the_future(moved):
    rules = Rules(8, 3, 4.0)
    one, other = (Sequence(rules, n=100, m=100) for _ in range(2))
    with torch.no_grad():
        other.key[..., moved, :] += 10
        other.value[..., moved, :] -= 10
        assert torch.equal(one.fused()[..., :moved, :], other.fused()[..., :moved, :])
        assert not torch.equal(one.fused()[..., moved, :], other.fused()[..., moved, :])


def test_segments_are_one_pass():
    whole = Sequence(Rules(8, 3, 4.0), n=100, m=100)
    last = Sequence(Rules(8, 3, 4.0), n=100, m=100)
    for m in (3, 57, 64, 99):
        last.query, last.key = whole.query[..., m - 3 : m, :], whole.key[..., :m, :]
        last.value = whole.value[..., :m, :]
        torch.testing.assert_close(
            last.fused(), whole.fused()[..., m - 3 : m, :], rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("scales", [1, 2, 5])
def test_no_later_block_sees_a_cell_before_the_earliest(scales):
    for first in range(30):
        starts = cells.earliest(first, scales, is_causal=True)
        seen = [cells.far(b, 40, scales, is_causal=True) for b in range(first, 40)]
        for scale, start in enumerate(starts):
            numbers = [c.number for row in seen for c in row if c.scale == scale]
            assert min(numbers, default=start) == start


def test_a_last_query_reads_few_groups():
    sequence, read = Sequence(Rules(8, 3, 4.0), n=1, m=4000), []
    built = sequence.pyramid

    def keys(moments: torch.Tensor) -> torch.Tensor:
        read.append(moments.shape[-2])
        return moments

    given = (sequence.rating, keys, sequence.tokens, built, sequence.rules)
    fused.attend(*given, is_causal=True)
    assert sum(read) <= 4 * 3 * len(built.levels) < sum(built.counts) / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_digits_know_how_many_a_group_is(dtype):
    key, value = torch.zeros(1, 3, 2, dtype=dtype), torch.ones(1, 3, 4, dtype=dtype)
    grown, _ = fused.filled(key, value, torch.tensor([[1.0, 100.0, 0.0]]))
    sizes = grown[0, :, 2:].double().sum(-1)
    assert sizes[:2].exp().tolist() == pytest.approx([1.0, 100.0], rel=1e-3)
    assert torch.finfo(dtype).min < sizes[2] < -1e3


def test_groups_are_drawn_with_their_probability():
    torch.manual_seed(0)
    pair = torch.tensor([[0.0], [3.0**0.5]], dtype=torch.float64).expand(4000, 2, 1)
    tokens = Tokens(pair, pair, torch.ones(4000, 2))
    rules = Rules(2, 2, 1.0, temperature=1e-3, noisy=True)
    apart = pyramid.condensed(tokens, distance, rules)[0].size[:, 1] > 0.5
    # sigmoid(log 3) of a logistic draw, within four standard deviations
    assert apart.double().mean().item() == pytest.approx(0.75, abs=0.028)


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_stays_under_the_bound_and_the_bound_falls_with_the_threshold(causal):
    torch.manual_seed(0)
    walk = 0.02 * torch.randn(2, 2, 160, 8, dtype=torch.float64).cumsum(2)
    bounds = []
    for threshold in (1.0, 3e-3, 1e-3, 3e-4, 0.0):
        rules = Rules(16, 16, threshold, 1)
        sequence = Sequence(rules, n=160, m=160, causal=causal, key=walk.clone())
        given = (sequence.rating, same, sequence.pyramid, rules)
        moved = reference.logits(*given, is_causal=causal)
        exact = attention.logits(sequence.rating, Visibility(None, is_causal=False))
        allowed = bound.logit_error(*given, is_causal=causal)
        assert ((moved - exact).abs().amax(-1) <= allowed + 1e-12).all()
        error = (sequence.fused() - sequence.full()).abs().amax(-1)
        assert (error <= bound.output_error(allowed, sequence.value) + 1e-12).all()
        bounds.append(allowed)
    assert all((low <= high + 1e-12).all() for high, low in pairwise(bounds))
    assert bounds[0].max() > 5 * bounds[2].max() > 0
    assert bounds[-1].max() == 0


def test_padding_and_hidden_tokens_do_not_widen_the_bound():
    rules = Rules(4, 4, 1.0)
    alike = torch.ones(2, 2, 23, 8, dtype=torch.float64)  # the last block has an empty place
    sequence = Sequence(rules, n=23, m=23, causal=False, key=alike)
    given = (sequence.rating, same, sequence.pyramid, rules)
    assert bound.logit_error(*given, is_causal=False).max() < 1e-12
    sequence.key.data[:, :, 7] = 50.0
    size = sequence.tokens.size.clone()
    size[:, :, 7] = 0.0
    hidden = sequence.tokens._replace(size=size)
    built = pyramid.build(hidden, distance, rules, 2, is_causal=False)
    given = (sequence.rating, same, built, rules)
    assert bound.logit_error(*given, is_causal=False).max() < 1e-12


def test_the_error_of_an_output_is_bounded_tightly():
    for error in (0.01, 0.5, 3.0):
        # what gains has the share 1 / (1 + exp(e)), and values are as far apart as they can be
        logits = torch.tensor([0.0, error], dtype=torch.float64)
        moved = logits + torch.tensor([error, -error], dtype=torch.float64)
        value = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
        found = ((moved.softmax(0) - logits.softmax(0)) @ value).abs()
        given = torch.tensor([[[error]]], dtype=torch.float64), value[None, None]
        torch.testing.assert_close(bound.output_error(*given)[0, 0], found, rtol=1e-12, atol=0)


def test_every_constituent_is_reached_by_the_gradient():
    sequence = Sequence(Rules(8, 2, 1e9), n=1, m=96)
    _, key, value = torch.autograd.grad(sequence.fused().square().sum(), sequence.leaves)
    assert (key.abs().sum(-1) > 0).all()
    assert (value.abs().sum(-1) > 0).all()


def test_gradients_are_those_of_finite_differences():
    sequence = Sequence(Rules(4, 2, 1.0), n=20, m=20, heads=(2, 1))

    def out(query, key, value):
        sequence.query, sequence.key, sequence.value = query, key, value
        return sequence.explicit()

    assert torch.autograd.gradcheck(out, sequence.leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_survive_half_precision(dtype):
    alike = torch.zeros(1, 1, 512, 8, dtype=dtype)
    value = torch.linspace(0, 1, 512, dtype=dtype)[None, None, :, None].expand(1, 1, 512, 8)
    rules = Rules(8, 1, 1.0)
    tokens = Tokens(alike, value.contiguous(), torch.ones(1, 1, 512))
    found = pyramid.build(tokens, distance, rules, 6, is_causal=True)
    rating = Features(alike[..., -1:, :], alike, 1.0)
    out = fused.attend(rating, same, tokens, found, rules, is_causal=True)
    # the mean of all values, near ones and groups of 128 alike
    torch.testing.assert_close(out.double(), torch.full_like(out.double(), 0.5), atol=4e-3, rtol=0)


def test_soft_places_become_hard_ones_as_the_temperature_falls():
    torch.manual_seed(0)
    apart = torch.rand(3, 12, dtype=torch.float64)
    apart[:, 0] = torch.inf
    hard = groups.places(groups.beginnings(apart, 0.5, 12), 12, apart.dtype)
    still = torch.zeros_like(apart)
    errors = [
        (groups.soft_places(apart, 0.5, 12, t, still) - hard).abs().max() for t in (1.0, 0.1, 1e-3)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6
    places = groups.soft_places(apart, 0.5, 4, 0.3, still)
    torch.testing.assert_close(places.sum(-1), torch.ones_like(apart))


def test_soft_groups_beyond_the_room_there_is_share_the_last_place():
    apart = torch.tensor([torch.inf, 50.0, 50.0, 50.0, 50.0], dtype=torch.float64)
    found = groups.soft_places(apart, 0.5, 2, 0.5, torch.zeros_like(apart))
    torch.testing.assert_close(found[2:], found[1:2].expand(3, 2), rtol=0, atol=1e-3)
    expected = torch.tensor([-2.0, 0.0], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-3)


def test_a_soft_place_depends_on_the_past_alone_and_teaches_the_threshold():
    torch.manual_seed(0)
    apart = torch.rand(12, dtype=torch.float64)
    apart[0] = torch.inf
    later = apart.clone()
    later[7:] = torch.rand(5)
    threshold = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    still = torch.zeros_like(apart)
    one, other = (groups.soft_places(a, threshold, 6, 0.5, still) for a in (apart, later))
    assert torch.equal(one[:7], other[:7])
    weights = torch.arange(6, dtype=torch.float64)
    (slope,) = torch.autograd.grad((one @ weights).sum(), threshold)
    step = 1e-6
    sides = [
        (groups.soft_places(apart, 0.5 + sign * step, 6, 0.5, still) @ weights).sum()
        for sign in (1, -1)
    ]
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=0)


def test_drawn_places_differ_and_average_to_what_is_likely():
    torch.manual_seed(0)
    apart = torch.tensor([torch.inf, 0.1, 2.0], dtype=torch.float64).expand(4000, 3)
    noise = torch.rand_like(apart).logit()
    places = groups.soft_places(apart, 0.5, 3, 1e-3, noise)
    second = places[:, 1].argmax(-1).double().mean()
    # a group begins with probability apart / (apart + threshold): a logistic variable's tail
    torch.testing.assert_close(second, torch.tensor(0.1 / 0.6).double(), rtol=0, atol=0.03)


def test_soft_parts_that_underflow_keep_the_gradient_of_the_reference():
    torch.manual_seed(0)
    key = torch.randn(1, 1, 96, 8, requires_grad=True)
    rules = Rules(16, 16, 1.0, temperature=0.5, noisy=True)
    tokens = Tokens(key, key, torch.ones(1, 1, 96))
    found = pyramid.build(tokens, distance, rules, 2, is_causal=True)
    rating = Features(torch.randn(1, 1, 96, 8), key, 0.4)
    logits = reference.logits(rating, same, found, rules, is_causal=True)
    (grad,) = torch.autograd.grad(logits.clamp(min=-50).square().sum(), key)
    assert grad.isfinite().all()
