"""Statistics of attention, from the explicit weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sixfold.contracts import Observation, Rating, Statistics
from sixfold.ops.attend.reference import logits, unseeing
from sixfold.ops.precision import exact


def widened(rating: Rating) -> Rating:
    """The same rating in float32, or wider where it already is."""
    kind = torch.promote_types(rating.query.dtype, torch.float32)
    return rating._replace(query=rating.query.to(kind), key=rating.key.to(kind))


def reduce(scores: Tensor, blind: Tensor, *, signed: bool) -> Statistics:
    """All statistics of explicit logits (b, h, n, m), -inf where a query does not see a key.

    NaN for a query that is not `blind` (b, h, n) and has no logit above -inf.
    """
    seen = ~scores.isneginf()
    lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1)
    lse = lse.masked_fill(lse.isneginf(), math.nan)
    log_p = scores - lse[..., None]
    weights = log_p.exp()
    # 0 log 0 is 0: what is not seen adds nothing
    entropy = -(weights * log_p.masked_fill(~seen, 0.0)).sum(-1)
    largest = scores.amax(-1)
    if not signed:
        least = scores.masked_fill(~seen, math.inf).amin(-1)
        largest = (largest - least).masked_fill(blind, -math.inf)
    return Statistics(
        entropy.masked_fill(blind, 0.0),
        weights.sum(-2),
        lse.masked_fill(blind, -math.inf),
        largest.masked_fill(lse.isnan(), math.nan).amax(-1),
    )


def statistics(observation: Observation, *, largest: bool = True) -> Statistics:
    """Statistics of all queries and keys; holds b h n m numbers."""
    with exact(observation.rating.query):
        scores = logits(widened(observation.rating), observation.visibility)
    blind = unseeing(scores, observation.visibility)[..., 0]
    found = reduce(scores, blind, signed=observation.signed)
    return found if largest else found._replace(largest=None)
