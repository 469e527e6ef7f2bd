"""Beliefs with diagonal covariance: mean = W_m x, std = FLOOR + softplus(W_s x + c).

The constant makes a fresh belief's deviation 1 on average.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from sixfold.attention.projection._belief import FLOOR, START, BeliefProjection
from sixfold.contracts import Heads


class DiagonalGaussian(BeliefProjection):
    """A mean and a deviation per coordinate for each query and key, and a plain value."""

    schema = "diagonal belief"
    ordered = None

    def shape(self, raw: Tensor) -> Tensor:
        """Deviations (b, h, n, d), at least FLOOR."""
        return FLOOR + softplus(raw + START)


def build(heads: Heads, *, tied: bool = False, **factory: object) -> DiagonalGaussian:
    """The projection of `heads`; ``tied``: a token has one belief, as a query and as a key."""
    return DiagonalGaussian(heads, heads.head_dim, tied=tied, **factory)
