"""The governor as a function: (state, snapshot, limits) -> (state, decisions).

No model, no clock, no randomness: a recorded run can be decided again, with other limits too.
State is plain values, so that it can be written into a checkpoint as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, TypeGuard

from sixfold.contracts import Change, Evidence, Expectation, HeadId, Snapshot
from sixfold.governor import alarms
from sixfold.governor.alarms import Alarm
from sixfold.governor.limits import Limits
from sixfold.governor.protocols import entropy_term, qk_clip

PROTOCOLS = {"qk_clip": qk_clip.QKClip, "entropy_term": entropy_term.EntropyTerm}


@dataclass(frozen=True)
class Pending:
    """A change in force: being judged until `held` is known, ended at `ends`."""

    number: int
    change: Change
    step: int
    held: bool | None = None


@dataclass(frozen=True)
class State:
    """Everything the governor remembers between steps."""

    memory: alarms.Memory = field(default_factory=alarms.Memory)
    pending: tuple[Pending, ...] = ()
    history: tuple[tuple[int, str, HeadId], ...] = ()
    count: int = 0


class Applied(NamedTuple):
    """A change to make now, with the number it is journalled under."""

    number: int
    change: Change
    alarm: Alarm


class Judged(NamedTuple):
    """What came of an earlier change."""

    number: int
    change: Change
    evidence: Evidence


class Undone(NamedTuple):
    """A change to take back now, and why."""

    number: int
    change: Change
    reason: str


class Decisions(NamedTuple):
    """What the governor says and does about one snapshot."""

    alarms: tuple[Alarm, ...]
    judged: tuple[Judged, ...]
    undone: tuple[Undone, ...]
    applied: tuple[Applied, ...]


def step(state: State, snapshot: Snapshot, limits: Limits) -> tuple[State, Decisions]:
    """Decide about one snapshot.

    Alarms first, then a verdict on earlier changes, then undoing of what failed or has run its
    time, then new changes for the heads that are still in trouble.
    """
    memory, raised, troubled = alarms.judge(state.memory, snapshot, limits.alarms)
    pending, judged = verdicts(state.pending, snapshot)
    pending, undone = endings(pending, judged, snapshot.step)
    count, applied, history = state.count, [], state.history
    for alarm in troubled:
        change = answer(
            alarm,
            replace(state, pending=tuple(pending), history=history),
            undone,
            limits,
            snapshot.step,
        )
        if change is not None:
            count += 1
            applied.append(Applied(count, change, alarm))
            pending.append(Pending(count, change, snapshot.step))
            history = (*history, (snapshot.step, change.name, change.target))
    state = State(memory, tuple(pending), history, count)
    return state, Decisions(raised, judged, undone, tuple(applied))


def verdicts(
    pending: tuple[Pending, ...], snapshot: Snapshot
) -> tuple[list[Pending], tuple[Judged, ...]]:
    """Compare what was promised with what came, as soon as it is shown or its time is over."""
    left, judged = [], []
    for item in pending:
        expects = item.change.expects
        value = snapshot.signal(expects.signal, expects.target)
        if item.held is None and value is not None and snapshot.step > item.step:
            held = value < expects.bound if expects.direction == "fall" else value > expects.bound
            if held or snapshot.step >= item.step + expects.within:
                judged.append(
                    Judged(item.number, item.change, Evidence(held, value, snapshot.step))
                )
                item = replace(item, held=held)
        left.append(item)
    return left, tuple(judged)


def endings(
    pending: list[Pending], judged: tuple[Judged, ...], now: int
) -> tuple[list[Pending], tuple[Undone, ...]]:
    """Take back what failed and what has run its time; forget what held and is done."""
    failed = {verdict.number for verdict in judged if not verdict.evidence.held}
    left, undone = [], []
    for item in pending:
        over = item.change.lasts is not None and now >= item.step + item.change.lasts
        if item.number in failed:
            undone.append(Undone(item.number, item.change, "it did not do what it promised"))
        elif over:
            undone.append(Undone(item.number, item.change, "its time is over"))
        elif item.held is None or item.change.lasts is not None:
            left.append(item)
    return left, tuple(undone)


def answer(
    alarm: Alarm, state: State, undone: tuple[Undone, ...], limits: Limits, now: int
) -> Change | None:
    """The least invasive change for a head in trouble, or None where it has to wait.

    A clip first; the entropy term where the head has been clipped often, or where entropy is what
    alarms. What is being taken back at this step is made up for.
    """
    head, actions = alarm.target, limits.actions
    mine = [(when, name) for when, name, target in state.history if target == head]
    waits = mine and now - mine[-1][0] < actions.cooldown
    if len(mine) >= actions.budget or waits or any(p.change.target == head for p in state.pending):
        return None
    clips = sum(name == "qk_clip" for _, name in mine)
    terms = len(mine) - clips
    if alarm.signal == "max_logit" and clips < actions.clips_before_entropy * (terms + 1):
        returned = sum(u.change.power for u in undone if is_clip_of(u.change, head))
        return qk_clip.build(head, alarm.value * 2.0**returned, actions.clip_to, actions.within)
    floor = alarms.own_median(state.memory, "entropy", head)
    if floor is None:
        return None
    weight, lasts = actions.entropy_coefficient, actions.entropy_steps
    return entropy_term.build(head, floor, weight, lasts, within=lasts // 2)


def is_clip_of(change: Change, head: HeadId) -> TypeGuard[qk_clip.QKClip]:
    """Whether a change is a clip of this head."""
    return isinstance(change, qk_clip.QKClip) and change.target == head


def state_dict(state: State) -> dict[str, Any]:
    """State as plain JSON values."""
    return {
        "memory": alarms.memory_dict(state.memory),
        "pending": [
            {
                "number": p.number, "step": p.step, "held": p.held, "name": p.change.name,
                "change": asdict(p.change),
            }
            for p in state.pending
        ],
        "history": [[when, name, list(head)] for when, name, head in state.history],
        "count": state.count,
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
    )


def revive(name: str, values: Mapping[str, Any]) -> Change:
    """A change from its plain values."""
    target = HeadId(*values["target"])
    expects = Expectation(**{**values["expects"], "target": target})
    change: Change = PROTOCOLS[name](**{**values, "target": target, "expects": expects})
    return change
