"""The residual block that every model stacks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_whole
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import Cache
from sixfold.discover import unknown

OPTIONS = tuple(inspect.signature(MultiHeadAttention).parameters)[1:]
"""What can be said of a layer of attention, beside its width."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        d_model: width.
        attention: options of `MultiHeadAttention` other than d_model.
        mlp_ratio: hidden width of the MLP over d_model.
        dropout: probability of dropping a residual update.

    Source: Xiong et al., On Layer Normalization in the Transformer, arXiv 2002.04745 (pre-norm).
    """

    def __init__(
        self,
        d_model: int,
        attention: Mapping[str, Any],
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = round(mlp_ratio * d_model)
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.attention = MultiHeadAttention(d_model, **attention)
        self.mlp_norm = nn.LayerNorm(d_model, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, d_model, bias=False),
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, cache: Cache | None = None, **visibility: Any) -> Tensor:
        """(b, n, d_model) in and out; `visibility` holds attn_mask, key_mask, is_causal."""
        x = x + self.drop(self.attention(self.attention_norm(x), cache=cache, **visibility))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


def blocks(
    num_layers: int,
    d_model: int,
    attention: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    mlp_ratio: float,
    dropout: float,
) -> nn.ModuleList:
    """`num_layers` blocks; `attention` is one set of options for all, or one per layer.

    Weights that write to the residual stream start smaller by sqrt(2 * num_layers).
    Source: Radford et al., GPT-2 (2019), section 2.3.
    """
    layers = per_layer(attention, num_layers)
    stack = nn.ModuleList(Block(d_model, options, mlp_ratio, dropout) for options in layers)
    for block in stack:
        for writer in (block.attention.output, block.mlp[-1]):
            nn.init.normal_(writer.weight, std=(2 * num_layers * writer.in_features) ** -0.5)
    return stack


def per_layer(
    attention: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    num_layers: int,
    known: Sequence[str] = OPTIONS,
    **defaults: Any,
) -> list[Mapping[str, Any]]:
    """Options of each layer, of one set for all or one per layer, over `defaults`.

    Raises ValueError for what are no `known` options, for layers that do not know their num_heads,
    and for as many as there are no layers.
    """
    check_whole(num_layers=num_layers)
    listed = isinstance(attention, Sequence) and not isinstance(attention, str)
    layers = attention if listed else [attention] * num_layers
    for options in layers:
        if not isinstance(options, Mapping):
            raise ValueError(f"attention must be options like {{'num_heads': 4}}, got {options!r}")
        for option in options:
            if option not in known:
                raise ValueError("attention: " + unknown("option", option, known))
        if "num_heads" not in {**defaults, **options}:
            raise ValueError("attention needs num_heads: give {'num_heads': 4}, say")
    if len(layers) != num_layers:
        raise ValueError(f"attention lists {len(layers)} layers, num_layers is {num_layers}")
    return [{**defaults, **options} for options in layers]


def check_ids(tokens: Tensor) -> None:
    """Raise ValueError for tokens that are no numbers of a vocabulary."""
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")


def given(local: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's arguments, from the ``locals()`` of its first line: what `save` writes.

    >>> def __init__(self, width, depth=2):
    ...     return given(locals())
    >>> __init__(None, 8)
    {'width': 8, 'depth': 2}
    """
    own = {name: value for name, value in local.items() if name not in ("self", "__class__")}
    return copy.deepcopy(own)
