"""Attention of beliefs that condense by consensus."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sixfold.attention.beliefs import Update, believe
from sixfold.attention.hierarchy import (
    Group,
    MetaTokens,
    form,
    groups,
    meta_tokens,
    of_beliefs,
    tokens_of,
)
from sixfold.attention.named._own import check_own
from sixfold.attention.named.gauge import GaugeAttention, told


class Emergence(NamedTuple):
    """Tokens after listening, the meta-tokens they form by scale, and which tokens these are."""

    base_tokens: Update
    meta_tokens: tuple[MetaTokens, ...]
    hierarchy: tuple[Group, ...]


class EmergentHierarchicalAttention(GaugeAttention):
    """Attention of beliefs in which neighbours in consensus condense into meta-tokens.

    A `GaugeAttention` of reach ``hierarchical``: groups are found in the frame that all share, so
    that a change of frames changes none of them. `emerge` takes beliefs that are given.

    Args:
        d_model: width of inputs and outputs.
        num_heads: heads, each with its own belief of a token and its own groups.
        head_dim: width of a belief, d_model // num_heads unless given.
        block: tokens of a block; its own and the one before are seen one by one.
        capacity: meta-tokens of a cell, at most.
        threshold: of consensus, KL both ways, nats.
        scales: how many there are, None for all that fit.
        temperature: of soft groups in training, None for hard ones.
        learned: every head learns its threshold; needs a temperature.
        options: any further argument of `GaugeAttention` but `reach`; a hierarchy with sinks is a
            `GaugeAttention` of that reach.

    Raises:
        ValueError: for rules that cannot be meant, a reach beside them, and as `GaugeAttention`.

    >>> import torch
    >>> layer = EmergentHierarchicalAttention(1, kappa=1.0, block=4, threshold=0.5)
    >>> mu = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
    >>> found = layer.emerge(mu, torch.ones(4, 1, 1))
    >>> [(group.start, group.stop) for group in found.hierarchy]
    [(0, 2), (2, 4)]
    """

    def __init__(  # noqa: PLR0913 - the sizes of a layer and the rules of a hierarchy
        self,
        d_model: int,
        num_heads: int = 1,
        head_dim: int | None = None,
        *,
        block: int = 64,
        capacity: int = 16,
        threshold: float = 0.01,
        scales: int | None = None,
        temperature: float | None = None,
        learned: bool = False,
        **options: Any,
    ) -> None:
        reach = {
            "name": "hierarchical",
            "block": block,
            "capacity": capacity,
            "threshold": threshold,
            "scales": scales,
            "temperature": temperature,
            "learned": learned,
        }
        check_own(type(self).__name__, options, reach=", ".join(list(reach)[1:]))
        super().__init__(d_model, num_heads, head_dim, reach=reach, **options)

    def emerge(
        self,
        mean: Tensor,
        covariance: Tensor | None = None,
        phi: Tensor | None = None,
        *,
        factor: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Emergence:
        """What tokens believe after listening, and what they condense into then.

        Arguments as in `update`. Meta-tokens are beliefs in the frame that all share. Groups are
        hard, and gradients reach every constituent. If `is_causal`, a cell that is not full yet
        has none.
        """
        belief = believe(mean, covariance, phi, factor=factor, algebra=self.frames)
        rating, seen = self._listening(belief, None, key_mask, is_causal=is_causal)
        heard, d = self._heard(belief, rating, seen), mean.shape[-1]
        found, spread = told(belief, heard)
        tokens, rules = tokens_of(heard, seen.mask), self.reach.decided
        built = form(tokens, d, rules, is_causal=is_causal)
        base = Update(found.reshape(mean.shape), spread.reshape(*mean.shape, d), None)
        formed = meta_tokens(built, d, mean.dtype)
        return Emergence(base, formed, groups(tokens, of_beliefs(d), rules, built))
