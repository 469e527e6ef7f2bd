"""What the text loaders share: splitting, tokenizing, and a generated text."""

from __future__ import annotations

import numpy as np

from sixfold import discover
from sixfold.data._kinds import TokenStream
from sixfold.errors import DataError


def token_stream(
    text: str, context: int, tokenizer: str, vocab_size: int | None, validation_fraction: float
) -> TokenStream:
    """`text` with its last `validation_fraction` of characters held out, as tokens.

    Raises DataError for a fraction outside (0, 1) or a text too short for `context`.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction must lie in (0, 1), not {validation_fraction}")
    cut = int(len(text) * (1 - validation_fraction))
    train, validation = text[:cut], text[cut:]
    build = discover.load("sixfold.data.tokenizer", tokenizer)
    # an alphabet is no statistic, so all text may add to it; everything else learns from train only
    codec = build(text if tokenizer == "characters" else train, vocab_size=vocab_size)
    return TokenStream(codec.encode(train), codec.encode(validation), context, codec)


def generated_text(seed: int, sentences: int) -> str:
    """Sentences ``the <noun> <verb> the <noun>.`` with seeded words, for tests without data."""
    rng = np.random.default_rng(seed)
    nouns, verbs = ("cat", "dog", "owl", "fox"), ("sees", "hears", "follows")
    return "".join(
        f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n"
        for _ in range(sentences)
    )
