"""What attention remembers between segments of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = (torch.int64, torch.int32)


class KeyValueCache:
    """Per-token tensors of one layer, grown by doubling so that generation copies rarely.

    >>> cache = KeyValueCache()
    >>> cache.append("key", torch.zeros(1, 2, 3, 4)).shape, cache.length
    (torch.Size([1, 2, 3, 4]), 3)
    """

    def __init__(self) -> None:
        self.length = 0
        self._room: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}
        self._span: dict[str, int] = {}

    def filled(self, name: str) -> int:
        """Places of an entry, 0 of one that there is not."""
        return self._filled.get(name, 0)

    def entry(self, name: str) -> Tensor:
        """All of an entry, (..., places, width)."""
        return self._room[name][..., : self._filled[name], :]

    def append(self, name: str, entry: Tensor, span: int = 1) -> Tensor:
        """Add (..., n, width) along the token axis and return the whole entry.

        span: tokens that one place stands for; a place is forgotten with the last of its tokens.

        Raises ValueError for an entry of another batch, other heads or another width.
        """
        start = self._filled.get(name, 0)
        end = start + entry.shape[-2]
        room = self._room.get(name)
        if room is not None and around(entry) != around(room):
            raise ValueError(
                f"this cache holds {name} of (batch, heads, width) {around(room)}, "
                f"got {around(entry)}: begin a new cache"
            )
        if torch.is_grad_enabled() and entry.requires_grad:
            # a backward pass will read what is held: it must not be written to
            room = torch.cat([room[..., :start, :], entry], dim=-2) if start else entry
        else:
            if room is None or room.shape[-2] < end:
                room = self._grown(room, entry, start, end)
            room[..., start:end, :] = entry
        self._room[name], self._filled[name], self._span[name] = room, end, span
        self.length = max(self.length, end * span)
        return room[..., :end, :]

    @staticmethod
    def _grown(room: Tensor | None, entry: Tensor, start: int, end: int) -> Tensor:
        """A room for at least `end` tokens that holds the first `start`."""
        larger = entry.new_empty(*entry.shape[:-2], max(2 * start, end, 16), entry.shape[-1])
        if start:
            larger[..., :start, :] = room[..., :start, :]
        return larger

    def crop(self, length: int) -> None:
        """Forget every token after the first `length`.

        Raises ValueError when fewer are held.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self.length = length
        self._filled = {
            name: min(self._filled[name], length // span) for name, span in self._span.items()
        }

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows, as beam search does.

        Raises ValueError for rows that are no tensor (b,) of whole numbers.
        """
        if not (isinstance(rows, Tensor) and rows.ndim == 1 and rows.dtype in WHOLE):
            got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
            raise ValueError(f"rows must be a tensor (b,) of int64 or int32, got {got}")
        self._room = {name: room.index_select(0, rows) for name, room in self._room.items()}


def around(entry: Tensor) -> tuple[int, ...]:
    """The shape of an entry without its places."""
    return (*entry.shape[:-2], entry.shape[-1])
