"""A decoder language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_whole
from sixfold.attention.cache import KeyValueCache
from sixfold.contracts import Cache
from sixfold.discover import unknown
from sixfold.models._block import blocks, check_ids, given, per_layer

POSITIONS = ("rotary", "learned")
ROTARY_THETA = 10_000.0
EMBEDDING_STD = 0.02


class LanguageModel(nn.Module):
    """Token embedding, causal blocks, and a head that shares the embedding's weights.

    p(x_{t+1} | x_1 .. x_t) = softmax(E norm(h_t))

    Args:
        vocab_size: number of tokens.
        context: longest sequence seen in training.
        d_model: width.
        num_layers: blocks.
        attention: options of `MultiHeadAttention`, for all layers or one mapping per layer.
        positions: ``rotary`` (relative, inside attention) or ``learned`` (absolute, added).
        mlp_ratio: hidden width of the MLP over d_model.
        dropout: probability of dropping a residual update.

    Raises:
        ValueError: for sizes below 1, unknown positions or attention options, tokens that are no
            whole numbers, and for sequences longer than `context` where positions are learned.

    >>> model = LanguageModel(vocab_size=65, context=32, d_model=28, num_layers=2,
    ...                       attention={"num_heads": 7, "mixer": "hexagonal"})
    >>> model(torch.zeros(1, 10, dtype=torch.long)).shape
    torch.Size([1, 10, 65])
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int = 128,
        num_layers: int = 4,
        attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] = {"num_heads": 4},
        positions: str = "rotary",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.arguments = given(locals())
        check_whole(vocab_size=vocab_size, context=context, d_model=d_model)
        if positions not in POSITIONS:
            raise ValueError(unknown("positions", positions, POSITIONS))
        theta = ROTARY_THETA if positions == "rotary" else None
        layers = per_layer(attention, num_layers, rope_theta=theta)
        self.context = context
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(context, d_model) if positions == "learned" else None
        self.drop = nn.Dropout(dropout)
        self.blocks = blocks(num_layers, d_model, layers, mlp_ratio, dropout)
        self.norm = nn.LayerNorm(d_model, bias=False)
        for table in (self.embedding, self.position):
            if table is not None:
                nn.init.normal_(table.weight, std=EMBEDDING_STD)

    def forward(
        self,
        tokens: Tensor,
        *,
        caches: Sequence[Cache] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (b, n, vocab_size) of the token after each of `tokens` (b, n).

        `caches` (one per block) hold earlier segments and are extended; `key_mask` (b, m) is False
        at padding, cached tokens included. Padding on either side moves no position: rotary ones
        are relative, learned ones count real tokens.
        """
        check_ids(tokens)
        states = self.hidden(self.embedding(tokens), caches=caches, key_mask=key_mask)
        return nn.functional.linear(states, self.embedding.weight)

    def hidden(
        self,
        x: Tensor,
        *,
        caches: Sequence[Cache] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """States (b, n, d_model) that the head reads, of embedded tokens of that shape.

        `caches` and `key_mask` as in `forward`.
        """
        past = caches[0].length if caches else 0
        if self.position is not None:
            x = x + self.position(self._places(past, x.shape[1], key_mask, x.device))
        x = self.drop(x)
        for layer, block in enumerate(self.blocks):
            cache = caches[layer] if caches else None
            x = block(x, cache=cache, key_mask=key_mask, is_causal=True)
        return self.norm(x)

    def _places(self, past: int, n: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
        """Positions (n,) or (b, n) of the last n tokens, counted over real ones."""
        end = past + n
        if end > self.context:
            raise ValueError(
                f"sequence of {end} tokens is longer than the context of {self.context} whose "
                "positions were learned"
            )
        if key_mask is None:
            return torch.arange(past, end, device=device)
        if key_mask.ndim != 2 or key_mask.shape[1] != end:
            raise ValueError(f"key_mask must be (b, m) with m = {end}, got {tuple(key_mask.shape)}")
        return (key_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]

    def outer_flops(self, tokens: int) -> int:
        """FLOPs of the head, for one sequence."""
        return 2 * tokens * self.embedding.weight.numel()

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yield one token (b,) at a time, drawn after the prompt `tokens` (b, n).

        Past `context` tokens each step reads the last `context` of them afresh, so that a cache
        never changes what is drawn.

        Args:
            tokens: prompt, at least one token.
            max_new_tokens: how many to draw.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: keep the k most likely.
            top_p: keep the most likely whose probabilities reach p together.
            generator: source of randomness.
            use_cache: False reads the whole sequence at every step.

        Raises:
            ValueError: at the call, for settings that cannot be meant or an empty prompt.
        """
        check_sampling(temperature, top_k, top_p)
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"prompt must be (b, n) with n >= 1, got {tuple(tokens.shape)}")

        def draw(logits: Tensor) -> Tensor:
            return sample(logits, temperature, top_k, top_p, generator)

        return self._continue(tokens, max_new_tokens, draw, use_cache=use_cache)

    @torch.no_grad()
    def _continue(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        draw: Callable[[Tensor], Tensor],
        *,
        use_cache: bool,
    ) -> Iterator[Tensor]:
        was_training = self.training
        self.eval()
        try:
            caches = None
            for _ in range(max_new_tokens):
                fits = use_cache and tokens.shape[1] <= self.context
                if fits and caches is None:
                    caches = [KeyValueCache() for _ in self.blocks]
                    segment = tokens
                else:
                    segment = tokens[:, -1:] if fits else tokens[:, -self.context :]
                drawn = draw(self(segment, caches=caches if fits else None)[:, -1])
                tokens = torch.cat([tokens, drawn[:, None]], dim=1)
                yield drawn
        finally:
            self.train(was_training)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise a ValueError that names the sampling setting that cannot be meant."""
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row of logits (b, vocab_size).

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751 (top-p).

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0.0)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True)
        # a token stays while those before it fall short of p: the first one always does
        dropped = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(dropped.gather(-1, order.argsort(-1)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


build = LanguageModel
