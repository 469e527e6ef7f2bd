"""What of a token can be averaged: the moments by which a group of tokens becomes one.

A point is its own first moment. A belief N(m, S) has m and S + m m^T; the mean of both over a group
are the moments of the mixture, so the group becomes the Gaussian closest to it in KL(mixture || .).
Source: Bishop, Pattern Recognition and Machine Learning (2006), section 10.7 (moment matching).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sixfold.attention.score.kl import in_lanes, move, of_each
from sixfold.contracts import Belief, Schema
from sixfold.geometry.gaussian import kl, kl_diagonal, whole
from sixfold.geometry.lanes import gram, product
from sixfold.ops.precision import exact, wide

ROUNDED = 1e-14
"""Part of a second moment that float64 may lose, and that a variance cannot be told below."""


def width(schema: Schema, d: int) -> int:
    """Moments of one token.

    >>> width("point", 8), width("diagonal belief", 8), width("belief", 8)
    (8, 16, 44)
    """
    return {"point": d, "diagonal belief": 2 * d, "belief": d + d * (d + 1) // 2}[schema]


def moments(key: Any, schema: Schema) -> Tensor:
    """Moments of tokens in the frame they share, (b, h, n, w): at least float32, beliefs float64.

    A covariance comes back as a difference of second moments, in which narrow digits would cancel.
    """
    if schema == "point":
        return wide(key)
    with exact(key.mean):
        mean, factor = key.mean.double(), key.factor.double()
        if schema == "diagonal belief":
            return torch.cat([mean, factor.square() + mean.square()], dim=-1)
        root = in_lanes(factor)
        if key.inverse is not None:
            mean, root = move(key.inverse, mean), product(of_each(key.inverse, mean), root)
        second = gram(torch.cat([root, in_lanes(mean[..., None])], dim=1))
        return torch.cat([mean, second.unflatten(0, mean.shape[:-1])], dim=-1)


def described(moments: Tensor, schema: Schema, d: int, dtype: torch.dtype) -> Any:
    """The tokens that have these moments: points, or beliefs in the frame they share.

    Where a place is empty, so that its moments are zero, a belief is N(0, 1).
    """
    if schema == "point":
        return moments.to(dtype)
    with exact(moments):
        mean, second = moments[..., :d], moments[..., d:]
        empty = (second == 0).all(-1, keepdim=True)
        if schema == "diagonal belief":
            variance = torch.maximum(second - mean.square(), ROUNDED * second)
            deviation = variance.masked_fill(empty, 1.0).sqrt()
            return Belief(mean.to(dtype), deviation.to(dtype))
        both = whole(second, d)
        covariance = both - mean[..., :, None] * mean[..., None, :]
        lost = ROUNDED * both.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        covariance = covariance + torch.diag_embed(lost.expand_as(mean))
        eye = torch.eye(d, dtype=mean.dtype, device=mean.device)
        covariance = torch.where(empty[..., None], eye, covariance)
        return Belief(mean.to(dtype), torch.linalg.cholesky(covariance).to(dtype))


def divergence(one: Tensor, other: Tensor, schema: Schema, d: int) -> Tensor:
    """KL(p || q) + KL(q || p) of tokens with these moments, nats, (...).

    Points are taken for Gaussians with unit covariance: their squared distance.
    """
    if schema == "point":
        return (one - other).square().sum(-1)
    p, q = (described(given, schema, d, given.dtype) for given in (one, other))
    of = kl_diagonal if schema == "diagonal belief" else kl
    return of(p.mean, p.factor, q.mean, q.factor) + of(q.mean, q.factor, p.mean, p.factor)
