"""One id per word between white space; id 0 is padding, id 1 stands for every unknown word."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sixfold.data.tokenizer._ids import checked
from sixfold.errors import DataError

_PADDING, _UNKNOWN = "", "<unknown>"


@dataclass(frozen=True)
class Words:
    """Words numbered from 2 in the order given.

    Decoding joins by single spaces, so only known words with single spaces come back as they were.

    >>> Words(("to", "be")).encode("to be or").tolist()
    [2, 3, 1]
    """

    words: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.words:
            raise DataError("a vocabulary needs at least one word; give a text")
        if len(set(self.words)) < len(self.words):
            raise DataError("a vocabulary must hold no word twice")
        object.__setattr__(self, "_ids", {word: i for i, word in enumerate(self.words, start=2)})

    @property
    def vocab_size(self) -> int:
        """The words, padding and unknown."""
        return len(self.words) + 2

    def encode(self, text: str) -> Tensor:
        """Ids (n,) of a text of n words."""
        return torch.tensor([self._ids.get(word, 1) for word in text.split()], dtype=torch.int64)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The words of ids (n,) without the padding.

        Raises DataError for an id outside the vocabulary.
        """
        spelled = (_PADDING, _UNKNOWN, *self.words)
        return " ".join(spelled[i] for i in checked(ids, self.vocab_size) if i)

    def to_json(self) -> str:
        """The words as JSON."""
        return json.dumps({"words": self.words})


def build(text: str, *, vocab_size: int | None = None) -> Words:
    """The words of `text`, most frequent first; with `vocab_size` only so many ids in all.

    Raises DataError for a text without words, or a `vocab_size` that leaves no room for one.

    >>> build("to be or not to be").words
    ('be', 'to', 'not', 'or')
    """
    if vocab_size is not None and vocab_size < 3:
        raise DataError(f"vocab_size must be at least 3 (padding, unknown, a word): {vocab_size}")
    counts = Counter(text.split())
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return Words(tuple(ranked if vocab_size is None else ranked[: vocab_size - 2]))


def from_json(text: str) -> Words:
    """The tokenizer that `Words.to_json` wrote."""
    return Words(tuple(json.loads(text)["words"]))
