"""A query sees near tokens one by one and the far field by meta-tokens, coarser the farther.

Neighbours in consensus, KL(p || q) + KL(q || p) < threshold in the frame they share, condense into
one belief with the moments of their mixture, which enters the softmax with the logarithm of how
many they are; of two cells with at most `capacity` meta-tokens each comes one of the next scale.
A query sees O(log m) cells, so that n queries cost n log m instead of n m.

A group of n tokens acts as n tokens with one logit: attention to its values is exact, only their
logits are shared. With threshold 0 and room for every token this is full attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.contracts import Cache, Features, Heads, Rating, Visibility
from sixfold.ops.attend.reference import attend, masked, visible
from sixfold.ops.condense import cells, fused, reference
from sixfold.ops.condense.groups import Divergence, Tokens
from sixfold.ops.condense.pyramid import Keys, Pyramid, Rules, condensed
from sixfold.ops.condense.pyramid import build as condense_all


class Far(NamedTuple):
    """What meta-tokens are made of: tokens, what a score keeps of moments, how they agree."""

    tokens: Tokens
    keys: Keys
    divergence: Divergence


class Hierarchical(nn.Module):
    """Near tokens exactly, far ones condensed; `MultiHeadAttention` attends through it."""

    ordered = "reach 'hierarchical'"
    condenses = True

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        for name in ("block", "capacity"):
            if getattr(rules, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(rules, name)}")
        if rules.scales is not None and rules.scales < 1:
            raise ValueError(f"scales must be 1 or more, or None; got {rules.scales}")
        if not rules.threshold >= 0:
            raise ValueError(f"threshold must be 0 or more, got {rules.threshold}")
        self.rules = rules

    def forward(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:  # noqa: ARG002
        """Every token is seen, if only as one of a group.

        Raises ValueError for a mask that is not of keys alone: a group is seen as a whole.
        """
        mask = visibility.mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape[-2] != 1):
            raise ValueError(
                "reach 'hierarchical' takes key_mask and is_causal, not attn_mask: "
                "a query sees a group of tokens as a whole"
            )
        return visibility

    def attend(
        self,
        rating: Rating,
        far: Far,
        visibility: Visibility,
        dropout: float,
        impl: str,
        cache: Cache | None,
    ) -> Tensor:
        """Attention of the last n of m tokens to all of them, (b, h, n, d_v)."""
        if impl == "reference":
            rating, visibility = self.explicit(rating, far, visibility)
            return attend(rating, far.tokens.value, visibility, dropout)
        n = rating.query.shape[-2]
        far = far._replace(tokens=alive(far.tokens, visibility.mask))
        pyramid = self.pyramid(far, n, cache, is_causal=visibility.is_causal)
        given = (rating, far.keys, far.tokens, pyramid, self.rules)
        out = fused.attend(*given, is_causal=visibility.is_causal, dropout=dropout)
        if visibility.mask is None:
            return out
        blind = visible(visibility, n, far.tokens.size.shape[-1], out.device)
        return out.masked_fill(~blind.any(-1, keepdim=True), 0.0)

    def explicit(
        self, rating: Rating, far: Far, visibility: Visibility
    ) -> tuple[Features, Visibility]:
        """The logit of every token, that of its group where it is far, as a mask (b, h, n, m)."""
        n, m = rating.query.shape[-2], rating.key.shape[-2]
        far = far._replace(tokens=alive(far.tokens, visibility.mask))
        pyramid = self.pyramid(far, n, None, is_causal=visibility.is_causal)
        given = (rating, far.keys, pyramid, self.rules)
        found = reference.logits(*given, is_causal=visibility.is_causal)
        mask = masked(found, visible(visibility, n, m, found.device))
        empty = found.new_zeros(found.shape[0], found.shape[1], 1, 1)
        nothing = Features(empty.expand(-1, -1, n, -1), empty.expand(-1, -1, m, -1), 1.0)
        return nothing, Visibility(mask, is_causal=False)

    def pyramid(self, far: Far, n: int, cache: Cache | None, *, is_causal: bool) -> Pyramid:
        """The meta-tokens that the last n tokens see; a cache keeps the cells that are finished."""
        tokens, block = far.tokens, self.rules.block
        m = tokens.size.shape[-1]
        seen = ((m - n) // block, -(-m // block))
        scales = cells.num_scales(*seen, self.rules.scales, is_causal=is_causal)
        if cache is None:
            given = (tokens, far.divergence, self.rules, scales)
            return condense_all(*given, is_causal=is_causal)
        levels, below, width = [], tokens, block
        for scale in range(scales):
            name, count = f"cells {scale}", cells.num_cells(m, block, scale, is_causal=True)
            fresh = below.cells(width, count).after(cache.filled(name))
            packed = condensed(fresh, far.divergence, self.rules)[0].packed()
            kept = cache.append(name, packed, span=block << scale)
            levels.append(Tokens.unpacked(kept, self.rules.capacity, tokens))
            below, width = levels[-1].joined(), 2 * self.rules.capacity
        return Pyramid(tuple(levels))

    def extra_repr(self) -> str:
        """Shown in the module's printout."""
        return ", ".join(f"{name}={value}" for name, value in self.rules._asdict().items())


def alive(tokens: Tokens, mask: Tensor | None) -> Tokens:
    """Tokens without those that a mask of keys (b, 1, 1, m) hides."""
    return tokens if mask is None else tokens._replace(size=tokens.size * mask[:, :, 0])


def build(
    heads: Heads,  # noqa: ARG001
    *,
    block: int = 64,
    capacity: int = 16,
    threshold: float = 0.01,
    scales: int | None = None,
    **factory: Any,  # noqa: ARG001
) -> Hierarchical:
    """The reach of `heads`.

    Options: ``block``, tokens of a block, of which a query sees its own and the one before (and
    after, where nothing is causal) token by token; ``capacity``, meta-tokens of a cell at most;
    ``threshold`` of consensus, nats; ``scales``, how many there are, None for all that fit.
    """
    return Hierarchical(Rules(block, capacity, threshold, scales))
