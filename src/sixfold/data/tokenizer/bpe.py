"""Byte-pair encoding over bytes: any text has ids, frequent pieces have one.

Starts from the 256 bytes and merges the most frequent adjacent pair until `vocab_size` is reached
(Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes as in GPT-2). The work is done
by the ``tokenizers`` package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sixfold.data.tokenizer._ids import checked
from sixfold.errors import DataError

_BYTES = 256


@dataclass(frozen=True, eq=False)
class BytePairs:
    """A trained byte-pair encoding; `model` is a ``tokenizers.Tokenizer``."""

    model: Any

    @property
    def vocab_size(self) -> int:
        """The 256 bytes and the learned merges."""
        return self.model.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """Ids (n,) of a text; n is at most its length in bytes of UTF-8."""
        return torch.tensor(self.model.encode(text).ids, dtype=torch.int64)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids (n,); half a character becomes U+FFFD.

        Raises DataError for an id outside the vocabulary.
        """
        return self.model.decode(checked(ids, self.vocab_size))

    def to_json(self) -> str:
        """Vocabulary and merges in the format of the ``tokenizers`` package."""
        return self.model.to_str()


def build(text: str, *, vocab_size: int | None = None) -> BytePairs:
    """Train on `text` up to `vocab_size` ids (None: 1024); a short text has fewer merges.

    Raises DataError for an empty text or fewer ids than bytes, ImportError without the package.

    >>> build("low lower lowest " * 9, vocab_size=260).encode("low").shape
    torch.Size([1])
    """
    vocab_size = 1024 if vocab_size is None else vocab_size
    if vocab_size < _BYTES:
        raise DataError(f"vocab_size must be at least the {_BYTES} bytes, not {vocab_size}")
    if not text:
        raise DataError("byte pairs are learned from text; give a text")
    package = _package()
    model = package.Tokenizer(package.models.BPE())
    model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([text], trainer)
    return BytePairs(model)


def from_json(text: str) -> BytePairs:
    """The tokenizer that `BytePairs.to_json` wrote."""
    return BytePairs(_package().Tokenizer.from_str(text))


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "byte-pair encoding needs the tokenizers package: pip install 'sixfold[text]'"
        ) from error
    return tokenizers
