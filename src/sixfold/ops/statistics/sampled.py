"""Statistics of attention per head, from the ratings of a few queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sixfold.contracts import Observation, Visibility
from sixfold.ops.attend.reference import logits, restrict, unseeing
from sixfold.ops.precision import exact

QUERIES = 64


def at(observation: Observation, rows: Tensor) -> Observation:
    """The same attention of some of its queries, by their numbers."""
    rating, (mask, is_causal) = observation.rating, observation.visibility
    n, m = rating.query.shape[-2], rating.key.shape[-2]
    if mask is not None and mask.shape[-2] != 1:
        mask = mask[..., rows, :]
    if is_causal:
        earlier = torch.arange(m, device=rows.device) <= rows[:, None] + (m - n)
        mask = restrict(mask, earlier)
    few = rating._replace(query=rating.query[:, :, rows])
    return Observation(few, Visibility(mask, is_causal=False), observation.signed)


def sampled(observation: Observation, queries: int = QUERIES) -> Observation:
    """The first sequence of the batch at up to `queries` evenly spaced queries, and the last."""
    rating, (mask, is_causal) = observation.rating, observation.visibility
    n = rating.query.shape[-2]
    rows = torch.linspace(n - 1, 0, min(queries, n), device=rating.query.device).round().long()
    first = rating._replace(query=rating.query[:1], key=rating.key[:1])
    mask = mask if mask is None or mask.ndim < 4 else mask[:1]
    return at(Observation(first, Visibility(mask, is_causal), observation.signed), rows)


def redundancy(weights: Tensor, several: Tensor) -> Tensor:
    """How much each head is like the other head that is most like it, (h,).

    weights (b, h, n, m); several (b, h, n) is True for the queries that count.
    """
    unit = torch.nn.functional.normalize(weights, dim=-1).masked_fill(~several[..., None], 0.0)
    unit, present = (part.transpose(0, 1).flatten(1) for part in (unit, several.to(unit.dtype)))
    alike = unit @ unit.T / (present @ present.T).clamp(min=1)
    own = torch.eye(len(alike), dtype=torch.bool, device=alike.device)
    return alike.masked_fill(own, 0.0).amax(-1)


class HeadStatistics(NamedTuple):
    """Of every head, each (h,), in float32."""

    largest: Tensor
    entropy: Tensor
    redundancy: Tensor


def head_statistics(observation: Observation) -> HeadStatistics:
    """Largest logit, normalised entropy and redundancy of every head.

    Where the score has no sign the largest logit says nothing, and its place is taken by the range:
    the largest difference between two logits of one query.

    entropy = mean over queries of -sum_j p_j log p_j / log(visible keys), over the queries that see
    at least two keys; 0 is one key, 1 is all alike, and NaN where all that a query sees is -inf.
    redundancy = largest over other heads of the mean over queries of <p_a, p_b> / (|p_a| |p_b|): 1
    is a head that another repeats, 0 where there is no other. Differentiable. The queries are those
    of `sampled`; pass one of its results to measure them.
    """
    rating = observation.rating
    with exact(rating.query):
        whole = rating._replace(query=rating.query.float(), key=rating.key.float())
        scores = logits(whole, observation.visibility)
    blind = unseeing(scores, observation.visibility)[..., 0]
    seen = ~scores.isneginf()
    count = seen.sum(-1)
    lost = ~blind & (count == 0)
    largest = scores.amax(-1)
    if not observation.signed:
        # a query that sees nothing has no range: inf - inf is kept out of the maximum
        least = scores.masked_fill(~seen, float("inf")).amin(-1)
        largest = (largest - least).masked_fill(blind, 0.0)
    largest = largest.masked_fill(lost, math.nan).amax(dim=(0, 2))
    log_p = scores.masked_fill(blind[..., None], 0.0).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(~seen, 0.0)).sum(-1)
    several = (count > 1) | lost
    share = torch.where(several, entropy / count.clamp(min=2).log(), 0.0)
    counted = several.sum(dim=(0, 2)).clamp(min=1)
    entropy = share.sum(dim=(0, 2)) / counted
    return HeadStatistics(largest, entropy, redundancy(log_p.exp(), several))


def spectra(weights: Tensor) -> tuple[Tensor, Tensor]:
    """sigma_max and condition number sigma_max / sigma_min of each matrix (h, d, d_model).

    From the eigenvalues of the Gram matrix W W^T in float64, which squares the condition number:
    beyond 1e7 the figure only says "singular".
    """
    wide = weights.detach().double()
    gram = wide @ wide.transpose(-1, -2)
    finite = gram.isfinite().all(-1).all(-1)
    # LAPACK refuses what is not finite: such a matrix has no singular values
    squared = torch.linalg.eigvalsh(gram.where(finite[..., None, None], 0.0)).clamp(min=0)
    squared = squared.where(finite[..., None], torch.nan)
    largest, least = squared[..., -1].sqrt(), squared[..., 0].sqrt()
    floor = largest * math.sqrt(torch.finfo(torch.float64).eps)
    return largest, largest / torch.maximum(least, floor.clamp(min=torch.finfo(torch.float64).tiny))
