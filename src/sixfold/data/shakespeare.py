"""Tiny Shakespeare: 1,115,394 characters of the plays, in the package.

The public-domain text that Karpathy's char-rnn made a yardstick
(https://github.com/karpathy/char-rnn), split as nanoGPT splits it.
"""

from __future__ import annotations

from importlib.resources import files

from sixfold.data._kinds import TokenStream
from sixfold.data._text import generated_text, token_stream


def build(
    *,
    context: int = 64,
    tokenizer: str = "characters",
    vocab_size: int | None = None,
    validation_fraction: float = 0.1,
) -> TokenStream:
    """The plays as tokens; the last `validation_fraction` is for validation.

    `tokenizer` names a file of ``sixfold.data.tokenizer``, and `vocab_size` is for those that
    learn one.

    Raises DataError for a fraction outside (0, 1), ValueError for an unknown tokenizer.

    >>> data = build()
    >>> data.vocab_size, len(data.train), len(data.validation)
    (65, 1003854, 111540)
    """
    text = files("sixfold.data").joinpath("text", "tinyshakespeare.txt").read_bytes().decode()
    return token_stream(text, context, tokenizer, vocab_size, validation_fraction)


def miniature(*, context: int = 16, seed: int = 0) -> TokenStream:
    """A generated text of 200 lines as characters.

    >>> miniature().train_batch(seed=0, step=0, size=4).inputs.shape
    torch.Size([4, 16])
    """
    return token_stream(generated_text(seed, 200), context, "characters", None, 0.1)
