"""A query sees near tokens one by one and the far field by meta-tokens, coarser the farther.

Neighbours in consensus, KL(p || q) + KL(q || p) < threshold in the frame they share, condense into
one belief with the moments of their mixture, which enters the softmax with the logarithm of how
many they are; of two cells with at most `capacity` meta-tokens each comes one of the next scale.
A query sees O(log m) cells, so that n queries cost n log m instead of n m.

A group of n tokens acts as n tokens with one logit: attention to its values is exact, only their
logits are shared. With threshold 0 and room for every token this is full attention.

With a temperature, groups are soft and drawn in training, so that gradients decide where they
begin, and can learn the threshold. Weights and statistics are then those of the groups that are
expected, without the draw, as they are without dropout. In `eval` groups are hard.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_positive, check_whole
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

    def __init__(self, given: Rules, learns: int = 0, **factory: Any) -> None:
        super().__init__()
        check(given, learns=learns > 0)
        self.given = given
        self.log_threshold = None
        if learns:
            start = torch.full((learns,), math.log(given.threshold), **factory)
            self.log_threshold = nn.Parameter(start)

    @property
    def decided(self) -> Rules:
        """The rules of hard groups, by the threshold as it stands."""
        if self.log_threshold is None:
            return self.given._replace(temperature=None)
        threshold = self.log_threshold.exp()[:, None, None]
        return self.given._replace(threshold=threshold, temperature=None)

    @property
    def rules(self) -> Rules:
        """The rules now: in training groups are soft, and drawn, where there is a temperature."""
        if not self.training or self.given.temperature is None:
            return self.decided
        return self.decided._replace(temperature=self.given.temperature, noisy=True)

    def forward(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:  # noqa: ARG002
        """Every token is seen, if only as one of a group.

        Raises ValueError for a mask that is not of keys alone: a group is seen as a whole.
        """
        mask = visibility.mask
        of_keys = mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1)
        if mask is not None and not (of_keys and mask.dtype == torch.bool):
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
        """Attention of the last n of m tokens to all of them, (b, h, n, d_v).

        Raises ValueError for a cache where groups are drawn.
        """
        rules = self.rules
        if cache is not None and rules.noisy:
            raise ValueError(
                "reach 'hierarchical' with a temperature draws its groups in training, "
                "which a cache cannot keep: call eval(), or give no cache"
            )
        far = far._replace(tokens=alive(far.tokens, visibility.mask))
        if impl == "reference" or not isinstance(rating, Features):
            rating, visibility = self.explicit(rating, far, visibility, rules)
            return attend(rating, far.tokens.value, visibility, dropout)
        pyramid = self.pyramid(far, rules, cache, is_causal=visibility.is_causal)
        given = (rating, far.keys, far.tokens, pyramid, rules)
        return fused.attend(*given, is_causal=visibility.is_causal, dropout=dropout)

    def explicit(
        self, rating: Rating, far: Far, visibility: Visibility, rules: Rules | None = None
    ) -> tuple[Features, Visibility]:
        """The logit of every token, that of its group where it is far, as a mask (b, h, n, m).

        rules: those of now without the draw unless given.
        """
        rules = self.rules._replace(noisy=False) if rules is None else rules
        n, m = map(cells.fixed, (rating.query.shape[-2], rating.key.shape[-2]))
        far = far._replace(tokens=alive(far.tokens, visibility.mask))
        pyramid = self.pyramid(far, rules, None, is_causal=visibility.is_causal)
        given = (rating, far.keys, pyramid, rules)
        found = reference.logits(*given, is_causal=visibility.is_causal)
        mask = masked(found, visible(visibility, n, m, found.device))
        empty = found.new_zeros(found.shape[0], found.shape[1], 1, 1)
        nothing = Features(empty.expand(-1, -1, n, -1), empty.expand(-1, -1, m, -1), 1.0)
        return nothing, Visibility(mask, is_causal=False)

    def pyramid(self, far: Far, rules: Rules, cache: Cache | None, *, is_causal: bool) -> Pyramid:
        """The meta-tokens of all tokens; a cache keeps the cells that are finished."""
        tokens, block = far.tokens, rules.block
        m = cells.fixed(tokens.size.shape[-1])
        scales = cells.num_scales(-(-m // block), rules.scales)
        if cache is None or not is_causal:  # what is not causal changes with every token to come
            given = (tokens, far.divergence, rules, scales)
            return condense_all(*given, is_causal=is_causal)
        levels, below, width = [], tokens, block
        for scale in range(scales):
            name, count = f"cells {scale}", cells.num_cells(m, block, scale, is_causal=True)
            fresh = below.cells(width, count, cache.filled(name))
            packed = condensed(fresh, far.divergence, rules)[0].packed()
            kept = cache.append(name, packed, span=block << scale)
            levels.append(Tokens.unpacked(kept, rules.capacity, tokens))
            below, width = levels[-1].joined(), 2 * rules.capacity
        return Pyramid(tuple(levels))

    def extra_repr(self) -> str:
        """Shown in the module's printout."""
        shown = [f"{name}={getattr(self.given, name)}" for name in self.given._fields[:-1]]
        return ", ".join([*shown, f"learned={self.log_threshold is not None}"])


