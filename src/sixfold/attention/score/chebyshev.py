"""Chebyshev distance: s_ij = -rate_h max_c |q_ic - k_jc|."""

from __future__ import annotations

import math
from typing import Any

from sixfold.attention.score._distance import Distance, build_distance
from sixfold.contracts import Heads


def build(
    heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any
) -> Distance:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    return build_distance(heads, math.inf, rate, learned=learned, **factory)
