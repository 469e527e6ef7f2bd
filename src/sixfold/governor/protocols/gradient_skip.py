"""Leave out one step whose gradients are not finite.

The decision falls just before the optimizer moves: gradients are dropped, so that neither weights
nor moments see them. Skipping is all there is to it; nothing has to be taken back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import WHOLE, Expectation, HeadId


@dataclass(frozen=True)
class GradientSkip:
    """A step that did not move the weights."""

    name: ClassVar[str] = "gradient_skip"
    cost: ClassVar[str] = "one batch is lost"
    lasts: ClassVar[int | None] = None
    target: HeadId
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Nothing: the gradients were dropped before the optimizer moved."""

    def undo(self, subject: Any) -> None:
        """Nothing: a skipped step leaves no trace."""


def build(within: int) -> GradientSkip:
    """The record of a skipped step; a finite gradient must come back within so many steps."""
    expects = Expectation("gradient_norm", WHOLE, "fall", math.inf, within)
    return GradientSkip(WHOLE, expects)
