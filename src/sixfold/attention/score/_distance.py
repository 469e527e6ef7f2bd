"""Distances that are no inner products: s_ij = -rate_h ||q_i - k_j||_p, rated in tiles."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sixfold.attention.score._rated import Rated
from sixfold.contracts import Distances, Heads


class Distance(Rated):
    """Negative p-norm of the difference, times a rate."""

    gives = Distances

    def __init__(
        self, heads: Heads, rate: float, p: float, *, learned: bool, **factory: Any
    ) -> None:
        super().__init__(heads, rate, learned=learned, **factory)
        self.p = p
        self.rotation_invariant = p == 2

    def forward(self, query: Tensor, keys: Tensor) -> Distances:
        """The pair itself: nothing is gained by features."""
        return Distances(query, keys, self.rate(), self.p)

    def extra_repr(self) -> str:
        """Shown in the module's printout."""
        return f"p={self.p}"


def spread(d: int, p: float) -> float:
    """Standard deviation, to a factor near 1, of the distance of two random points.

    Both have d independent entries of unit variance. The sum of |u|^p concentrates, so that its
    p-th root deviates by d^(1/p - 1/2); the largest of d entries deviates as an extreme value does.
    """
    if p == math.inf:
        return math.pi / math.sqrt(6 * math.log(2 * d))
    return d ** (1 / p - 0.5)


def build_distance(
    heads: Heads, p: float, rate: float | None, *, learned: bool, **factory: Any
) -> Distance:
    """A distance score of order p whose logits start with a deviation near 1.

    Raises ValueError for p < 1, where there is no triangle inequality and no norm.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not p >= 1:
        raise ValueError(f"p must be a number in [1, inf], got {p!r}")
    start = 1 / spread(heads.head_dim, p) if rate is None else rate
    return Distance(heads, start, float(p), learned=learned, **factory)
