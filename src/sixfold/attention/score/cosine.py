"""Cosine similarity with a learned temperature: s_ij = t_h <q_i, k_j> / (|q_i| |k_j|).

Source: Liu et al., Swin Transformer V2, arXiv 2111.09883, section 3.2 (t starts at 10, at most
100); Henry et al., QKNorm, arXiv 2010.04245.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from sixfold.attention.score._rated import Rated
from sixfold.contracts import Features, Heads

START, LARGEST = 10.0, 100.0


class Cosine(Rated):
    """Cosine similarity times a per-head temperature in (0, 100]."""

    rotation_invariant = True
    signed = True

    def rate(self) -> Tensor:
        """t_h, shape (h,)."""
        return self.log_rate.exp().clamp(max=LARGEST) * self.power.exp2()

    def keys(self, key: Tensor) -> Tensor:
        """Unit keys."""
        return normalize(key, dim=-1)

    def forward(self, query: Tensor, keys: Tensor) -> Features:
        """Unit queries times the temperature."""
        unit = normalize(query, dim=-1) * self.rate()[:, None, None].to(query.dtype)
        return Features(unit, keys, 1.0)


def build(heads: Heads, *, rate: float = START, learned: bool = True, **factory: Any) -> Cosine:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    score = Cosine(heads, rate, learned=learned, **factory)
    if rate > LARGEST:
        raise ValueError(f"rate must be at most {LARGEST}, got {rate}")
    return score
