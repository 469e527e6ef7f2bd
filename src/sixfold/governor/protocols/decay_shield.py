"""Let weights decay more slowly than the optimizer is told to.

weight_decay <- weight_decay / 2^power in the optimizer's own step alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import WHOLE, Expectation, HeadId
from sixfold.governor.alarms import Alarm
from sixfold.governor.limits import ActionLimits

POWER = 6


@dataclass(frozen=True)
class DecayShield:
    """Divide the weight decay by 2**power."""

    name: ClassVar[str] = "decay_shield"
    lasts: ClassVar[int | None] = None
    cost: ClassVar[str] = "weights are larger than the recipe means them to be"
    target: HeadId
    power: int
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Put the shield up."""
        subject.shields["weight_decay"] += self.power

    def undo(self, subject: Any) -> None:
        """Take it down."""
        subject.shields["weight_decay"] -= self.power


def build(alarm: Alarm, actions: ActionLimits) -> DecayShield:
    """The shield that keeps all weights together above half of what they are."""
    expects = Expectation("weight_norm", WHOLE, "rise", 0.5 * alarm.value, 2 * actions.within)
    return DecayShield(WHOLE, POWER, expects)
