"""Statistics of attention over features, from two fused calls and no weights.

With the keys as values attention returns the mean key of a query, and its entropy is
H_i = lse_i - scale <q_i, sum over j of p_ij k_j>. With queries and keys in each other's place and
-lse_i as the new keys' own term the log-sum-exp of a key is the logarithm of what it receives:
log sum over i of exp(s_ij - lse_i).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.contracts import Features, Observation, Statistics
from sixfold.ops.attend.features import equal_widths, lift_keys, lift_queries
from sixfold.ops.attend.fused import blind_rows
from sixfold.ops.attend.reference import visible
from sixfold.ops.precision import exact
from sixfold.ops.statistics.reference import widened


def refusal(observation: Observation, *, largest: bool) -> str | None:
    """Why two fused calls cannot give these statistics, or None where they can."""
    rating, mask = observation.rating, observation.visibility.mask
    if not isinstance(rating, Features):
        return "the score is no inner product of features"
    if rating.query.device.type != "cpu":
        return f"PyTorch returns no log-sum-exp of fused attention on {rating.query.device.type}"
    if mask is not None and mask.dtype != torch.bool:
        return "the mask adds to the logits"
    return "the exact maximum is in no log-sum-exp" if largest else None


def flash(
    query: Tensor, key: Tensor, mask: Tensor | None, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Mean key (b, h, n, d) and log-sum-exp (b, h, n) of every query."""
    query, key, value = equal_widths(query, key, key)
    if mask is not None:
        added = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
        mask = added[(None,) * (4 - mask.ndim)]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=1.0
    )


def received(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, *, square: bool
) -> Tensor:
    """What each key receives, (b, h, m): log-sum-exp of the keys over queries that weigh -lse."""
    one = lse.new_ones(())
    lifted_query, lifted_key = lift_queries(key, one, key.dtype), lift_keys(query, -lse, key.dtype)
    if square:
        # queries from the key's own on: causality, read backwards
        lifted_query, lifted_key = lifted_query.flip(-2), lifted_key.flip(-2)
    turned = None if mask is None else mask.expand(*mask.shape[:-2], lse.shape[-1], -1).mT
    _, log_mass = flash(lifted_query, lifted_key, turned, is_causal=square)
    mass = log_mass.exp()
    if turned is not None:
        mass = mass.masked_fill(blind_rows(turned)[..., 0], 0.0)
    return mass.flip(-1) if square else mass


@torch.no_grad()
def statistics(observation: Observation, *, largest: bool = False) -> Statistics:
    """Same as the reference, without its gradient.

    Entropy is a difference of two numbers as large as the logits: its error is about 1e-7 of them.

    Raises ValueError for what two fused calls cannot give, naming it.
    """
    reason = refusal(observation, largest=largest)
    if reason is not None:
        raise ValueError(f"impl 'fused' cannot give these statistics: {reason}; use 'tiled'")
    with exact(observation.rating.query):
        query, key, scale = widened(observation.rating)
        n, m = query.shape[-2], key.shape[-2]
        visibility = observation.visibility
        square = visibility.is_causal and visibility.mask is None and n == m
        mask = None if square else visible(visibility, n, m, query.device)
        key, query = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1), scale * query
        mean_key, lse = flash(query, key, mask, is_causal=square)
        entropy = (lse - (query * mean_key[..., : query.shape[-1]]).sum(-1)).clamp(min=0)
        mass = received(query, key, lse, mask, square=square)
    if mask is not None:
        blind = blind_rows(mask)[..., 0]
        entropy, lse = entropy.masked_fill(blind, 0.0), lse.masked_fill(blind, float("-inf"))
    return Statistics(entropy, mass, lse)
