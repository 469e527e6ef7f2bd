"""Squared Euclidean distance: s_ij = -rate_h |q_i - k_j|^2, a Gaussian kernel before the softmax.

Without its query-only term it is the inner product of 2 rate [q, 1] and [k, -|k|^2 / 2].
Source: Kim, Papamakarios, Mnih, The Lipschitz Constant of Self-Attention, arXiv 2006.04710.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sixfold.attention.score._rated import Centred
from sixfold.contracts import Features, Heads
from sixfold.ops.attend.features import lift_keys, lift_queries
from sixfold.ops.precision import exact, wide


class SquaredL2(Centred):
    """Negative squared distance times a rate; 1 / (2 sqrt(d)) keeps the dot product inside it.

    float16 needs |k|^2 / 2 and 2 rate |q| below 65504, relative to the centre: NaN beyond.
    """

    rotation_invariant = True

    def keys(self, key: Tensor) -> Tensor:
        """Centred keys and half their squared norm, negative."""
        with exact(key):
            near = self.center_keys(key)
            return lift_keys(near, -0.5 * wide(near).square().sum(-1), key.dtype)

    def forward(self, query: Tensor, keys: Tensor) -> Features:
        """Features of width d + 1, filled to a multiple of 8."""
        with exact(query):
            twice = 2 * self.rounded_rate(query.dtype)
            lifted = lift_queries(twice * self.center_queries(query), twice, query.dtype)
        return Features(lifted, keys, 1.0)


def build(
    heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any
) -> SquaredL2:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    start = 0.5 * heads.head_dim**-0.5 if rate is None else rate
    return SquaredL2(heads, start, learned=learned, **factory)
