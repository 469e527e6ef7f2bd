"""Bound the norm of all gradients: g <- g min(1, bound / ||g||), before the optimizer moves.

Source: Pascanu et al., On the difficulty of training recurrent neural networks, arXiv 1211.5063,
section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import WHOLE, Expectation, HeadId

BOUND = 1.0


@dataclass(frozen=True)
class GradientClip:
    """Bound the norm of all gradients from now on."""

    name: ClassVar[str] = "gradient_clip"
    cost: ClassVar[str] = "large gradients count less"
    lasts: ClassVar[int | None] = None
    target: HeadId
    bound: float
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Set the bound."""
        subject.guard.bound = self.bound

    def undo(self, subject: Any) -> None:
        """Take it away."""
        subject.guard.bound = None


def build(within: int) -> GradientClip:
    """Gradients of norm 1 at most; steps must then move weights by less than a fifth of them."""
    expects = Expectation("update_ratio", WHOLE, "fall", 0.2, 2 * within)
    return GradientClip(WHOLE, BOUND, expects)
