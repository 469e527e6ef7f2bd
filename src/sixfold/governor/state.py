"""What the governor remembers between steps: plain values, so that a checkpoint can hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sixfold.contracts import Change, Expectation, HeadId
from sixfold.governor import alarms, ladder
from sixfold.governor.alarms import Memory
from sixfold.governor.protocols._weights import Weights
from sixfold.governor.protocols.rollback import Rollback

History = tuple[tuple[int, str, HeadId], ...]
"""Step, name and target of changes, in order."""
SKIPS = 3
"""Skipped steps that are remembered: so many in a row are asked about."""


@dataclass(frozen=True)
class Pending:
    """A change in force: being judged until `held` is known, ended at `ends`."""

    number: int
    change: Change
    step: int
    held: bool | None = None


@dataclass(frozen=True)
class State:
    """Everything the governor remembers between steps.

    history: changes made so far, see `noted`. snapshots: steps whose copies of the run are kept.
    helpless_since: the step from which on something critical has had no answer. stopped: whether
    that has been said.
    """

    memory: Memory = field(default_factory=Memory)
    pending: tuple[Pending, ...] = ()
    history: History = ()
    count: int = 0
    snapshots: tuple[int, ...] = ()
    helpless_since: int | None = None
    stopped: bool = False

    def without(self, number: int) -> State:
        """The same without a change that could not be made."""
        return replace(self, pending=tuple(p for p in self.pending if p.number != number))

    def with_change(self, number: int, change: Change, now: int) -> State:
        """The same with a change that someone made by hand."""
        return replace(
            self,
            pending=(*self.pending, Pending(number, change, now)),
            history=noted(self.history, now, change),
            count=number,
        )


def noted(history: History, now: int, change: Change) -> History:
    """The history with one more change.

    Every change of a head counts towards its budget, which bounds them; skipped steps count towards
    none, and a long run may have any number of them: only the last few are kept.
    """
    skipped = [entry for entry in history if entry[1] == ladder.SKIP]
    if change.name == ladder.SKIP and len(skipped) >= SKIPS:
        history = tuple(entry for entry in history if entry is not skipped[0])
    return (*history, (now, change.name, change.target))


def outlives(item: Pending) -> bool:
    """Whether another process can take a change back: what it replaced is in no checkpoint."""
    return not isinstance(item.change, Weights | Rollback)


def whole(state: State) -> bool:
    """Whether another process goes on with all of a state."""
    return not state.snapshots and all(map(outlives, state.pending))


def state_dict(state: State) -> dict[str, Any]:
    """State as plain JSON values.

    Changes of weights are left out: what they replaced does not outlive the process, so that they
    stay as they were made.
    """
    return {
        "memory": alarms.memory_dict(state.memory),
        "pending": [
            {
                "number": p.number, "step": p.step, "held": p.held, "name": p.change.name,
                "change": asdict(p.change),
            }
            for p in state.pending
            if outlives(p)
        ],
        "history": [[when, name, list(head)] for when, name, head in state.history],
        "count": state.count,
        "snapshots": list(state.snapshots),
        "helpless_since": state.helpless_since,
        "stopped": state.stopped,
    }  # fmt: skip


def load_state(values: Mapping[str, Any]) -> State:
    """The inverse of `state_dict`."""
    return State(
        memory=alarms.load_memory(values["memory"]),
        pending=tuple(
            Pending(p["number"], revive(p["name"], p["change"]), p["step"], p["held"])
            for p in values["pending"]
        ),
        history=tuple((when, name, HeadId(*head)) for when, name, head in values["history"]),
        count=values["count"],
        snapshots=tuple(values["snapshots"]),
        helpless_since=values["helpless_since"],
        stopped=values["stopped"],
    )


def resumed(state: State) -> State:
    """The state with which another process goes on: copies of the run did not outlive the first."""
    return replace(load_state(state_dict(state)), snapshots=())


def revive(name: str, values: Mapping[str, Any]) -> Change:
    """A change from its plain values."""
    target = HeadId(*values["target"])
    known = values["expects"]
    expects = Expectation(**{**known, "target": HeadId(*known["target"])})
    kind = ladder.PROTOCOLS[name]
    change: Change = kind(**{**values, "target": target, "expects": expects})
    return change
