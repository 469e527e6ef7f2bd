"""Scaled dot product: s_ij = <q_i, k_j> / sqrt(d).

Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.2.1.
"""

from __future__ import annotations

from torch import Tensor

from sixfold.attention.score._rated import Clipped
from sixfold.contracts import Features, Heads


class Dot(Clipped):
    """Scaled dot product."""

    rotation_invariant = True
    signed = True

    def forward(self, query: Tensor, keys: Tensor) -> Features:
        """Clipped queries and keys as they are, scale 1/sqrt(d)."""
        query = query * self.power.exp2()[:, None, None].to(query.dtype)
        return Features(query, keys, query.shape[-1] ** -0.5)

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply one head's logits by 2**power, apart from its weights.

        AdamW moves a weight by a fixed amount: weights made smaller by a clip would grow back
        faster, those behind a smaller factor do not (see LOG.md).
        Source: Kimi K2, arXiv 2507.20534, section 2.1 (QK-Clip, there on W_Q and W_K).
        """
        super().scale_head_(head, power)


def build(heads: Heads, **factory: object) -> Dot:
    """The score of `heads`; it has no parameters."""
    return Dot(heads, **factory)
