"""Ids as plain integers, checked."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sixfold.errors import DataError


def checked(ids: Iterable[int] | Tensor, vocab_size: int) -> list[int]:
    """`ids` as a list.

    Raises DataError for one outside [0, vocab_size), and names it.
    """
    plain = [int(i) for i in ids]
    for index, i in enumerate(plain):
        if not 0 <= i < vocab_size:
            raise DataError(f"id {i} at index {index} is outside [0, {vocab_size})")
    return plain
