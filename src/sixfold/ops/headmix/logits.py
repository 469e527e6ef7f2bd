"""Heads mixed before the softmax, on fused attention: a sum of products is one of longer rows.

sum over j of G_hj <q_j, k_j> = <concat_j G_hj q_j, concat_j k_j>. On a sparse graph only neighbours
stand in a row: seven slots at most on a hexagonal grid.
Source of mixed logits: Shazeer et al., Talking-Heads Attention, arXiv 2003.02436, section 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.contracts import Features, Rating, Visibility
from sixfold.ops.attend import reference
from sixfold.ops.attend.features import unhidden


def mix(rating: Features, graph: Tensor, slots: Tensor) -> Features:
    """The rating whose logit of head h is the sum over j of graph_hj times the logit of head j.

    Args:
        rating: query (b, h, n, w), key (b, h_kv, m, w).
        graph: (h, h).
        slots: (h, s), different heads in each row, among them all j where graph_hj is not 0.

    Returns:
        Features of width s w and h key heads; of width w where all heads share one key head.
    """
    query, key, scale = rating
    if key.shape[1] == 1:
        mixed = torch.einsum("hj, bjnw -> bhnw", graph.to(query.dtype), query)
        return Features(unhidden(mixed), key, scale)
    gains = graph.gather(1, slots)[..., None]
    # wide gains make a wide product, which is rounded once
    mixed = (gains * picked(query, slots)).to(query.dtype)
    keys = picked(key, slots // (query.shape[1] // key.shape[1]))
    return Features(unhidden(in_a_row(mixed)), in_a_row(keys), scale)


def picked(tokens: Tensor, slots: Tensor) -> Tensor:
    """The heads in the slots of each head: (b, h, n, w) and (h, s) -> (b, n, h, s, w)."""
    return tokens.transpose(1, 2).index_select(2, slots.flatten()).unflatten(2, slots.shape)


def in_a_row(slotted: Tensor) -> Tensor:
    """(b, n, h, s, w) -> (b, h, n, s w), a view."""
    return slotted.flatten(3).transpose(1, 2)


def explicit(rating: Rating) -> Features:
    """The same logits (b, h, n, m), all of them held, as features: <L_i, e_j> = L_ij.

    All heads share the unit vectors, so that to mix these features is to mix the logits.
    """
    logits = reference.logits(rating, Visibility(None, is_causal=False))
    b, _, _, m = logits.shape
    units = torch.eye(m, dtype=logits.dtype, device=logits.device).expand(b, 1, m, m)
    return Features(logits, units, 1.0)
