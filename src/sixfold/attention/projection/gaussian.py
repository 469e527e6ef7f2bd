"""Beliefs with full covariance: N(m, L L^T) in the token's own frame, m = W_m x, L from W_L x.

The diagonal of L is FLOOR + softplus(. + c), so that every covariance is positive definite; a fresh
one is near the identity. Frames U_i (none, rotations, or any invertible matrix; per position or per
token) say how a token's own axes lie to the common ones.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from sixfold.attention.projection._belief import FLOOR, START, BeliefProjection
from sixfold.attention.projection._frames import PER
from sixfold.contracts import Belief, Heads
from sixfold.discover import unknown
from sixfold.geometry.frames import ALGEBRAS
from sixfold.geometry.gaussian import triangle


class GaussianProjection(BeliefProjection):
    """A mean, a Cholesky factor and a frame for each query and key, and a value."""

    schema = "belief"

    def __init__(
        self, heads: Heads, *, tied: bool, frames: str | None, per: str, **factory: object
    ) -> None:
        d = heads.head_dim
        super().__init__(heads, d * (d + 1) // 2, tied=tied, **factory)
        if frames is not None and frames not in ALGEBRAS:
            raise ValueError(unknown("frames", frames, ALGEBRAS))
        if per not in PER:
            raise ValueError(unknown("per", per, PER))
        self.frames = None if frames is None else PER[per](heads, frames, **factory)
        self.ordered = "frames of positions" if frames and per == "position" else None

    def shape(self, raw: Tensor) -> Tensor:
        """Lower Cholesky factors (b, h, n, d, d) with a diagonal of at least FLOOR."""
        d = self.heads.head_dim
        scales, below = raw.movedim(-1, 0).tensor_split([d])
        return triangle(FLOOR + softplus(scales + START).movedim(0, -1), below.movedim(0, -1))

    def framed(self, belief: Belief, tokens: Tensor, past: int) -> Belief:
        """With the frames of the tokens; query heads share those of their key head."""
        if self.frames is None:
            return belief
        groups = belief.mean.shape[1] // self.heads.num_kv_heads
        frame, inverse, volume = self.frames(tokens, past)
        if groups > 1:
            frame, inverse = (f.repeat_interleave(groups, dim=-4) for f in (frame, inverse))
        return belief._replace(frame=frame, inverse=inverse, log_volume=volume)


def build(
    heads: Heads,
    *,
    tied: bool = False,
    frames: str | None = None,
    per: str = "position",
    **factory: object,
) -> GaussianProjection:
    """The projection of `heads`.

    Options: ``tied`` (a token has one belief, as a query and as a key), ``frames`` (none, ``so`` or
    ``gl``) and ``per`` (``position`` or ``token``).
    """
    return GaussianProjection(heads, tied=tied, frames=frames, per=per, **factory)
