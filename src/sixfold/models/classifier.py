"""A classifier of token sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sixfold.attention.allowed import check_whole
from sixfold.models._block import blocks, check_ids, given, per_layer

ROTARY_THETA = 10_000.0
EMBEDDING_STD = 0.02


class SequenceClassifier(nn.Module):
    """Bidirectional blocks over the real tokens, their mean, and a linear head.

    logits = W mean over {t : x_t != pad} of norm(h_t) + b

    Positions are relative (rotary), so padding may stand on either side, and no amount of it
    changes the logits. A row of nothing but padding gives b.

    Args:
        vocab_size: number of tokens, padding included.
        num_classes: number of classes.
        context: longest sequence accepted.
        d_model: width.
        num_layers: blocks.
        attention: options of `MultiHeadAttention`, for all layers or one mapping per layer.
        pad: the token that fills a row, seen by nothing.
        mlp_ratio: hidden width of the MLP over d_model.
        dropout: probability of dropping a residual update.

    Raises:
        ValueError: for sizes below 1, a pad outside the vocabulary, tokens that are no whole
            numbers, and longer sequences.

    >>> import torch
    >>> model = SequenceClassifier(vocab_size=50, num_classes=2, context=16)
    >>> model(torch.tensor([[4, 7, 9, 0, 0]])).shape
    torch.Size([1, 2])
    """

    def __init__(  # noqa: PLR0913 - three sizes of the data, then what all models share
        self,
        vocab_size: int,
        num_classes: int,
        context: int,
        d_model: int = 128,
        num_layers: int = 2,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {"num_heads": 4},
        pad: int = 0,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.arguments = given(locals())
        sizes = {"vocab_size": vocab_size, "num_classes": num_classes, "context": context}
        check_whole(**sizes, d_model=d_model)
        if not 0 <= pad < vocab_size:
            raise ValueError(f"pad must be in [0, {vocab_size}), got {pad}")
        layers = per_layer(attention, num_layers, rope_theta=ROTARY_THETA)
        self.context, self.pad = context, pad
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.drop = nn.Dropout(dropout)
        self.blocks = blocks(num_layers, d_model, layers, mlp_ratio, dropout)
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, num_classes)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=d_model**-0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (b, num_classes) of sequences (b, n)."""
        check_ids(tokens)
        return self.head(self.pooled(self.embedding(tokens), tokens != self.pad))

    def pooled(self, x: Tensor, real: Tensor) -> Tensor:
        """Mean state (b, d_model) of embedded tokens (b, n, d_model) where `real` (b, n)."""
        if x.shape[1] > self.context:
            raise ValueError(
                f"sequence of {x.shape[1]} tokens is longer than the context of {self.context}"
            )
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, key_mask=real)
        weight = real.to(x.dtype)[..., None]
        return (self.norm(x) * weight).sum(1) / weight.sum(1).clamp(min=1)

    def outer_flops(self, tokens: int) -> int:  # noqa: ARG002 - one head per sequence
        """FLOPs of the head, for one sequence."""
        return 2 * self.head.weight.numel()


build = SequenceClassifier
