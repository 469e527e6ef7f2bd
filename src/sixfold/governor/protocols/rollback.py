"""Go back to an earlier moment of the run, and leave out the batches since trouble began.

Model, optimizer, scheduler, scaler and random generators are as they were after step `to`; the
batches between it and `since` are trained on again, those from `since` on never. Bit for bit the
run is then one that never saw them.
Source of the practice: Chowdhery et al., PaLM, arXiv 2204.02311, section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import WHOLE, Expectation, HeadId
from sixfold.governor.alarms import Alarm


@dataclass(frozen=True)
class Rollback:
    """The run as after step `to`, without the batches from step `since` on."""

    name: ClassVar[str] = "rollback"
    cost: ClassVar[str] = "the steps since are made again; the batches since are lost"
    lasts: ClassVar[int | None] = None
    target: HeadId
    to: int
    since: int
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Go back."""
        subject.rewind.back(self.to, self.since)

    def undo(self, subject: Any) -> None:
        """Return to the run that was given up."""
        subject.rewind.forward()


def build(to: int, since: int, alarm: Alarm, within: int) -> Rollback:
    """Back to after step `to`; the loss must be below the alarm's limit within so many steps."""
    bound = alarm.limit if alarm.signal == "loss" else float("inf")
    return Rollback(WHOLE, to, since, Expectation("loss", WHOLE, "fall", bound, within))
