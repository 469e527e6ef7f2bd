"""Gauge-transported divergence of Gaussians: s_ij = -rate_h KL(p_i || U_i U_j^-1 p_j).

A divergence does not change when both sides are moved by one invertible map. So every belief is
moved once into the common frame, m = U^-1 m_i and S = U^-1 S_i U^-T, instead of once per pair.
There, without its query-only term, it is the inner product of rate [-half(S + m m^T), m, -1/2] and
[half(P), P m, m^T P m + log det S], with P = S^-1 and half the lower triangle: a width of
d (d + 1) / 2 + d + 1. Values move with their token's frame and outputs are read in the query's:
o_i = U_i sum over j of p_ij U_j^-1 v_j. Without frames this is the plain divergence of Gaussians.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sixfold.attention._precision import exact, wide
from sixfold.attention.score._rated import Centred
from sixfold.contracts import Belief, Features, Heads
from sixfold.geometry.gaussian import half, log_det
from sixfold.ops.attend.features import lift_keys, lift_queries


def move(frame: Tensor, vectors: Tensor) -> Tensor:
    """Each token's matrix (..., n, d, d) times its vector (b, h, n, d)."""
    with exact(vectors):
        return (wide(frame) @ wide(vectors)[..., None])[..., 0].to(vectors.dtype)


class KL(Centred):
    """Negative divergence of beliefs with full covariance in their own frames, times a rate."""

    schema = "belief"

    def located(self, key: Belief) -> Tensor:
        """The means in the common frame."""
        return key.mean if key.inverse is None else move(key.inverse, wide(key.mean))

    def keys(self, key: Belief) -> Tensor:
        """Natural parameters in the common frame, and the log-partition."""
        dtype = key.mean.dtype
        with exact(key.mean):
            mean, factor = wide(self.center_keys(self.located(key))), wide(key.factor)
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            frame = eye if key.frame is None else wide(key.frame)
            white = torch.linalg.solve_triangular(factor, frame.expand_as(factor), upper=False)
            apart = (white @ mean[..., None])[..., 0]
            pull = (white.mT @ apart[..., None])[..., 0]
            own = apart.square().sum(-1) + log_det(factor, diagonal=False)
            if key.frame is not None:
                own = own - 2 * key.log_volume
            vectors = torch.cat([half(white.mT @ white), pull], dim=-1)
            return lift_keys(vectors, own, dtype)

    def forward(self, query: Belief, keys: Tensor) -> Features:
        """Moments in the common frame against natural parameters."""
        dtype = query.mean.dtype
        with exact(query.mean):
            mean, rate = wide(self.center_queries(self.located(query))), self.rounded_rate(dtype)
            factor = wide(query.factor)
            if query.inverse is not None:
                factor = wide(query.inverse) @ factor
            second = factor @ factor.mT + mean[..., None] * mean[..., None, :]
            moments = torch.cat([-0.5 * half(second, weighted=True), mean], dim=-1)
            return Features(lift_queries(rate * moments, -0.5 * rate, dtype), keys, 1.0)

    def carry(self, value: Tensor, key: Belief) -> Tensor:
        """U_j^-1 v_j."""
        return value if key.inverse is None else move(key.inverse, value)

    def readout(self, out: Tensor, query: Belief) -> Tensor:
        """U_i o_i."""
        return out if query.frame is None else move(query.frame, out)


def build(heads: Heads, *, rate: float | None = None, learned: bool = True, **factory: Any) -> KL:
    """The score of `heads`; options ``rate``, where it starts, and whether it is ``learned``."""
    start = heads.head_dim**-0.5 if rate is None else rate
    return KL(heads, start, learned=learned, **factory)
