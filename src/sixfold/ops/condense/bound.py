"""How far attention over meta-tokens can be from attention over all tokens.

Where no logit moves by more than e, weights move by 2 tanh(e / 2) in all, and no coordinate of the
output by more than 2 tanh(e / 2) max |v|. A logit moves with its token's
features to those of its group: by at most scale |q| times the diagonal of the box around them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sixfold.contracts import Features
from sixfold.ops.condense import cells
from sixfold.ops.condense.pyramid import Keys, Pyramid, Rules, shares


def radii(key: Tensor, keys: Keys, pyramid: Pyramid) -> list[Tensor]:
    """Diagonals of the boxes around each group and its tokens, by scale (b, h, cells, capacity)."""
    found = []
    for level, share in zip(pyramid.levels, shares(pyramid), strict=True):
        group = keys(level.joined().moments)
        inside = pad(key, (0, 0, 0, share.shape[-3] * share.shape[-2] - key.shape[-2]))
        cell = torch.arange(share.shape[-3], device=key.device)[:, None] * share.shape[-1]
        place = (cell + share.argmax(-1)).flatten(-2)[..., None].expand_as(inside)
        # what is not there, or hidden, is of no group: it stands where a group is
        there = share.any(-1).flatten(-2)[..., None]
        inside = torch.where(there, inside, group.gather(-2, place))
        high = group.scatter_reduce(-2, place, inside, "amax")
        low = group.scatter_reduce(-2, place, inside, "amin")
        found.append((high - low).norm(dim=-1).view_as(level.size))
    return found


def logit_error(
    rating: Features, keys: Keys, pyramid: Pyramid, rules: Rules, *, is_causal: bool
) -> Tensor:
    """By how much a logit of each query may be wrong, nats, (b, h, n)."""
    query, key, scale = rating
    n, m = query.shape[-2], key.shape[-2]
    num_blocks, first = -(-m // rules.block), (m - n) // rules.block
    start = [0] * len(pyramid.counts)
    table = cells.table(key, first, num_blocks, pyramid.counts, start, is_causal)
    if not table.numel():
        return query.new_zeros(query.shape[:-1])
    largest = torch.cat([r.amax(-1) for r in radii(key, keys, pyramid)], dim=-1)
    seen = largest[..., table.clamp(min=0)].masked_fill(table < 0, 0.0).amax(-1)
    block = torch.arange(m - n, m, device=key.device) // rules.block - first
    radius = seen[..., block].repeat_interleave(query.shape[1] // key.shape[1], 1)
    return scale * query.norm(dim=-1) * radius


def output_error(logit_error: Tensor, value: Tensor) -> Tensor:
    """By how much any coordinate of an output may be wrong, (b, h, n).

    Logits wrong by e move weights by 2 tanh(e / 2) in all: p becomes p / (p + (1 - p) exp(-2e)) for
    the share p of what gains, which is farthest off at p = 1 / (1 + exp(e)).

    logit_error (b, h, n); value (b, h_kv, m, d_v).
    """
    largest = (
        value.abs().amax((-2, -1)).repeat_interleave(logit_error.shape[1] // value.shape[1], 1)
    )
    return 2 * torch.tanh(logit_error / 2) * largest[..., None]
