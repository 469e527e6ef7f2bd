"""Minkowski distance: s_ij = -rate_h (sum_c |q_ic - k_jc|^p)^(1/p), p in [1, inf]."""

from __future__ import annotations

from typing import Any

from sixfold.attention.score._distance import Distance, build_distance
from sixfold.contracts import Heads


def build(
    heads: Heads, *, p: float = 3.0, rate: float | None = None, learned: bool = True, **factory: Any
) -> Distance:
    """The score of `heads`; options ``p``, ``rate``, where it starts, and ``learned``."""
    return build_distance(heads, p, rate, learned=learned, **factory)
