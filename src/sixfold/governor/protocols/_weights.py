"""What protocols share that alter a head's own weights: what they replace is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sixfold.contracts import Expectation, HeadId
from sixfold.governor.watch.layout import Piece


@dataclass(frozen=True)
class Weights:
    """A change of one head's weights. The executor keeps what was there."""

    name: ClassVar[str]
    cost: ClassVar[str]
    lasts: ClassVar[int | None] = None
    roles: ClassVar[str] = "qk"
    target: HeadId
    expects: Expectation

    def pieces(self, subject: Any) -> list[tuple[str, Piece]]:
        """The head's shares of the weights that this change alters, by role."""
        found = subject.layers[self.target.layer].pieces(self.target.head)
        return [(role, piece) for role in self.roles for piece in found[role]]

    def altered(
        self, weight: Tensor, role: str, subject: Any, generator: torch.Generator
    ) -> Tensor:
        """What takes the place of `weight`; chance comes from `generator` alone."""
        raise NotImplementedError

    @torch.no_grad()
    def apply(self, subject: Any) -> None:
        """Alter the weights, and forget the optimizer's moments of them."""
        pieces = self.pieces(subject)
        old = [piece.view().clone() for _, piece in pieces]
        subject.kept.setdefault((self.name, self.target), []).append(old)
        # a generator of its own, the same whenever this step is made again
        generator = torch.Generator().manual_seed(hash((subject.now, *self.target)) % 2**63)
        for role, piece in pieces:
            piece.view().copy_(self.altered(piece.view(), role, subject, generator))
            subject.forget(piece)

    @torch.no_grad()
    def undo(self, subject: Any) -> None:
        """Put back what was there.

        Raises KeyError where it is no longer known: copies do not outlive the process.
        """
        kept = subject.kept[self.name, self.target].pop()
        for (_, piece), old in zip(self.pieces(subject), kept, strict=True):
            piece.view().copy_(old)
            subject.forget(piece)
