"""Divergence of diagonal Gaussians: s_ij = -rate_h KL(N(m_i, diag s_i^2) || N(m_j, diag s_j^2)).

Without its query-only term it is the inner product of rate [-(s_i^2 + m_i^2) / 2, m_i, -1/2] and
[1 / s_j^2, m_j / s_j^2, sum over c of m_jc^2 / s_jc^2 + log s_jc^2]: a Gaussian is an exponential
family, and its divergence is linear in the moments of the first argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sixfold.attention.score._rated import Centred
from sixfold.contracts import Belief, Features, Heads
from sixfold.ops.attend.features import lift_keys, lift_queries
from sixfold.ops.precision import exact, wide


class DiagonalKL(Centred):
    """Negative divergence from the query's belief to the key's, times a rate.

    float16 needs every feature, such as rate (s_i^2 + m_i^2) / 2 and 1 / s_j^2, below 65504: NaN
    beyond.
    """

    schema = "diagonal belief"

    def located(self, key: Belief) -> Tensor:
        """The means."""
        return key.mean

    def keys(self, key: Belief) -> Tensor:
        """Natural parameters, centred, and the log-partition."""
        dtype = key.mean.dtype
        with exact(key.mean):
            mean, precision = wide(self.center_keys(key.mean)), wide(key.factor).pow(-2)
            pull = precision * mean
            own = (pull * mean - precision.log()).sum(-1)
            return lift_keys(torch.cat([precision, pull], dim=-1), own, dtype)

    def forward(self, query: Belief, keys: Tensor) -> Features:
        """Moments against natural parameters: width 2 d + 1, filled to a multiple of 8."""
        dtype = query.mean.dtype
        with exact(query.mean):
            mean, rate = wide(self.center_queries(query.mean)), self.rounded_rate(dtype)
            second = wide(query.factor).square() + mean.square()
            moments = torch.cat([-0.5 * second, mean], dim=-1)
            return Features(lift_queries(rate * moments, -0.5 * rate, dtype), keys, 1.0)


def build(
    heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any
) -> DiagonalKL:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    start = heads.head_dim**-0.5 if rate is None else rate
    return DiagonalKL(heads, start, learned=learned, **factory)
