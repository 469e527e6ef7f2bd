"""Cosine similarity with a learned temperature: s_ij = t_h <q_i, k_j> / (|q_i| |k_j|).

Source: Liu et al., Swin Transformer V2, arXiv 2111.09883, section 3.2 (t starts at 10, at most
100); Henry et al., QKNorm, arXiv 2010.04245.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sixfold.contracts import Features, Heads

START, LARGEST = 10.0, 100.0


class Cosine(nn.Module):
    """Cosine similarity times a per-head temperature in (0, 100]."""

    rotation_invariant = True

    def __init__(self, heads: Heads, **factory: object) -> None:
        super().__init__()
        start = torch.full((heads.num_heads,), math.log(START), **factory)
        self.log_temperature = nn.Parameter(start)
        # whole powers of two live apart from the learned part: taking one back is exact
        self.register_buffer("power", torch.zeros(heads.num_heads, **factory))

    def temperature(self) -> Tensor:
        """t_h, shape (h,)."""
        return self.log_temperature.exp().clamp(max=LARGEST) * self.power.exp2()

    def forward(self, query: Tensor, key: Tensor) -> Features:
        """Unit keys, and unit queries times the temperature."""
        query = normalize(query, dim=-1) * self.temperature()[:, None, None].to(query.dtype)
        return Features(query, normalize(key, dim=-1), 1.0)

    def scale_head_(self, head: int, power: int) -> None:
        """Lower the temperature: weights do not change a cosine."""
        self.power[head] += power


def build(heads: Heads, **factory: object) -> Cosine:
    """The score of `heads`."""
    return Cosine(heads, **factory)
