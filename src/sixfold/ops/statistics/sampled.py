"""Statistics of attention per head, from the ratings of a few queries."""

from __future__ import annotations

import math

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


def head_statistics(observation: Observation) -> tuple[Tensor, Tensor]:
    """Largest logit and normalised entropy of every head, each (h,), in float32.

    Where the score has no sign the largest logit says nothing, and its place is taken by the range:
    the largest difference between two logits of one query.

    entropy = mean over queries of -sum_j p_j log p_j / log(visible keys), over the queries that see
    at least two keys; 0 is one key, 1 is all alike, and NaN where all that a query sees is -inf.
    Differentiable. The queries are those of `sampled`; pass one of its results to measure them.
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
    return largest, share.sum(dim=(0, 2)) / several.sum(dim=(0, 2)).clamp(min=1)


def spectra(weights: Tensor) -> tuple[Tensor, Tensor]:
    """sigma_max and condition number sigma_max / sigma_min of each matrix (h, d, d_model).

    From the eigenvalues of the Gram matrix W W^T in float64, which squares the condition number:
    beyond 1e7 the figure only says "singular".
    """
    wide = weights.detach().double()
    squared = torch.linalg.eigvalsh(wide @ wide.transpose(-1, -2)).clamp(min=0)
    largest, least = squared[..., -1].sqrt(), squared[..., 0].sqrt()
    floor = largest * math.sqrt(torch.finfo(torch.float64).eps)
    return largest, largest / torch.maximum(least, floor.clamp(min=torch.finfo(torch.float64).tiny))
