"""`nn.MultiheadAttention`, also inside `nn.TransformerEncoder` and `nn.TransformerDecoder`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sixfold.contracts import Heads
from sixfold.integrations.convert._stand_in import (
    Family,
    StandIn,
    Wanted,
    attention_like,
    restore_stand_ins,
)
from sixfold.ops.attend.reference import restrict


class ForMultihead(StandIn):
    """Called as `nn.MultiheadAttention` is, masks and all: there True means that a key is hidden.

    Rows that may attend to nothing give the bias of the output projection, not NaN; weights are
    those before dropout.
    """

    in_proj_bias = None
    """Tells the layers of PyTorch that there is no shortcut past this module."""

    _qkv_same_embed_dim = True

    def __init__(self, shell: nn.MultiheadAttention, wanted: Wanted) -> None:
        super().__init__(shell)
        self.embed_dim, self.num_heads = shell.embed_dim, shell.num_heads
        self.head_dim, self.batch_first = shell.head_dim, shell.batch_first
        self.was_nested = False
        heads = Heads(self.embed_dim, self.num_heads, self.head_dim, self.num_heads)
        self.attention = attention_like(shell.in_proj_weight, heads, wanted, shell.dropout)
        self.attention.projection.qkv.weight = shell.in_proj_weight
        self.attention.projection.qkv.bias = shell.in_proj_bias
        self.attention.output = shell.out_proj

    def original(self) -> nn.Module:
        """The shell, given back what was learned."""
        qkv = self.attention.projection.qkv
        self.shell.in_proj_weight, self.shell.in_proj_bias = qkv.weight, qkv.bias
        self.shell.out_proj = self.attention.output
        return self.shell

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002 - the signature that callers know
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; ValueError where keys and values differ."""
        if key is not value:
            raise ValueError("key and value must be one tensor: one projection serves both")
        context = None if query is key else key
        is_batched = query.ndim == 3
        if not is_batched:
            query, context, key_padding_mask = (
                None if t is None else t[None] for t in (query, context, key_padding_mask)
            )
        elif not self.batch_first:
            query = query.transpose(0, 1)
            context = None if context is None else context.transpose(0, 1)
        mask = self.visible(attn_mask, key_padding_mask, query.shape[0])
        causal = is_causal and attn_mask is None
        found = self.attention(
            query, context, attn_mask=mask, is_causal=causal, need_weights=need_weights
        )
        out, weights = found if need_weights else (found, None)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def visible(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int
    ) -> Tensor | None:
        """Both masks as one in our sense: True = may attend, or floats that are added."""
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        mask = flipped(attn_mask)
        if key_padding_mask is None:
            return mask
        keys = flipped(key_padding_mask)[:, None, None, :]
        if keys.dtype == torch.bool:
            return restrict(mask, keys)
        if mask is None:
            return keys
        return restrict(keys, mask) if mask.dtype == torch.bool else mask + keys


def flipped(mask: Tensor | None) -> Tensor | None:
    """True where a key is seen instead of hidden; floats are what they were."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


class Multihead(Family):
    """`nn.MultiheadAttention` with one width for queries, keys and values."""

    def claims(self, module: nn.Module) -> bool:
        """The class itself, or one made from it."""
        return isinstance(module, nn.MultiheadAttention)

    def stand_in(self, module: nn.Module, wanted: Wanted) -> nn.Module:
        """Raise ValueError for what a layer of ours does not have."""
        if type(module) is not nn.MultiheadAttention:
            raise ValueError(f"{type(module).__name__} may compute something else")
        if not module._qkv_same_embed_dim:
            raise ValueError(f"kdim {module.kdim} and vdim {module.vdim} must be embed_dim")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn add keys that none of ours would be")
        return ForMultihead(module, wanted)

    def settle(self, model: nn.Module) -> None:
        """Stacks that would hand nested tensors to their layers hand them padded ones."""
        for stack in model.modules():
            if isinstance(stack, nn.TransformerEncoder) and stack.use_nested_tensor:
                for layer in stack.layers:
                    if isinstance(layer.self_attn, ForMultihead):
                        stack.use_nested_tensor, layer.self_attn.was_nested = False, True

    def restore(self, model: nn.Module) -> int:
        """Put back the modules, and the shortcut of their stacks."""
        for stack in model.modules():
            if isinstance(stack, nn.TransformerEncoder):
                stack.use_nested_tensor |= any(
                    getattr(layer.self_attn, "was_nested", False) for layer in stack.layers
                )
        return restore_stand_ins(model, ForMultihead)


def build() -> Multihead:
    """The family."""
    return Multihead()
