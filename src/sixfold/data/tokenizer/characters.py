"""One id per character, numbered by code point."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sixfold.data.tokenizer._ids import checked
from sixfold.errors import DataError


@dataclass(frozen=True)
class Characters:
    """Characters of a fixed alphabet, which is sorted and holds none twice.

    >>> Characters("abc").encode("cab").tolist()
    [2, 0, 1]
    """

    alphabet: str

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise DataError("an alphabet needs at least one character; give a text")
        if "".join(sorted(set(self.alphabet))) != self.alphabet:
            raise DataError("an alphabet must be sorted and hold no character twice")

    @property
    def vocab_size(self) -> int:
        """How many characters the alphabet has."""
        return len(self.alphabet)

    def encode(self, text: str) -> Tensor:
        """Ids (n,) of a text of n characters.

        Raises DataError for a character outside the alphabet, and names it.
        """
        known, points = _code_points(self.alphabet), _code_points(text)
        ids = np.searchsorted(known, points).clip(max=len(known) - 1)
        strange = np.flatnonzero(known[ids] != points)
        if strange.size:
            first = int(strange[0])
            raise DataError(
                f"character {text[first]!r} at index {first} is not in the alphabet of "
                f"{self.vocab_size}; build the tokenizer from text that holds it, or use 'bpe'"
            )
        return torch.from_numpy(ids.astype(np.int64))

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids (n,).

        Raises DataError for an id outside the alphabet.
        """
        return "".join(self.alphabet[i] for i in checked(ids, self.vocab_size))

    def to_json(self) -> str:
        """The alphabet as JSON."""
        return json.dumps({"alphabet": self.alphabet})


def build(text: str, *, vocab_size: int | None = None) -> Characters:
    """The tokenizer of every character in `text`.

    Raises DataError for an empty text, or a `vocab_size`: the text alone decides.

    >>> build("hello").alphabet
    'ehlo'
    """
    if vocab_size is not None:
        raise DataError(
            "the text decides how many characters there are: leave vocab_size out, or use 'bpe'"
        )
    return Characters("".join(sorted(set(text))))


def from_json(text: str) -> Characters:
    """The tokenizer that `Characters.to_json` wrote."""
    return Characters(json.loads(text)["alphabet"])


def _code_points(text: str) -> np.ndarray:
    # surrogatepass: a lone surrogate is a legal Python character and gets its id like any other
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
