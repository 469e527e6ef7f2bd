"""Squared 2-Wasserstein distance of diagonal Gaussians: s_ij = -rate_h (|m_i-m_j|^2 + |s_i-s_j|^2).

A squared Euclidean distance of [m, s], and computed as one.
Source: Fan et al., Sequential Recommendation via Stochastic Self-Attention, arXiv 2201.06035.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sixfold.attention.score.kl_diagonal import DiagonalKL
from sixfold.contracts import Belief, Features, Heads
from sixfold.ops.attend.features import lift_keys, lift_queries
from sixfold.ops.precision import exact, wide


class Wasserstein2(DiagonalKL):
    """Negative squared transport distance of two beliefs, times a rate.

    float16 needs (|m_j|^2 + |s_j|^2) / 2 and 2 rate [m_i, s_i] below 65504: NaN beyond.
    """

    def keys(self, key: Belief) -> Tensor:
        """Centred means, deviations, and half their squared norm, negative."""
        dtype = key.mean.dtype
        with exact(key.mean):
            place = torch.cat([self.center_keys(key.mean), key.factor], dim=-1)
            return lift_keys(place, -0.5 * wide(place).square().sum(-1), dtype)

    def forward(self, query: Belief, keys: Tensor) -> Features:
        """Width 2 d + 1, filled to a multiple of 8."""
        dtype = query.mean.dtype
        with exact(query.mean):
            twice = 2 * self.rounded_rate(dtype)
            place = torch.cat([self.center_queries(query.mean), query.factor], dim=-1)
            return Features(lift_queries(twice * place, twice, dtype), keys, 1.0)


def build(
    heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any
) -> Wasserstein2:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    start = 0.5 * heads.head_dim**-0.5 if rate is None else rate
    return Wasserstein2(heads, start, learned=learned, **factory)
