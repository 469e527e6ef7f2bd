"""Statistics of heads against plain loops."""

import itertools
import math

import pytest
import torch

from sixfold.contracts import Distances, Features, Observation, Visibility
from sixfold.ops.attend.reference import logits, weights
from sixfold.ops.statistics import tiled
from sixfold.ops.statistics.choose import statistics
from sixfold.ops.statistics.sampled import QUERIES, head_statistics, sampled, spectra

INF = float("inf")


def observation(kind, n=6, m=6, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, n, 8, generator=generator)
    key = torch.randn(2, kv_heads, m, 8, generator=generator)
    some = torch.rand(2, 4, n, m, generator=generator) < 0.6
    some[:, :, -1] = False
    bias = torch.randn(n, m, generator=generator)
    seen = {
        "none": (None, False),
        "causal": (None, True),
        "bool": (some, False),
        "causal_bool": (some, True),
        "keys": (some[:, :1, :1], True),
        "float": (bias.masked_fill(~some[0, 0], -INF), False),
        "causal_float": (bias, True),
    }[kind]
    return Observation(Features(query, key, 0.4), Visibility(*seen))


KINDS = ("none", "causal", "bool", "causal_bool", "keys", "float", "causal_float")


def by_loop(seen, batches, queries):
    """Largest logit and normalised entropy of each head, one query at a time in float64."""
    query, key, scale = seen.rating
    n, m, heads = query.shape[2], key.shape[2], query.shape[1]
    group = heads // key.shape[1]
    mask = seen.visibility.mask
    whole = None if mask is None else mask.expand(query.shape[0], heads, n, m)
    largest, entropy = [], []
    for h in range(heads):
        top, shares = -INF, []
        for b, i in itertools.product(batches, queries):
            scores = []
            for j in range(m):
                if seen.visibility.is_causal and j > i + m - n:
                    continue
                bias = 0.0
                if whole is not None:
                    cell = whole[b, h, i, j]
                    bias = float(cell) if mask.dtype != torch.bool else (0.0 if cell else -INF)
                if bias > -INF:
                    product = query[b, h, i].double() @ key[b, h // group, j].double()
                    scores.append(scale * float(product) + bias)
            top = max([top, *scores])
            if len(scores) > 1:
                shift = max(scores)
                total = sum(math.exp(s - shift) for s in scores)
                p = [math.exp(s - shift) / total for s in scores]
                shares.append(-sum(x * math.log(x) for x in p) / math.log(len(p)))
        largest.append(top)
        entropy.append(sum(shares) / len(shares) if shares else 0.0)
    return torch.tensor(largest), torch.tensor(entropy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 9)])
