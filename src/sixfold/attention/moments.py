"""What of a token can be averaged: the moments by which a group of tokens becomes one.

A point is its own first moment. A belief N(m, S) has m, S and m m^T; their means over a group give
those of the mixture, mean(m) and mean(S) + (mean(m m^T) - mean(m) mean(m)^T), so the group becomes
the Gaussian closest to it in KL(mixture || .). S is kept apart from m m^T, so that a belief that is
narrow and far from 0 comes back as it was: the difference is 0 to the last bit for a group of one.
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
"""Part of m m^T that float64 may lose, added where a covariance has no root without it."""


def width(schema: Schema, d: int) -> int:
    """Moments of one token.

    >>> width("point", 8), width("diagonal belief", 8), width("belief", 8)
    (8, 24, 80)
    """
    return {"point": d, "diagonal belief": 3 * d, "belief": d + d * (d + 1)}[schema]


def moments(key: Any, schema: Schema) -> Tensor:
    """Moments of tokens in the frame they share, (b, h, n, w): at least float32, beliefs float64.

    The spread of a group comes back as a difference, in which narrow digits would cancel.
    """
    if schema == "point":
        return wide(key)
    with exact(key.mean):
        mean, factor = key.mean.double(), key.factor.double()
        if schema == "diagonal belief":
            return torch.cat([mean, factor.square(), mean.square()], dim=-1)
        root = in_lanes(factor)
        if key.inverse is not None:
            mean, root = move(key.inverse, mean), product(of_each(key.inverse, mean), root)
        halves = (
            gram(part).unflatten(0, mean.shape[:-1]) for part in (root, in_lanes(mean[..., None]))
        )
        return torch.cat([mean, *halves], dim=-1)


def gaussians(moments: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Means (..., d) and covariances (..., d, d) of moments of beliefs."""
    mean, *halves = moments.split([d, *[d * (d + 1) // 2] * 2], dim=-1)
    own, square = (whole(half, d) for half in halves)
    return mean, own + (square - mean[..., :, None] * mean[..., None, :])


def factors(covariance: Tensor, mean: Tensor) -> Tensor:
    """Lower Cholesky factors (..., d, d), NaN of what is no covariance, even after rounding."""
    with torch.no_grad():
        second = mean.square().sum(-1) + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        short = torch.linalg.cholesky_ex(covariance).info != 0
        shift = torch.where(short, ROUNDED * second, 0.0)[..., None].expand_as(mean)
    factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag_embed(shift))
    return factor.masked_fill((failed != 0)[..., None, None], torch.nan)


def described(moments: Tensor, schema: Schema, d: int, dtype: torch.dtype) -> Any:
    """The tokens that have these moments: points, or beliefs in the frame they share.

    Where a place is empty, so that its moments are zero, a belief is N(0, 1). A covariance is known
    to float64: a factor whose condition number is beyond 1e7 does not come back as it was.
    """
    if schema == "point":
        return moments.to(dtype)
    with exact(moments):
        if schema == "diagonal belief":
            mean, own, square = moments.split(d, dim=-1)
            variance = own + (square - mean.square()).clamp(min=0.0)
            return Belief(mean.to(dtype), variance.masked_fill(own == 0, 1.0).sqrt().to(dtype))
        mean, covariance = gaussians(moments, d)
        empty = (moments == 0).all(-1)[..., None, None]
        eye = torch.eye(d, dtype=mean.dtype, device=mean.device)
        covariance = torch.where(empty, eye, covariance)
        return Belief(mean.to(dtype), factors(covariance, mean).to(dtype))


def divergence(one: Tensor, other: Tensor, schema: Schema, d: int) -> Tensor:
    """KL(p || q) + KL(q || p) of tokens with these moments, nats, (...).

    Points are taken for Gaussians with unit covariance: their squared distance. What overflows, or
    is no number, is the largest: infinitely far is who agrees with nobody.
    """
    if schema == "point":
        found = (one - other).square().sum(-1)
    else:
        p, q = (described(given, schema, d, given.dtype) for given in (one, other))
        of = kl_diagonal if schema == "diagonal belief" else kl
        found = of(p.mean, p.factor, q.mean, q.factor) + of(q.mean, q.factor, p.mean, p.factor)
    most = torch.finfo(found.dtype).max
    return found.nan_to_num(nan=most, posinf=most)
