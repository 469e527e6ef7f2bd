"""`torch.nn.MultiheadAttention`, on its own and inside PyTorch's encoder and decoder layers.

Queries and keys are projected again from the layer's inputs: it keeps none. Inside it nothing can
be told apart, so only the whole layer is timed.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sixfold.analysis.families._watch import Family, Log, LogOf, after, before
from sixfold.analysis.measure import Sight, sight, tokens_of
from sixfold.attention.masks import visibility_of
from sixfold.contracts import Features, Observation, Visibility

FORWARD = inspect.signature(nn.MultiheadAttention.forward)


def watch(model: nn.Module, stack: ExitStack, log_of: LogOf) -> None:
    """Hooks around every layer; the fused fast path of encoder layers, which calls none, is off."""
    found = [layer for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)]
    for layer in found:
        if layer.bias_k is not None or layer.add_zero_attn:
            raise ValueError(
                "torch.nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be analysed: "
                "its added keys are no tokens"
            )
        log = log_of(layer, "torch")
        if log is not None:
            before(layer, partial(look, log), stack)
            after(layer, lambda *_, log=log: log.end(), stack)
    if found:
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)


def look(log: Log, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Measure what the layer is about to do, then start its clock."""
    log.show(seen_by(layer, FORWARD.bind(layer, *args, **kwargs).arguments))
    log.start()


@torch.no_grad()
def seen_by(layer: nn.MultiheadAttention, given: dict[str, Any]) -> Sight:
    """Queries and keys as the layer projects them, and its masks, which say who is hidden."""
    sources = given["query"], given["key"]
    if any(x.is_nested for x in sources):
        raise ValueError("nested tensors cannot be analysed: give padded ones and a padding mask")
    if sources[0].ndim == 2:
        sources = tuple(x[None] for x in sources)
    elif not layer.batch_first:
        sources = tuple(x.transpose(0, 1) for x in sources)
    query, key = (
        linear(x, weight, bias).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for x, (weight, bias) in zip(sources, projections(layer), strict=True)
    )
    shape = (*query.shape[:3], key.shape[2])
    hidden, padding = given.get("attn_mask"), given.get("key_padding_mask")
    mask = joined(as_visible(hidden, shape), as_visible(padding, shape, keys=True))
    rating = Features(query, key, layer.head_dim**-0.5)
    observation = Observation(rating, Visibility(mask, is_causal=False))
    return sight(observation, tokens_of(mask), together=given["query"] is given["key"])


def projections(layer: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of queries and of keys."""
    if layer.in_proj_weight is None:
        weights = [layer.q_proj_weight, layer.k_proj_weight]
    else:
        weights = list(layer.in_proj_weight.chunk(3)[:2])
    bias = layer.in_proj_bias
    return list(zip(weights, [None, None] if bias is None else bias.chunk(3)[:2], strict=True))


def as_visible(
    hidden: Tensor | None, shape: tuple[int, int, int, int], *, keys: bool = False
) -> Tensor | None:
    """A mask of PyTorch's module, True = hidden, as one of four axes, True = visible."""
    if hidden is None:
        return None
    mask = ~hidden if hidden.dtype == torch.bool else hidden
    if keys:
        return (mask if mask.ndim == 2 else mask[None])[:, None, None, :]
    if mask.ndim == 3:
        mask = mask.unflatten(0, shape[:2])
    return visibility_of(mask, None, shape, is_causal=False).mask[(None,) * (4 - mask.ndim)]


def joined(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Both masks in one; booleans become -inf where one of them adds to the logits."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    return added(mask) + added(other)


def added(mask: Tensor) -> Tensor:
    """A mask as a term of the logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def build() -> Family:
    """Every `torch.nn.MultiheadAttention`."""
    return Family("torch.nn.MultiheadAttention", watch)
