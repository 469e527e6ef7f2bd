"""What attention does, token by token, from rows of logits: memory linear in the tokens.

With the weights p_ij of query i over the keys j, of which it sees v_i:

* entropy_i = -sum_j p_ij log p_ij / log v_i: 0 is one key, 1 is all alike.
* sparsity_i = 1 - k_i / v_i, where k_i is the least number of keys that hold `HELD` of the weight.
* distance_i = sum_j p_ij |i - j|, in tokens; not defined where keys are other tokens than queries.
* first_i = p_i of the first token: what a sink receives.
* log_sum_exp_i = log sum_j exp(logit_ij), in nats; not defined for a score known only up to a term
  of the query.
* the redundancy of heads a and b is the mean over queries of <p_a, p_b> / (||p_a|| ||p_b||).

Counted are the queries of tokens that are no padding and that see at least two keys: with one key
nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from sixfold.contracts import Observation
from sixfold.ops.attend.reference import logits
from sixfold.ops.distance.tiled import distance
from sixfold.ops.statistics.reference import widened
from sixfold.ops.statistics.sampled import at

STATISTICS = ("entropy", "sparsity", "distance", "first", "log_sum_exp")

HELD = 0.99
"""The share of a query's weight that counts as all of it."""

CELLS = 2**20
"""Weights held at a time, unless one query of every head and sequence is more than that."""

Rows = Callable[[Tensor], Tensor]
"""Logits (b, h, r, m) of some queries by their numbers (r,), -inf where a key is not visible."""


class Sight(NamedTuple):
    """What a layer did in one pass.

    shape is (b, h, n, m). tokens (b, m) is True where a key is no padding, None where all are.
    together: queries are the last n of the keys' own tokens. signed: as of a score.
    """

    rows: Rows
    shape: tuple[int, int, int, int]
    tokens: Tensor | None
    together: bool
    signed: bool


def sight(observation: Observation, tokens: Tensor | None, *, together: bool) -> Sight:
    """What a rating and a visibility amount to."""
    rating = observation.rating
    whole = observation._replace(rating=widened(rating))

    def rows(numbers: Tensor) -> Tensor:
        few = at(whole, numbers)
        return logits(few.rating, few.visibility, distance)

    shape = (*rating.query.shape[:3], rating.key.shape[-2])
    return Sight(rows, shape, tokens, together, observation.signed)


def tokens_of(mask: Tensor | None) -> Tensor | None:
    """Which keys some query of some head may see, (b or 1, m); the others are padding."""
    if mask is None:
        return None
    allowed = mask if mask.dtype == torch.bool else ~mask.isneginf()
    return allowed[(None,) * (4 - mask.ndim)].any(dim=(1, 2))


@dataclass
class Tally:
    """Sums over the counted queries, in float64: what is needed for means and their spread.

    count (h,); total and square (statistics, h); largest (h,); alike and pairs (h, h).
    """

    count: Tensor
    total: Tensor
    square: Tensor
    largest: Tensor
    alike: Tensor
    pairs: Tensor

    def __add__(self, other: Tally) -> Tally:
        """The tally of both."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Tally(**sums | {"largest": torch.maximum(self.largest, other.largest)})


def spaced(n: int, queries: int | None, device: torch.device) -> Tensor:
    """The numbers of at most so many evenly spaced queries, the last one among them."""
    if queries is None or queries >= n:
        return torch.arange(n, device=device)
    return torch.linspace(n - 1, 0, queries + 1, device=device)[:-1].round().long().flip(0)


@torch.no_grad()
def measure(seen: Sight, queries: int | None, device: torch.device) -> Tally:
    """The tally of one pass through a layer, in tiles of at most `CELLS` weights."""
    b, h, n, m = seen.shape
    numbers = spaced(n, queries, device)
    with torch.autocast(device.type, enabled=False):
        tiles = numbers.split(max(1, CELLS // (b * h * m)))
        tallies = [tally(seen, tile) for tile in tiles]
    return sum(tallies[1:], tallies[0])


def tally(seen: Sight, numbers: Tensor) -> Tally:
    """The tally of some queries."""
    scores = seen.rows(numbers)
    visible = scores.isneginf().logical_not_()
    count = visible.sum(-1, dtype=scores.dtype)
    is_token = query_tokens(seen, numbers)
    largest = top(scores, visible, signed=seen.signed).masked_fill(~is_token, -torch.inf)
    # a row that sees nothing is left out: what it holds must only be finite
    log_p = scores.masked_fill(count[..., None] == 0, 0.0).log_softmax(-1)
    weights = log_p.exp()
    nothing = torch.full_like(largest, torch.nan)
    values = torch.stack([
        -(weights * log_p.masked_fill(~visible, 0.0)).sum(-1) / count.clamp(min=2).log(),
        1 - needed(weights) / count.clamp(min=1),
        (weights * apart(seen, numbers)).sum(-1) if seen.together else nothing,
        first(seen, weights),
        scores.logsumexp(-1) if seen.signed else nothing,
    ])  # fmt: skip
    counted = (count > 1) & is_token
    values = values.masked_fill(~counted, 0.0).double()
    unit = weights / weights.norm(dim=-1, keepdim=True)
    unit = unit.masked_fill(~counted[..., None], 0.0).transpose(0, 1).flatten(1)
    present = counted.double().transpose(0, 1).flatten(1)
    return Tally(
        count=present.sum(-1),
        total=values.sum((1, 3)),
        square=values.square().sum((1, 3)),
        largest=largest.double().amax((0, 2)),
        alike=(unit @ unit.T).double(),
        pairs=present @ present.T,
    )


def query_tokens(seen: Sight, numbers: Tensor) -> Tensor:
    """Which queries are tokens and no padding, (b or 1, 1, r)."""
    _, _, n, m = seen.shape
    if seen.tokens is None or not seen.together:
        return torch.ones(1, 1, len(numbers), dtype=torch.bool, device=numbers.device)
    return seen.tokens[:, None, numbers + (m - n)]


def top(scores: Tensor, visible: Tensor, *, signed: bool) -> Tensor:
    """The largest logit of each query, or its range where the score has no sign; (b, h, r)."""
    greatest = scores.amax(-1)
    if signed:
        return greatest
    least = scores.masked_fill(~visible, torch.inf).amin(-1)
    return (greatest - least).masked_fill(~visible.any(-1), -torch.inf)


def needed(weights: Tensor) -> Tensor:
    """The least number of keys that hold `HELD` of a query's weight, (b, h, r)."""
    held = weights.sort(-1, descending=True).values.cumsum(-1)
    # the margin of rounding in the sum of many small weights
    return 1 + (held[..., :-1] < HELD - 1e-6).sum(-1)


def apart(seen: Sight, numbers: Tensor) -> Tensor:
    """|i - j| in tokens, (r, m)."""
    _, _, n, m = seen.shape
    keys = torch.arange(m, device=numbers.device)
    return (numbers[:, None] + (m - n) - keys).abs()


def first(seen: Sight, weights: Tensor) -> Tensor:
    """What each query gives to the first token of its sequence, (b, h, r)."""
    if seen.tokens is None:
        return weights[..., 0]
    start = seen.tokens.int().argmax(-1)[:, None, None, None]
    return weights.gather(-1, start.expand(*weights.shape[:-1], 1))[..., 0]
