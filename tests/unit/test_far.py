"""The rivals of benchmarks/far.py see what they say they see, and nothing later."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sixfold.attention.rotary import rotate

pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / "benchmarks"
N = 256


@pytest.fixture(scope="module")
def far():
    """benchmarks/far.py, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("far", FOLDER / "far.py")
        module = importlib.util.module_from_spec(spec)
        # named tuples look their module up
        patch.setitem(sys.modules, "far", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def heads(far):
    torch.manual_seed(0)
    return torch.randn(3, 2, far.HEADS, N, far.HEAD_DIM).unbind()


def test_tokens_that_stand_for_themselves_give_full_attention(far, heads):
    query, key, value = heads
    keys, values = (part.unflatten(-2, (-1, far.BLOCK)) for part in (key, value))
    place = torch.arange(N, dtype=torch.float32).view(-1, far.BLOCK)
    found = far.near_and_far(query, key, value, keys, place, values)
    turned = (rotate(part, 0, far.THETA) for part in (query, key))
    expected = scaled_dot_product_attention(*turned, value, is_causal=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_equal_tokens_of_a_block_lose_nothing_where_places_do_not_count(far, heads, monkeypatch):
    monkeypatch.setattr(far, "rotate", lambda x, *_: x)
    monkeypatch.setattr(far, "turn", lambda x, *_: x)
    query, key, value = heads
    alike = torch.arange(N) // far.BLOCK * far.BLOCK
    key, value = key[..., alike, :], value[..., alike, :]
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    rivals = far.LowRank(9, means=True, per_head=False), far.Latent(8, std=1.0)
    for rival in rivals:
        found = rival(query, key, value)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_hashed_sees_the_near_field_and_the_latest_of_its_bucket(far, heads, shared):
    query, key, value = heads
    torch.manual_seed(1)
    found = far.hashed(query, key, value, latest=5, buckets=8, shared=shared)
    torch.manual_seed(1)
    turned = torch.randn(far.HEADS, far.HEAD_DIM, 4)
    if shared:
        key = far.HEAD_DIM**0.5 * query / query.norm(dim=-1, keepdim=True)
    of_query, of_key = (torch.cat([x @ turned, -x @ turned], -1).argmax(-1) for x in (query, key))
    query, key = (rotate(part, 0, far.THETA) for part in (query, key))
    for row, head, i in ((0, 0, 0), (0, 1, 100), (1, 2, 170), (1, 0, N - 1)):
        begin = max(i // far.BLOCK - 1, 0) * far.BLOCK
        same = [j for j in range(begin) if of_key[row, head, j] == of_query[row, head, i]]
        seen = [*same[-5:], *range(begin, i + 1)]
        seen = [j for j in seen if not shared or j != i or i == 0]
        logits = key[row, head, seen] @ query[row, head, i] / far.HEAD_DIM**0.5
        expected = logits.softmax(0) @ value[row, head, seen]
        torch.testing.assert_close(found[row, head, i], expected, atol=1e-5, rtol=1e-5)


def test_nothing_later_is_seen(far, heads):
    rivals = {
        "low-rank": far.LowRank(8, means=False, per_head=True),
        "latent": far.Latent(8, std=1.0),
        "hashed": partial(far.hashed, latest=5, buckets=4, shared=False),
        "window": partial(far.sliding, width=30, sinks=4),
    }
    for name, rival in rivals.items():
        for at in (20, 70, 200):
            other = [part.clone() for part in heads]
            for part in other:
                part[..., at:, :] += 1
            torch.manual_seed(2)
            before = rival(*heads)
            torch.manual_seed(2)
            changed = (rival(*other) - before).abs().amax((0, 1, 3))
            assert changed[:at].max() < 1e-6, name
            assert changed[at:].min() > 0, name


def test_reaches_rate_as_much_as_the_hierarchical_one(far):
    for n in (704, 1024):
        budget = far.rated("hierarchical", n, {})
        for case, tries in far.TRIES.items():
            for setting in tries if case != "full" else ():
                assert far.rated(case, n, setting) == pytest.approx(budget, rel=0.02), case


def test_a_fact_is_told_once_far_back_and_its_value_is_what_is_asked(far):
    inputs, targets = far.facts(np.random.default_rng(0), 3, area=32, gap=100, asked=8)
    asked = slice(132, 140)
    assert (targets[:, :132] == -100).all()
    for row, answers in zip(inputs, targets, strict=True):
        told = {int(t) // far.KINDS: int(t) % far.KINDS for t in row if t < far.KEYS}
        assert len(told) == far.TOLD
        assert (row[:32] < far.KEYS).sum() == far.TOLD
        expected = [told[int(key) - far.KEYS] for key in row[asked]]
        assert (answers[asked] - far.VALUES).tolist() == expected
