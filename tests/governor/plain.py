"""A transformer written without Sixfold, and a loop around it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, tokens: int = 11, width: int = 16, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, tokens)

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, attention in zip(self.norms, self.attention, strict=True):
            x = x + self.drop(attention(norm(x)))
        return self.head(x)


def made(learning_rate: float = 1e-2, seed: int = 0, **sizes):
    torch.manual_seed(seed)
    model = Model(**sizes)
    return model, torch.optim.AdamW(model.parameters(), lr=learning_rate)


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 11, (4, 12), generator=generator) for _ in range(count)]


def move(model, optimizer, tokens, governor=None, spoil=None, scheduler=None):
    """One step; `spoil` may alter the loss, or the gradients before the optimizer sees them."""
    loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    extra = None if governor is None else governor.penalty()
    (loss if extra is None else loss + extra).backward()
    if spoil is not None:
        spoil(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    if scheduler is not None:
        scheduler.step()
    return loss.detach() if governor is None else governor.process_step(loss)
