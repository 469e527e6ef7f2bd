"""Distances between points, pair by pair."""

from __future__ import annotations

import math

from torch import Tensor


def distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    """||x_i - y_j||_p: (..., n, d) and (..., m, d) to (..., n, m).

    Where points coincide the subgradient is 0; where features tie for the largest gap (p = inf)
    they share the gradient equally.

    >>> import torch
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