def check(rules: Rules, *, learns: bool) -> None:
    """Raise ValueError for rules that cannot be meant."""
    check_whole(block=rules.block, capacity=rules.capacity)
    if rules.scales is not None:
        check_whole(scales=rules.scales)
    check_threshold("threshold", rules.threshold)
    check_positive("temperature", rules.temperature, none=True)
    check_sinks(rules)
    if learns and rules.temperature is None:
        raise ValueError("learned needs a temperature: hard groups give it no gradient")
    if rules.temperature is not None and not 0 < rules.threshold < math.inf:
        raise ValueError(
            f"soft groups need a threshold positive and finite, got {rules.threshold!r}"
        )


def check_sinks(rules: Rules) -> None:
    """Raise ValueError for a number of sinks that is none, or that cannot all stay alone."""
    sinks = rules.sinks
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks must be a whole number of 0 or more, got {sinks!r}")
    if sinks >= rules.capacity:
        raise ValueError(
            f"{sinks} sinks stay alone, which takes a capacity of more than {sinks}, "
            f"got {rules.capacity}"
        )
    if sinks and rules.temperature is not None:
        raise ValueError(
            "sinks stay alone, but a temperature shares every token among groups: "
            "give sinks or a temperature"
        )


def check_threshold(name: str, value: object) -> None:
    """Raise ValueError for a divergence that is no number of 0 or more; it may be infinite."""
    if not (isinstance(value, Real) and not isinstance(value, bool) and value >= 0):
        raise ValueError(f"{name} must be 0 or more, got {value!r}")


def alive(tokens: Tokens, mask: Tensor | None) -> Tokens:
    """Tokens without those that a mask of keys (b, 1, 1, m) hides, and without what they hold."""
    if mask is None:
        return tokens
    hidden = ~mask[:, :, 0]
    moments, value = (
        part.masked_fill(hidden[..., None], 0.0) for part in (tokens.moments, tokens.value)
    )
    return Tokens(moments, value, tokens.size.masked_fill(hidden, 0.0))


def build(
    heads: Heads,
    *,
    block: int = 64,
    capacity: int = 16,
    threshold: float = 0.01,
    scales: int | None = None,
    temperature: float | None = None,
    sinks: int = 0,
    learned: bool = False,
    **factory: Any,
) -> Hierarchical:
    """The reach of `heads`.

    Options: ``block``, tokens of a block, of which a query sees its own and the one before (and
    after, where nothing is causal) token by token; ``capacity``, meta-tokens of a cell at most;
    ``threshold`` of consensus, nats; ``scales``, how many there are, None for all that fit;
    ``temperature`` of soft groups in training, None for hard ones; ``sinks``, how many of the first
    tokens condense with no other, where groups are hard; ``learned``, a threshold that every key
    head learns, by its logarithm.

    Raises ValueError for values that cannot be meant, for ``learned`` without a temperature, and
    for ``sinks`` with one.
    """
    rules = Rules(block, capacity, threshold, scales, temperature, sinks)
    return Hierarchical(rules, heads.num_kv_heads if learned else 0, **factory)
