"""What attention over meta-tokens means: far tokens share the logit of their group.

A group of n tokens under one softmax, weighted by its size, gives each of them the weight of one
token with the group's logit, and so their values exactly. Only logits are approximate. A token that
is part of several groups has the logit log sum over groups of its part exp(logit of the group).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sixfold.contracts import Rating, Visibility
from sixfold.ops.attend import reference
from sixfold.ops.condense import cells
from sixfold.ops.condense.pyramid import Keys, Pyramid, Rules, shares
from sixfold.ops.precision import exact, wide


def weighted_logsumexp(rated: Tensor, share: Tensor) -> Tensor:
    """log sum over places of share exp(rated), (..., n, w).

    rated (..., n, places), share (..., w, places). What underflows beside the largest of
    a row, about 100 nats below it in float32, is -inf.
    """
    least = torch.finfo(rated.dtype).min
    top = rated.detach().amax(-1, keepdim=True).clamp(min=least)
    with exact(rated):
        found = (rated - top).exp() @ share.to(rated.dtype).mT
    nothing = found == 0  # no logarithm is taken there, whose slope would be no number
    return found.masked_fill(nothing, 1.0).log().masked_fill(nothing, -torch.inf) + top


def logits(
    rating: Rating, keys: Keys, pyramid: Pyramid, rules: Rules, *, is_causal: bool
) -> Tensor:
    """Logits (b, h, n, m) of queries that are the last n of m tokens; nothing is masked.

    Args:
        rating: of all tokens.
        keys: what is kept of a meta-token.
        pyramid: the meta-tokens and their places.
        rules: by which they were made.
        is_causal: whether cells end before the query's block, or lie on both sides.
    """
    everything = Visibility(None, is_causal=False)
    found = reference.logits(rating, everything)
    n, m = found.shape[-2:]
    num_blocks, groups = -(-m // rules.block), found.shape[1] // rating.key.shape[1]
    block = torch.arange(m, device=found.device) // rules.block
    for scale, (level, share) in enumerate(zip(pyramid.levels, shares(pyramid), strict=True)):
        kept = keys(level.joined().moments)
        rated = reference.logits(rating._replace(key=kept), everything)
        rated = wide(rated).unflatten(-1, (-1, rules.capacity)).transpose(2, 3)
        empty, share = (t.repeat_interleave(groups, 1) for t in (level.size == 0, share))
        far = weighted_logsumexp(rated.masked_fill(empty[..., None, :], -torch.inf), share)
        far = far.transpose(2, 3).flatten(3)[..., :m]
        far = pad(far, (0, m - far.shape[-1]))
        seen = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=found.device)
        for number in range(num_blocks):
            for cell in cells.far(number, num_blocks, len(pyramid.levels), is_causal=is_causal):
                if cell.scale == scale:
                    seen[number, cell.blocks.start : cell.blocks.stop] = True
        found = torch.where(seen[block[m - n :]][:, block], far.to(found.dtype), found)
    return found
