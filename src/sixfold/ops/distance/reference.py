"""What attention by distance means: softmax of -rate ||q - k||_p, pair by pair, materialised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sixfold.contracts import Distances, Visibility
from sixfold.ops.attend.reference import visible

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(rating: Distances, value: Tensor) -> None:
    """Raise for a p, a dtype or a number of heads that no implementation serves.

    Raises:
        ValueError: p below 1 or not a number, or query heads that key heads do not divide.
        TypeError: a dtype that is not floating, or queries, keys and values of different dtypes.
    """
    query, key, _, p = rating
    if not p >= 1:
        raise ValueError(f"p must be in [1, inf], got {p}")
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"query must be one of {names}, got {query.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}"
        )
    if query.shape[1] % key.shape[1] or query.shape[1] % value.shape[1]:
        raise ValueError(
            f"key heads {key.shape[1]} and value heads {value.shape[1]} must divide the "
            f"{query.shape[1]} query heads"
        )


def distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    """||x_i - y_j||_p: (..., n, d) and (..., m, d) to (..., n, m).

    Where points coincide the subgradient is 0; where features tie for the largest gap (p = inf)
    they share the gradient equally.

    >>> distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, -4.0]]), 2.0)
    tensor([[5.]])
    """
    gaps = (x[..., :, None, :] - y[..., None, :, :]).abs()
    if p == 1:
        return gaps.sum(-1)
    if p == math.inf:
        return gaps.amax(-1)
    # powers of gap / largest gap neither overflow nor vanish; the scale cancels, so it is constant
    top = gaps.detach().amax(-1)
    scale = top.masked_fill((top == 0) | top.isinf(), 1.0)
    total = (gaps / scale[..., None]).pow(p).sum(-1)
    same = top == 0
    return (scale * total.masked_fill(same, 1.0).pow(1 / p)).masked_fill(same, 0.0)


def logits(rating: Distances, visibility: Visibility) -> Tensor:
    """-rate_h ||q_i - k_j||_p where visible, -inf elsewhere; (b, h, n, m)."""
    query, key, rate, p = rating
    groups = query.shape[1] // key.shape[1]
    scores = -rate[:, None, None] * distance(query, key.repeat_interleave(groups, dim=1), p)
    scores = scores.to(query.dtype)
    mask = visible(visibility, query.shape[-2], key.shape[-2], query.device)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask.to(scores.dtype)


def weights(rating: Distances, visibility: Visibility) -> Tensor:
    """Softmax of the logits over keys; a row that sees nothing is exactly zero. (b, h, n, m)."""
    scores = logits(rating, visibility)
    blind = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def attend(rating: Distances, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Attention by distance: O_i = sum over j of softmax_j(-rate_h ||q_i - k_j||_p) v_j.

    Args:
        rating: query (b, h, n, d), key (b, h_kv, m, d), rate (h,) and p in [1, inf].
        value: (b, h_kv, m, d_v).
        visibility: which keys each query sees.
        dropout: share of weights dropped.

    Returns:
        (b, h, n, d_v); rows that see no key are exactly zero.

    Raises:
        ValueError: for p < 1 and heads that do not divide.
        TypeError: for a dtype that is not floating.

    Differentiable any number of times; holds b h n m d numbers.

    >>> x = torch.tensor([[[[0.0], [1.0]]]])
    >>> rating = Distances(x, x, rate=torch.tensor([math.log(3)]), p=1.0)
    >>> attend(rating, x, Visibility(None, is_causal=False), 0.0).flatten()
    tensor([0.2500, 0.7500])
    """
    check(rating, value)
    groups = rating.query.shape[1] // value.shape[1]
    kept = torch.dropout(weights(rating, visibility), dropout, train=dropout > 0)
    return kept @ value.repeat_interleave(groups, dim=1)
