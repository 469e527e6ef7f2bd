"""What attention over meta-tokens means: far tokens share the logit of their group.

A group of n tokens under one softmax, weighted by its size, gives each of them the weight of one
token with the group's logit, and so their values exactly. Only logits are approximate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.contracts import Rating, Visibility
from sixfold.ops.attend import reference
from sixfold.ops.condense import cells
from sixfold.ops.condense.pyramid import Keys, Pyramid, Rules


def logits(
    rating: Rating, keys: Keys, pyramid: Pyramid, rules: Rules, *, is_causal: bool
) -> Tensor:
    """Logits (b, h, n, m) of queries that are the last n of m tokens; nothing is masked.

    Args:
        rating: of all tokens.
        keys: what is kept of a meta-token.
        pyramid: the meta-tokens.
        rules: by which they were made.
        is_causal: whether cells end before the query's block, or lie on both sides.
    """
    everything = Visibility(None, is_causal=False)
    found = reference.logits(rating, everything)
    n, m = found.shape[-2:]
    num_blocks, groups = -(-m // rules.block), found.shape[1] // rating.key.shape[1]
    token = torch.arange(m, device=found.device)
    own = token[m - n :] // rules.block
    for scale, (level, place) in enumerate(zip(*pyramid, strict=True)):
        kept = keys(level.joined().moments)
        rated = reference.logits(rating._replace(key=kept), everything)
        slot = token // (rules.block << scale) * rules.capacity + place
        slot = slot.clamp(max=kept.shape[-2] - 1)  # a cell that is not there is not seen
        slot = slot.repeat_interleave(groups, 1)[..., None, :].expand(found.shape)
        seen = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=found.device)
        for block in range(num_blocks):
            for cell in cells.far(block, num_blocks, len(pyramid.levels), is_causal=is_causal):
                if cell.scale == scale:
                    seen[block, cell.blocks.start : cell.blocks.stop] = True
        found = torch.where(seen[own][:, token // rules.block], rated.gather(-1, slot), found)
    return found
