"""Scaled dot product: s_ij = <q_i, k_j> / sqrt(d).

Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.2.1.
"""

from __future__ import annotations

from torch import Tensor, nn

from sixfold.contracts import Features, Heads, Projection


class Dot(nn.Module):
    """Scaled dot product."""

    rotation_invariant = True

    def forward(self, query: Tensor, key: Tensor) -> Features:
        """Queries and keys as they are, scale 1/sqrt(d)."""
        return Features(query, key, query.shape[-1] ** -0.5)

    def scale_head_(self, head: int, power: int, projection: Projection) -> None:
        """Share 2**power between W_q and W_k; all of it on W_q where keys serve several heads.

        Powers of two only change exponents, so that the inverse call restores every bit.
        Source: Kimi K2, arXiv 2507.20534, section 2.1 (QK-Clip: each by sqrt(gamma)).
        """
        shared = projection.heads.num_kv_heads != projection.heads.num_heads
        # rounded towards zero, so that the inverse call splits its power the same way
        on_key = 0 if shared else int(power / 2)
        projection.scale_head_(head, query=2.0 ** (power - on_key), key=2.0**on_key)


def build(heads: Heads, **factory: object) -> Dot:  # noqa: ARG001
    """The score of `heads`; it has no parameters."""
    return Dot()
