"""Move the weights by a smaller learning rate than the schedule's, for a while.

rate <- rate / 2^power in the optimizer's own step alone: the schedule goes on undisturbed, and when
the shield ends it is what it would have been. It is taken down by halves.
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
        subject.shields["lr"] += self.power

    def undo(self, subject: Any) -> None:
        """Take it down."""
        subject.shields["lr"] -= self.power


def build(alarm: Alarm, power: float, actions: ActionLimits) -> LearningRateShield:
    """Learning rates over 2**power or more; the signal that alarmed must then fall."""
    bound = alarm.value if alarm.signal == "max_logit" else alarm.limit
    expects = Expectation(alarm.signal, alarm.target, "fall", bound, 2 * actions.within)
    return LearningRateShield(WHOLE, max(1, math.ceil(power)), actions.shield_steps, expects)
