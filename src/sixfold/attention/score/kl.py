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
from sixfold.geometry.lanes import gram, product, solve
from sixfold.ops.attend.features import lift_keys, lift_queries
from sixfold.ops.precision import exact, wide


def in_lanes(matrices: Tensor) -> Tensor:
    """(b, h, n, d, k) to (d, k, t), which moves nothing where they lie so already."""
    lanes = matrices.movedim((-2, -1), (0, 1)).flatten(2)
    return lanes if lanes.stride(-1) == 1 else lanes.contiguous()


def of_each(frame: Tensor, mean: Tensor) -> Tensor:
    """The frame of each token of mean (b, h, n, d), in lanes."""
    whole = wide(frame)[(None,) * (mean.ndim + 1 - frame.ndim)]
    return in_lanes(whole.expand(*mean.shape, mean.shape[-1]))


def move(frame: Tensor, vectors: Tensor) -> Tensor:
    """Each token's matrix (..., n, d, d) times its vector (b, h, n, d)."""
    with exact(vectors):
        columns = in_lanes(wide(vectors)[..., None])
        moved = product(of_each(frame, vectors), columns)[:, 0]
        return moved.unflatten(-1, vectors.shape[:-1]).movedim(0, -1).to(vectors.dtype)


class KL(Centred):
    """Negative divergence of beliefs with full covariance in their own frames, times a rate."""

    schema = "belief"

    def located(self, key: Belief) -> Tensor:
        """The means in the common frame."""
        return key.mean if key.inverse is None else move(key.inverse, wide(key.mean))

    def keys(self, key: Belief) -> Tensor:
        """Natural parameters in the common frame, and the log-partition."""
        with exact(key.mean):
            factor, mean = in_lanes(wide(key.factor)), wide(key.mean)
            center = self.center.to(mean.dtype).expand_as(mean)
            frame = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
            if key.frame is not None:
                frame, center = key.frame, move(key.frame, center)
            # L^-1 [U, m - U c] = [W, a] with W^T W = P and a^T a = (U^-1 m - c)^T P (U^-1 m - c)
            sides = torch.cat([of_each(frame, mean), in_lanes((mean - center)[..., None])], dim=1)
            white = solve(factor, sides)
            # half([W, a]^T [W, a]) = [half(P), a^T W, a^T a]
            rows = gram(white.transpose(0, 1)).unflatten(0, mean.shape[:-1])
            volume = log_det(factor.diagonal(), diagonal=True).unflatten(0, mean.shape[:-1])
            partition = rows[..., -1] + volume - 2 * key.log_volume
            return lift_keys(rows[..., :-1], partition, key.mean.dtype)

    def forward(self, query: Belief, keys: Tensor) -> Features:
        """Moments in the common frame against natural parameters."""
        dtype = query.mean.dtype
        with exact(query.mean):
            mean, rate = wide(query.mean), self.rounded_rate(dtype)
            root = in_lanes(wide(query.factor))
            if query.inverse is not None:
                mean = move(query.inverse, mean)
                root = product(of_each(query.inverse, mean), root)
            mean = self.center_queries(mean)
            # [U^-1 L, m] [U^-1 L, m]^T = S + m m^T
            second = gram(torch.cat([root, in_lanes(mean[..., None])], dim=1))
            moments = torch.cat([second.unflatten(0, mean.shape[:-1]), mean], dim=-1)
            ones = mean.new_ones(mean.shape[-1])
            weight = torch.cat([-0.5 * half(ones.outer(ones), weighted=True), ones])
            return Features(lift_queries(rate * weight * moments, -0.5 * rate, dtype), keys, 1.0)

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
