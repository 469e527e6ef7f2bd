"""Euclidean distance: s_ij = -rate_h |q_i - k_j|.

Source: Kim, Papamakarios, Mnih, arXiv 2006.04710 (there squared: `l2_squared`).
"""

from __future__ import annotations

from typing import Any

from sixfold.attention.score._distance import Distance, build_distance
from sixfold.contracts import Heads


def build(
    heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any
) -> Distance:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    return build_distance(heads, 2, rate, learned=learned, **factory)
