"""Move the weights by a smaller learning rate than the schedule's, for a while.

rate <- rate / 2^power in the optimizer's own step alone: the schedule goes on undisturbed, and when
the shield ends it is what it would have been.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import WHOLE, Expectation, HeadId
from sixfold.governor.alarms import Alarm
from sixfold.governor.limits import ActionLimits


@dataclass(frozen=True)
class LearningRateShield:
    """Divide the learning rates by 2**power while it lasts."""

    name: ClassVar[str] = "learning_rate_shield"
    cost: ClassVar[str] = "training is slower while it lasts"
    target: HeadId
    power: int
    lasts: int
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Put the shield up."""
        subject.shield += self.power

    def undo(self, subject: Any) -> None:
        """Take it down."""
        subject.shield -= self.power


def build(alarm: Alarm, actions: ActionLimits) -> LearningRateShield:
    """The shield that brings the update ratio of `alarm` to its bound or just below."""
    power = max(1, math.ceil(math.log2(alarm.value / actions.shield_to)))
    expects = Expectation(alarm.signal, alarm.target, "fall", alarm.limit, 2 * actions.within)
    return LearningRateShield(WHOLE, power, actions.shield_steps, expects)
