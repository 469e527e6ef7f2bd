"""Features in float16: right where they fit, NaN where they do not, never a wrong number."""

import pytest
import torch

from sixfold.attention.score import jeffreys, kl_diagonal, l2_squared, wasserstein2
from sixfold.contracts import Belief, Features, Heads, Visibility
from sixfold.ops.attend import fused, reference

HEADS = Heads(16, 2, 8, 2)
SCALES = (1, 10, 100, 150, 300, 3000)
EVERYTHING = Visibility(None, is_causal=False)


def rated(scores, places, spreads, rate):
    """Features of beliefs (points for l2_squared) whose queries and keys have these scales."""
    generator, made = torch.Generator().manual_seed(0), []
    for far, wide in zip(places, spreads, strict=True):
        mean = torch.randn(1, 2, 6, 8, generator=generator) * far
        std = (torch.rand(1, 2, 6, 8, generator=generator) + 0.5) * wide
        made.append(mean.half() if scores is l2_squared else Belief(mean.half(), std.half()))
    score = scores.build(HEADS, rate=rate)
    return score(made[0], score.keys(made[1]))


def spoilt(features):
    """Rows whose query, or a key of whose head, is no number."""
    query, key = (~tensor.isfinite() for tensor in features[:2])
    return query.any(-1) | key.any((-2, -1))[..., None]


@pytest.mark.parametrize("rate", [None, 1e-4])
@pytest.mark.parametrize("scores", [l2_squared, kl_diagonal, jeffreys, wasserstein2])
def test_what_float16_cannot_hold_is_nan_and_the_rest_is_right(scores, rate):
    """Right is the attention of the same features in float64."""
    spreads = ((1, 1),) if scores is l2_squared else ((1, 1), (300, 1), (1, 300), (1e-3, 1))
    value = torch.randn(1, 2, 6, 4).half()
    lost = held = 0
    for places in ((near, far) for near in SCALES for far in SCALES):
        for spread in spreads:
            features = rated(scores, places, spread, rate)
            rows = spoilt(features)
            whole = Features(features.query.double(), features.key.double(), features.scale)
            golden = reference.attend(whole, value.double(), EVERYTHING, 0.0)[~rows]
            found = fused.attend(features, value, EVERYTHING, 0.0)
            assert found[rows].isnan().all()
            torch.testing.assert_close(found[~rows].double(), golden, rtol=0, atol=5e-3)
            plain = reference.attend(features, value, EVERYTHING, 0.0)
            assert plain[rows].isnan().all()
            # the reference holds its logits in float16 too: they may overflow where features fit
            assert (plain.isnan() | (plain != 0)).all()
            lost, held = lost + int(rows.sum()), held + int((~rows).sum())
    assert min(lost, held) > 50
