"""Logits that are more than a rating: capped ones, and a sink beside the keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sixfold.contracts import Features, Rating, Visibility
from sixfold.ops.attend import reference
from sixfold.ops.attend.features import lift_keys, lift_queries


def reshaped(
    rating: Rating,
    value: Tensor,
    visibility: Visibility,
    cap: float | None,
    sinks: Tensor | None,
) -> tuple[Rating, Tensor, Visibility]:
    """Cap the logits by cap tanh(logit / cap), and add a key of logit sinks_h and value 0.

    Args:
        rating: `Features` whose logits lack no term, or `Distances`.
        value: (b, h_kv, m, d_v).
        visibility: which keys each query sees.
        cap: positive, or None. Capped logits are no inner product: all of them are held at once.
        sinks: (h,) logits, or None. The sink comes first, so that causality, counted from the last
            key, stays what it was. Beside distances all logits are held at once.

    Source: Gemma 2, arXiv 2408.00118, section 2 (capping); Agarwal et al., gpt-oss, arXiv
    2508.10925, section 2.2 (sinks).
    """
    if cap is not None or (sinks is not None and not isinstance(rating, Features)):
        rating, visibility = explicit(rating, visibility, cap)
    if sinks is None:
        return rating, value, visibility
    mask = visibility.mask
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], value.shape[-2])
        mask = pad(mask, (1, 0), value=mask.dtype == torch.bool)
    return with_sink(rating, sinks), pad(value, (0, 0, 1, 0)), visibility._replace(mask=mask)


def explicit(
    rating: Rating, visibility: Visibility, cap: float | None
) -> tuple[Features, Visibility]:
    """The same logits, capped, held as a mask (b, h, n, m) over features that are zero."""
    logits = reference.logits(rating, Visibility(None, is_causal=False))
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    mask = reference.visible(visibility, *logits.shape[2:], logits.device)
    empty = [torch.zeros_like(points[..., :1]) for points in (rating.query, rating.key)]
    return Features(*empty, 1.0), Visibility(reference.masked(logits, mask), is_causal=False)


def with_sink(rating: Features, sinks: Tensor) -> Features:
    """One more key, before the others, that head h rates sinks_h whatever the query."""
    query, key, scale = rating
    own = torch.zeros_like(key[..., 0])
    own, key = pad(own, (1, 0), value=1.0), pad(key, (0, 0, 1, 0))
    weight = (sinks / scale)[:, None, None]
    lifted = lift_queries(query, weight, query.dtype), lift_keys(key, own, key.dtype)
    return Features(*lifted, scale)
