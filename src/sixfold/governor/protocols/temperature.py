"""Warm one head's attention for a while: its logits are divided by a power of two, then restored.

logits_h <- logits_h / 2^power. Other than a QK-clip it ends by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import Expectation, HeadId


@dataclass(frozen=True)
class Temperature:
    """Divide one head's logits by 2**power while it lasts."""

    name: ClassVar[str] = "temperature"
    cost: ClassVar[str] = "one head attends less sharply while it lasts; no added time"
    target: HeadId
    power: int
    lasts: int
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Warm the head."""
        subject.layers[self.target.layer].scale_head_(self.target.head, -self.power)

    def undo(self, subject: Any) -> None:
        """Cool it again, exactly."""
        subject.layers[self.target.layer].scale_head_(self.target.head, self.power)


def build(target: HeadId, entropy: float, lasts: int, within: int) -> Temperature:
    """Half the logits of `target` for `lasts` steps; its entropy must rise above `entropy`."""
    return Temperature(target, 1, lasts, Expectation("entropy", target, "rise", entropy, within))
