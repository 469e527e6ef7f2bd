"""Statistics of attention of any score, some queries at a time: memory linear in the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.contracts import Observation, Statistics
from sixfold.ops.attend.choose import NUMBA
from sixfold.ops.attend.reference import logits, unseeing
from sixfold.ops.distance.tiled import METRICS
from sixfold.ops.precision import exact
from sixfold.ops.statistics.reference import reduce, widened
from sixfold.ops.statistics.sampled import at

ROWS = 128
"""Queries at a time."""


def distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Distances of heads, (b, h, n, d) and (b, h, m, d), by the fastest primitive at hand."""
    metric = METRICS["numba" if NUMBA and x.device.type == "cpu" else "tiled"]
    found = metric.distance(x.flatten(0, 1), y.flatten(0, 1).contiguous(), p)
    return found.unflatten(0, x.shape[:2])


@torch.no_grad()
def statistics(observation: Observation, *, largest: bool = True) -> Statistics:
    """Same as the reference, without its gradient, and never more than `ROWS` rows of weights."""
    rating = observation.rating
    places = torch.arange(rating.query.shape[-2], device=rating.query.device)
    parts = []
    with exact(rating.query):
        whole = observation._replace(rating=widened(rating))
        for rows in places.split(ROWS):
            few = at(whole, rows)
            scores = logits(few.rating, few.visibility, distance)
            blind = unseeing(scores, few.visibility)[..., 0]
            parts.append(reduce(scores, blind, signed=observation.signed))
    entropy, received, lse, top = zip(*parts, strict=True)
    return Statistics(
        torch.cat(entropy, -1),
        torch.stack(received).sum(0),
        torch.cat(lse, -1),
        torch.stack(top).amax(0) if largest else None,
    )
