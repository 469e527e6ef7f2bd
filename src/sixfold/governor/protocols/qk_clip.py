"""Per-head QK-clip: divide one head's logits by a power of two.

logits_h <- logits_h / 2^n, n the least integer that brings the largest logit to the bound, kept by
the score beside the weights. Powers of two change exponents only, so undoing is exact and needs no
copy. Source: Kimi K2, arXiv 2507.20534, section 2.1 (there by sqrt(tau / S_max)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import Expectation, HeadId


@dataclass(frozen=True)
class QKClip:
    """Halve one head's logits `power` times."""

    name: ClassVar[str] = "qk_clip"
    cost: ClassVar[str] = "one head's logits shrink; no added time"
    lasts: ClassVar[int | None] = None
    target: HeadId
    power: int
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Scale the head down."""
        subject.layers[self.target.layer].scale_head_(self.target.head, -self.power)

    def undo(self, subject: Any) -> None:
        """Scale the head up again, exactly."""
        subject.layers[self.target.layer].scale_head_(self.target.head, self.power)


def build(target: HeadId, value: float, clip_to: float, within: int) -> QKClip:
    """The clip that brings a maximal logit of `value` to `clip_to` or just below.

    >>> build(HeadId(0, 3), value=131.0, clip_to=50.0, within=20).power
    2
    """
    power = max(1, math.ceil(math.log2(value / clip_to)))
    return QKClip(target, power, Expectation("max_logit", target, "fall", value, within))
