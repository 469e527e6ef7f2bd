"""Changes with what was before, what was expected, what came, and how they ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from sixfold.report.headline import outcomes, promise
from sixfold.report.read import Row, Run
from sixfold.report.scale import number


class Action(NamedTuple):
    """One change: its row, its signal when it was made, its last evidence and its undoing."""

    change: Row
    before: float | None
    evidence: Row | None
    undo: Row | None

    @property
    def signal(self) -> str:
        """What it was meant to move."""
        expects = self.change.get("expects")
        return str(expects.get("signal", "")) if isinstance(expects, Mapping) else ""

    @property
    def held(self) -> bool | None:
        """Whether it did what it promised; None as long as nobody knows."""
        return None if self.evidence is None else bool(self.evidence.get("held"))


class Told(NamedTuple):
    """An action in words."""

    who: str
    before: str
    expected: str
    after: str
    end: str


def actions(run: Run) -> list[Action]:
    """Every change of a run, in order."""
    judged = outcomes(run)
    undone = {row.get("id"): row for row in run.journal if row["kind"] == "undo"}
    return [
        Action(row, run.measured.befores.get(row.get("id")), judged.get(row.get("id")),
               undone.get(row.get("id")))
        for row in run.journal
        if row["kind"] == "change"
    ]  # fmt: skip


def told(action: Action, unit: str) -> Told:
    """An action in words; `unit` is that of its signal."""
    change, evidence, undo = action.change, action.evidence, action.undo
    before = "not measured"
    if action.before is not None:
        before = f"{action.signal} {_value(action.before, unit)}"
    after = "not judged"
    if evidence is not None:
        came = evidence.get("value")
        held = "held" if evidence.get("held") else "did not hold"
        shown = f"{_value(came, unit)}, " if isinstance(came, int | float) else ""
        after = f"{shown}{held}, step {number(evidence['step'])}"
    end = ""
    if undo is not None:
        reason = undo.get("reason") or undo.get("text") or ""
        end = f"step {number(undo['step'])}: {reason}".removesuffix(": ")
    who = "by hand" if change.get("by_hand") else "governor"
    if change.get("applied") is False:
        who, after = "governor, not made", "only observed"
    return Told(who, before, promise(change), after, end)


def _value(value: float, unit: str) -> str:
    short = f" {unit}" if unit and math.isfinite(value) and " " not in unit else ""
    return f"{number(float(value))}{short}"
