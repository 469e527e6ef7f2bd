"""Manhattan distance: s_ij = -rate_h sum_c |q_ic - k_jc|.

Source of L1 attention: Shu et al., Adder Attention for Vision Transformer, NeurIPS 2021.
"""

from __future__ import annotations

from typing import Any

from sixfold.attention.score._distance import Distance, build_distance
from sixfold.contracts import Heads


def build(
    heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any
) -> Distance:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    return build_distance(heads, 1, rate, learned=learned, **factory)