def test_statistics_are_those_of_a_loop(kind, n, m):
    seen = observation(kind, n, m)
    for found, expected in zip(
        head_statistics(seen)[:2], by_loop(seen, range(2), range(n)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_redundancy_is_the_cosine_with_the_head_most_like_it(kind):
    seen = observation(kind, 6, 6)
    p = weights(seen.rating, seen.visibility).double()
    several = (p > 0).sum(-1) > 1
    found = head_statistics(seen).redundancy
    for a in range(p.shape[1]):
        cosines = [
            torch.nn.functional.cosine_similarity(p[:, a], p[:, b], dim=-1)[
                several[:, a] & several[:, b]
            ].mean()
            for b in range(p.shape[1])
            if a != b
        ]
        torch.testing.assert_close(found[a].double(), max(cosines), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [6, 150])
def test_sampled_queries_are_evenly_spaced_rows_of_the_first_sequence(kind, n):
    seen = observation(kind, n, n + 3)
    few = sampled(seen)
    count = min(n, QUERIES)
    assert few.rating.query.shape[:3] == (1, 4, count)
    same = few.rating.query[0, 0][:, None] == seen.rating.query[0, 0]
    rows = same.all(-1).int().argmax(-1)
    gaps = rows.sort().values.diff()
    assert rows.min() == 0
    assert rows.max() == n - 1
    assert gaps.min() > 0
    assert gaps.max() - gaps.min() <= 1
    whole = weights(seen.rating, seen.visibility)[:1]
    torch.testing.assert_close(weights(few.rating, few.visibility), whole[:, :, rows])


def test_entropy_is_one_for_equal_logits_and_zero_for_one_key():
    query, key = torch.zeros(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    seen = Observation(Features(query, key, 1.0), Visibility(None, is_causal=True))
    largest, entropy, alike = head_statistics(seen)
    torch.testing.assert_close(alike, torch.ones(2))
    torch.testing.assert_close(entropy, torch.ones(2))
    assert largest.tolist() == [0.0, 0.0]
    one = torch.eye(5, dtype=torch.bool)
    seen = Observation(Features(query, key, 1.0), Visibility(one, is_causal=False))
    assert head_statistics(seen)[1].tolist() == [0.0, 0.0]
    sharp = Observation(Features(key * 100, key, 1.0), Visibility(None, is_causal=False))
    assert (head_statistics(sharp)[1] < 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_entropy_is_that_of_finite_differences(kind):
    """In float32, so by a central difference along random directions."""
    seen = observation(kind)
    query = seen.rating.query.clone().requires_grad_()

    def total(point):
        return head_statistics(seen._replace(rating=seen.rating._replace(query=point)))[1].sum()

    gradient = torch.autograd.grad(total(query), query)[0]
    assert torch.isfinite(gradient).all()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(query.shape, generator=generator)
        step = 1e-2 * direction
        with torch.no_grad():
            slope = (total(query + step) - total(query - step)) / 2e-2
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-2, atol=2e-3)


def test_spectra_are_the_singular_values():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(5, 8, 20, generator=generator)
    largest, condition = spectra(matrices)
    singular = torch.linalg.svdvals(matrices.double())
    torch.testing.assert_close(largest, singular[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(condition, singular[:, 0] / singular[:, -1], rtol=1e-8, atol=0)


def test_a_known_condition_number_is_found_and_a_singular_one_is_huge():
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    values = torch.tensor([1e4, 50, 5, 2, 1.5, 1], dtype=torch.float64)
    largest, condition = spectra((basis * values @ basis.T)[None])
    assert largest.item() == pytest.approx(1e4)
    assert condition.item() == pytest.approx(1e4, rel=1e-6)
    flat = torch.ones(1, 3, 4)
    assert spectra(flat)[1].item() > 1e7
    largest, condition = spectra(torch.zeros(1, 3, 4))
    assert largest.item() == 0 and math.isfinite(condition.item())


def rated(kind, score, **sizes):
    """The attention of `observation`, by features or by distance."""
    seen = observation(kind, **sizes)
    if score == "features":
        return seen
    rate = torch.tensor([0.5, 1.0, 0.2, 2.0])
    query, key, _ = seen.rating
    return seen._replace(rating=Distances(query, key, rate, 1.0), signed=False)


@pytest.mark.parametrize("score", ["features", "distances"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 9)])
def test_all_statistics_are_those_of_the_weights(kind, score, n, m):
    seen = rated(kind, score, n=n, m=m)
    double = seen.rating._replace(query=seen.rating.query.double(), key=seen.rating.key.double())
    explicit, scores = weights(double, seen.visibility), logits(double, seen.visibility)
    blind = scores.isneginf().all(-1)
    lse = scores.logsumexp(-1)
    entropy = torch.special.entr(explicit).sum(-1)
    top = scores.amax(-1)
    if not seen.signed:
        top -= scores.masked_fill(scores.isneginf(), INF).amin(-1)
    top = top.masked_fill(blind, -INF).amax(-1)
    for impl in ("tiled", "reference", "fused", "auto"):
        wanted = impl in ("tiled", "reference")
        if impl == "fused" and (score == "distances" or "float" in kind):
            with pytest.raises(ValueError, match="cannot give these statistics.*use 'tiled'"):
                statistics(seen, impl="fused")
            continue
        found = statistics(seen, impl=impl, largest=wanted)
        close = {"rtol": 1e-6, "atol": 2e-6, "check_dtype": False}
        torch.testing.assert_close(found.entropy, entropy, **close)
        torch.testing.assert_close(found.received, explicit.sum(-2), **close)
        torch.testing.assert_close(found.log_sum_exp, lse, **close)
        if wanted:
            torch.testing.assert_close(found.largest, top, **close)
        assert (found.largest is not None) == wanted


def test_received_weight_of_all_keys_is_the_number_of_queries_that_see(monkeypatch):
    monkeypatch.setattr(tiled, "ROWS", 4)
    for score, kind in itertools.product(("features", "distances"), KINDS):
        seen = rated(kind, score, n=11, m=11)
        found = statistics(seen)
        count = (~found.log_sum_exp.isneginf()).sum(-1)
        torch.testing.assert_close(found.received.sum(-1), count.float())


def test_the_largest_logit_lies_under_the_log_sum_exp():
    seen = observation("causal", n=40, m=40)
    found = statistics(seen, largest=True)
    upper = found.log_sum_exp.amax(-1)
    assert (found.largest <= upper).all()
    assert (found.largest >= upper - math.log(40)).all()


def test_the_reference_statistics_have_gradients():
    seen = observation("causal_bool")
    query = seen.rating.query.double().requires_grad_()

    def entropy(query):
        one = seen._replace(rating=seen.rating._replace(query=query, key=seen.rating.key.double()))
        return statistics(one, impl="reference").entropy

    assert torch.autograd.gradcheck(entropy, query, fast_mode=True)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="unknown impl 'flash'"):
        statistics(observation("none"), impl="flash")


def test_large_logits_keep_their_digits():
    """A head that looks at one key has no entropy, however large its logits are."""
    seen = observation("none", n=40, m=40)
    rating = seen.rating._replace(query=300 * seen.rating.query, key=300 * seen.rating.key)
    found = statistics(seen._replace(rating=rating))
    expected = statistics(seen._replace(rating=rating), impl="reference")
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=0, atol=1e-4)
    assert (statistics(seen._replace(rating=rating), impl="fused").entropy >= 0).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_logits_that_overflow_are_no_mask(impl, is_causal, signed):
    """One head's rate is huge: NaN there, and what the mask hides sees nothing as before."""
    points = torch.randn(2, 4, 6, 8) * 100
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    rate = torch.tensor([1.0, 3e38, 1.0, 1.0])
    for hidden in (mask, torch.zeros(6, 6).masked_fill(~mask, -INF)):
        rating = Distances(points, points + 1, rate, 1.0)
        seen = Observation(rating, Visibility(hidden, is_causal), signed=signed)
        found = statistics(seen, impl=impl, largest=True)
        entropy, received, lse, largest = found
        whole = [0, 2, 3]
        assert all(part[:, whole].isfinite().all() for part in (entropy, received, largest))
        assert (entropy[:, :, 2] == 0).all()
        assert lse[:, :, 2].isneginf().all()
        others = [0, 1, 3, 4, 5]
        assert entropy[:, 1, others].isnan().all()
        assert lse[:, 1, others].isnan().all()
        assert received[:, 1].isnan().any(-1).all()
        assert largest[:, 1].isnan().all()
        top, share, _ = head_statistics(seen)
        assert top[whole].isfinite().all()
        assert share[whole].isfinite().all()
        assert top[1].isnan()
        assert share[1].isnan()


def test_spectra_of_what_is_not_finite_are_no_numbers():
    weights = torch.eye(4).repeat(3, 1, 1)
    weights[1, 0, 0] = math.nan
    found, condition = spectra(weights)
    assert found.tolist()[::2] == condition.tolist()[::2] == [1.0, 1.0]
    assert found[1].isnan()
    assert condition[1].isnan()


def test_without_a_sign_the_largest_of_a_sample_is_a_range():
    key = torch.tensor([[[[1.0], [-2.0], [0.5]]]])
    seen = Observation(Features(torch.full((1, 1, 1, 1), 2.0), key, 1.0), Visibility(None, False))
    assert head_statistics(seen).largest.item() == 2.0
    assert head_statistics(seen._replace(signed=False)).largest.item() == 2.0 + 4.0
