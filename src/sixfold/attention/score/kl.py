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

from sixfold.attention.score._rated import Centred
from sixfold.contracts import Belief, Features, Heads
from sixfold.geometry.gaussian import half, log_det
from sixfold.ops.attend.features import lift_keys, lift_queries
from sixfold.ops.precision import exact, wide


def move(frame: Tensor, vectors: Tensor) -> Tensor:
    """Each token's matrix (..., n, d, d) times its vector (b, h, n, d)."""
    with exact(vectors):
        # a batched product of such small matrices takes five times as long, backward included
        return torch.linalg.vecdot(wide(frame), wide(vectors)[..., None, :]).to(vectors.dtype)


def beside(matrix: Tensor, vector: Tensor) -> Tensor:
    """[matrix, vector], (..., d, d) and (..., d) to (..., d, d + 1): one product serves both."""
    return torch.cat([matrix, vector[..., None]], dim=-1)


class KL(Centred):
    """Negative divergence of beliefs with full covariance in their own frames, times a rate."""

    schema = "belief"

    def located(self, key: Belief) -> Tensor:
        """The means in the common frame."""
        return key.mean if key.inverse is None else move(key.inverse, wide(key.mean))

    def keys(self, key: Belief) -> Tensor:
        """Natural parameters in the common frame, and the log-partition."""
        with exact(key.mean):
            factor, mean = wide(key.factor), wide(key.mean)
            frame = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            if key.frame is not None:
                frame = wide(key.frame)
            center = self.center.to(mean.dtype).expand_as(mean)
            mean = mean - (center if key.frame is None else move(frame, center))
            # L^-1 [U, m - U c] = [W, a] with W^T W = P and a^T a = (U^-1 m - c)^T P (U^-1 m - c)
            sides = beside(frame.expand_as(factor), mean)
            white = torch.linalg.solve_triangular(factor, sides, upper=False)
            precision, pull = (white[..., :-1].mT @ white).split([factor.shape[-1], 1], dim=-1)
            partition = white[..., -1].square().sum(-1) + log_det(factor, diagonal=False)
            partition = partition - 2 * key.log_volume
            vectors = torch.cat([half(precision), pull[..., 0]], dim=-1)
            return lift_keys(vectors, partition, key.mean.dtype)

    def forward(self, query: Belief, keys: Tensor) -> Features:
        """Moments in the common frame against natural parameters."""
        dtype = query.mean.dtype
        with exact(query.mean):
            # U^-1 [L, m], and [L, m] [L, m]^T = S + m m^T
            sides, rate = beside(wide(query.factor), wide(query.mean)), self.rounded_rate(dtype)
            if query.inverse is not None:
                sides = wide(query.inverse) @ sides
            sides = beside(sides[..., :-1], self.center_queries(sides[..., -1]))
            second = half(sides @ sides.mT, weighted=True)
            moments = torch.cat([-0.5 * second, sides[..., -1]], dim=-1)
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
