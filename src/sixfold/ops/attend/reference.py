"""What attention means: softmax of a rating over keys, materialised and differentiable twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sixfold.contracts import Distances, Rating, Visibility
from sixfold.geometry.metrics import distance

Metric = Callable[[Tensor, Tensor, float], Tensor]


def restrict(mask: Tensor | None, allowed: Tensor) -> Tensor:
    """A mask, boolean or float or none, narrowed to where `allowed` (boolean) is True."""
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, float("-inf"))


def visible(visibility: Visibility, n: int, m: int, device: torch.device) -> Tensor | None:
    """The mask as one tensor broadcastable to (b, h, n, m); causality is lower-right aligned."""
    if not visibility.is_causal:
        return visibility.mask
    causal = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return restrict(visibility.mask, causal)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a float mask added, or -inf where a boolean one is False."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(scores.dtype)


def logits(rating: Rating, visibility: Visibility, distance: Metric = distance) -> Tensor:
    """The rating where visible, -inf elsewhere; (b, h, n, m).

    scale * <query, key> of features, -rate * ||query - key||_p of distances, which another function
    of the same meaning may compute.
    """
    query, key = rating.query, rating.key
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if isinstance(rating, Distances):
        scores = -rating.rate[:, None, None] * distance(query, key, rating.p)
    else:
        scores = rating.scale * query @ key.transpose(-1, -2)
    return masked(scores, visible(visibility, query.shape[-2], key.shape[-2], query.device))


def unseeing(scores: Tensor, visibility: Visibility) -> Tensor:
    """Rows (b, h, n, 1) that see no key: logits of -inf that a mask made, not an overflow."""
    mask = visible(visibility, *scores.shape[-2:], scores.device)
    if mask is None:
        return torch.zeros_like(scores[..., :1], dtype=torch.bool)
    # the least of a narrow dtype is meant to hide, and added to a logit may overflow
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(scores.dtype).min
    return scores.isneginf().all(-1, keepdim=True) & hidden.all(-1, keepdim=True)


def weights(rating: Rating, visibility: Visibility) -> Tensor:
    """Softmax of the logits over keys; a row that sees nothing is exactly zero. (b, h, n, m).

    NaN where every logit that a row sees overflows to -inf.
    """
    scores = logits(rating, visibility)
    blind = unseeing(scores, visibility)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def attend(rating: Rating, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Weights times values, (b, h, n, d_v); dropout falls on the weights."""
    groups = rating.query.shape[1] // value.shape[1]
    kept = torch.dropout(weights(rating, visibility), dropout, train=dropout > 0)
    return kept @ value.repeat_interleave(groups, dim=1)
