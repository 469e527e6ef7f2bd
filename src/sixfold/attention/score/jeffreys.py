"""Jeffreys divergence of diagonal Gaussians: s_ij = -rate_h (KL(p_i || p_j) + KL(p_j || p_i)).

The logarithms cancel; what is left is the inner product of
rate [-(s_i^2 + m_i^2) / 2, -1 / (2 s_i^2), m_i, m_i / s_i^2, -1/2] and
[1 / s_j^2, s_j^2 + m_j^2, m_j / s_j^2, m_j, sum over c of m_jc^2 / s_jc^2].
Source of the divergence: Jeffreys, An invariant form for the prior probability, 1946.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sixfold.attention.score.kl_diagonal import DiagonalKL
from sixfold.contracts import Belief, Features, Heads
from sixfold.ops.attend.features import lift_keys, lift_queries
from sixfold.ops.precision import exact, wide


def moments(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Second moment, precision, and precision times mean."""
    precision = std.pow(-2)
    return std.square() + mean.square(), precision, precision * mean


class Jeffreys(DiagonalKL):
    """Negative symmetric divergence of two beliefs, times a rate.

    float16 needs every feature, such as s_j^2 + m_j^2 and 1 / s_j^2, below 65504: NaN beyond.
    """

    def keys(self, key: Belief) -> Tensor:
        """Both kinds of parameters, and the key's own term."""
        dtype = key.mean.dtype
        with exact(key.mean):
            mean = wide(self.center_keys(key.mean))
            second, precision, pull = moments(mean, wide(key.factor))
            vectors = torch.cat([precision, second, pull, mean], dim=-1)
            return lift_keys(vectors, (pull * mean).sum(-1), dtype)

    def forward(self, query: Belief, keys: Tensor) -> Features:
        """Width 4 d + 1, filled to a multiple of 8."""
        dtype = query.mean.dtype
        with exact(query.mean):
            mean, rate = wide(self.center_queries(query.mean)), self.rounded_rate(dtype)
            second, precision, pull = moments(mean, wide(query.factor))
            vectors = torch.cat([-0.5 * second, -0.5 * precision, mean, pull], dim=-1)
            return Features(lift_queries(rate * vectors, -0.5 * rate, dtype), keys, 1.0)


def build(
    heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any
) -> Jeffreys:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    start = 0.5 * heads.head_dim**-0.5 if rate is None else rate
    return Jeffreys(heads, start, learned=learned, **factory)
