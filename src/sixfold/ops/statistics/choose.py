"""Which implementation takes the statistics: a named one runs or raises, only ``auto`` chooses."""

from __future__ import annotations

import math

import torch

from sixfold.contracts import Observation, Statistics
from sixfold.discover import unknown
from sixfold.ops.statistics import fused, reference, tiled

IMPLEMENTATIONS = {
    "reference": reference.statistics,
    "fused": fused.statistics,
    "tiled": tiled.statistics,
}

DIGITS = 64.0
"""Nats of log-sum-exp up to which its difference with the expected logit keeps four digits."""


def statistics(
    observation: Observation, *, largest: bool = False, impl: str = "auto"
) -> Statistics:
    """Entropy, received weight and log-sum-exp per head and token, without the weights.

    Args:
        observation: a rating and who sees whom.
        largest: also the exact largest logit of each head, which costs a pass in tiles;
            log_sum_exp - log(visible keys) <= largest of a query <= log_sum_exp comes for free.
        impl: ``fused`` (two fused calls: features on a CPU), ``tiled`` (any score) or
            ``reference`` (differentiable, explicit weights); ``auto`` is fused where it can be and
            its digits suffice.

    Raises ValueError for an unknown implementation and for what a named one cannot give.
    """
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(unknown("impl", impl, ("auto", *IMPLEMENTATIONS)))
    query, key = observation.rating.query, observation.rating.key
    if query.numel() == 0 or key.numel() == 0:
        return nothing(observation, largest=largest)
    if impl != "auto":
        return IMPLEMENTATIONS[impl](observation, largest=largest)
    if fused.refusal(observation, largest=largest) is None:
        found = fused.statistics(observation)
        sizes = found.log_sum_exp.masked_fill(found.log_sum_exp.isneginf(), 0.0).abs()
        if (sizes <= DIGITS).all():
            return found
    return tiled.statistics(observation, largest=largest)


def nothing(observation: Observation, *, largest: bool) -> Statistics:
    """What attention does without queries or without keys."""
    query, key = observation.rating.query, observation.rating.key
    (b, h, n), m = query.shape[:3], key.shape[-2]
    none = torch.full((b, h, n), -math.inf, device=query.device)
    top = torch.full((b, h), -math.inf, device=query.device) if largest else None
    return Statistics(torch.zeros_like(none), none.new_zeros(b, h, m), none, top)
