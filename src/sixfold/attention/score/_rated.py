"""What scores share: clips, a positive rate per head, a constant centre.

A clip of a head multiplies its logits by a power of two that is kept by itself, beside what is
learned: a whole power of two only changes exponents, so that taking it back restores every bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_positive
from sixfold.contracts import Features, Heads, Schema
from sixfold.ops.precision import wide


class Clipped(nn.Module):
    """A score of points whose logits are multiplied by 2**power_h, 1 until a head is clipped."""

    schema: Schema = "point"
    gives: type = Features
    rotation_invariant = False
    signed = False

    def __init__(self, heads: Heads, **factory: Any) -> None:
        super().__init__()
        self.register_buffer("power", torch.zeros(heads.num_heads, **factory))

    def keys(self, key: Any) -> Tensor:
        """Keys as they are."""
        return key

    def carry(self, value: Tensor, key: Any) -> Tensor:  # noqa: ARG002
        """Values as they are: all tokens share one frame."""
        return value

    def readout(self, out: Tensor, query: Any) -> Tensor:  # noqa: ARG002
        """Outputs as they are."""
        return out

    def recenter_(self, key: Any) -> None:  # noqa: ARG002
        """Raise ValueError: this score would change, or has nothing to gain."""
        raise ValueError(
            f"{type(self).__name__} takes no centre: only scores on features of differences do"
        )

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply one head's logits by 2**power."""
        self.power[head] += power


class Rated(Clipped):
    """A score times rate_h = exp(log_rate_h) 2**power_h."""

    def __init__(self, heads: Heads, rate: float, *, learned: bool, **factory: Any) -> None:
        super().__init__(heads, **factory)
        check_positive("rate", rate)
        start = torch.full((heads.num_heads,), math.log(rate), **factory)
        if learned:
            self.log_rate = nn.Parameter(start)
        else:
            self.register_buffer("log_rate", start)

    def rate(self) -> Tensor:
        """rate_h, shape (h,), positive."""
        return self.log_rate.exp() * self.power.exp2()

    def rounded_rate(self, dtype: torch.dtype) -> Tensor:
        """The rate as `dtype` holds it, (h, 1, 1) and wide.

        Every term of a half-precision score must carry the same rate, or they no longer cancel.
        """
        return wide(self.rate().to(dtype))[:, None, None]


class Centred(Rated):
    """A rated score that does not change when queries and keys move together.

    Both are taken relative to a constant, so that an offset they share does not eat the digits of
    their difference. Any constant gives the same score; it stays 0 until `recenter_` is called. It
    is never the mean of the sequence at hand: that would let the future into the last bits.
    """

    def __init__(self, heads: Heads, rate: float, *, learned: bool, **factory: Any) -> None:
        super().__init__(heads, rate, learned=learned, **factory)
        self.groups = heads.num_heads // heads.num_kv_heads
        start = torch.zeros(heads.num_kv_heads, 1, heads.head_dim, **factory)
        self.register_buffer("center", start)

    def center_keys(self, key: Tensor) -> Tensor:
        """Keys (b, h_kv, m, d) relative to the centre."""
        return key - self.center.to(key.dtype)

    def center_queries(self, query: Tensor) -> Tensor:
        """Queries (b, h, n, d) relative to the centre of the keys they meet."""
        return query - self.center.to(query.dtype).repeat_interleave(self.groups, 0)

    def located(self, key: Any) -> Tensor:
        """Where keys are, (b, h_kv, m, d)."""
        return key

    @torch.no_grad()
    def recenter_(self, key: Any) -> None:
        """Put the centre on the mean of these keys.

        Raises ValueError where that mean is not finite.
        """
        mean = wide(self.located(key)).mean((0, 2))[:, None]
        if not mean.isfinite().all():
            raise ValueError("the mean of these keys is not finite: the centre stays where it was")
        self.center.copy_(mean)
