"""The governor as a function: (state, snapshot, limits) -> (state, decisions).

No model, no clock, no randomness: a recorded run can be decided again, with other limits too.
State is plain values, so that it can be written into a checkpoint as JSON.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from sixfold.contracts import Change, Evidence, Snapshot
from sixfold.governor import alarms, ladder, rules
from sixfold.governor.alarms import Alarm, Memory
from sixfold.governor.limits import Limits
from sixfold.governor.protocols._weights import Weights
from sixfold.governor.protocols.qk_clip import QKClip
from sixfold.governor.protocols.rollback import Rollback
from sixfold.governor.protocols.temperature import Temperature
from sixfold.governor.state import Pending, State, noted


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
    """What the governor says and does about one snapshot.

    copies: the steps whose copies of the run are kept from now on, this one among them where it is
    a good moment. stop: why going on is no use, or None.
    """

    alarms: tuple[Alarm, ...]
    judged: tuple[Judged, ...]
    undone: tuple[Undone, ...]
    applied: tuple[Applied, ...]
    copies: tuple[int, ...] = ()
    stop: str | None = None


OVER = "its time is over"
OLDEST = 25
"""Age of a copy, in times of how often one is made, at which it is given up."""
KEPT = 3
"""Copies of a run that are kept for rolling back."""


def step(state: State, snapshot: Snapshot, limits: Limits) -> tuple[State, Decisions]:
    """Decide about one snapshot.

    Alarms first, then a verdict on earlier changes, then undoing of what failed or has run its
    time, then new changes for what is still in trouble.
    """
    present = rules.alarms(state.memory, snapshot, limits.alarms)
    memory, raised, troubled = alarms.judge(state.memory, snapshot, present, limits.alarms)
    pending, judged = verdicts(state.pending, snapshot)
    pending, undone = endings(pending, judged, snapshot, memory, limits)
    count, applied, history, helpless = state.count, [], state.history, None
    for old in undone:
        weaker = ladder.lowered(old.change) if old.reason == OVER else None
        if weaker is not None:
            count += 1
            told = Alarm(snapshot.step, "notice", "learning_rate", weaker.target, 0.0, 0.0)
            applied.append(Applied(count, weaker, told))
            pending = [*pending, Pending(count, weaker, snapshot.step, held=True)]
    for alarm in troubled:
        situation = ladder.Situation(
            alarm, memory, snapshot, history, tuple(p.change for p in pending),
            tuple(u.change for u in undone), state.snapshots, limits,
        )  # fmt: skip
        change = ladder.answer(situation)
        if change is not None:
            count += 1
            applied.append(Applied(count, change, alarm))
            history = noted(history, snapshot.step, change)
            pending = [*pending, Pending(count, change, snapshot.step)]
        elif alarm.level == "critical" and not situation.waits() and not recovers(alarm, memory):
            helpless = alarm
    back = next((item for item in applied if isinstance(item.change, Rollback)), None)
    if back is not None:
        # what else was decided looked at the run that is given up, and what was done to its weights
        # since then is gone with it
        applied = [back]
        pending = [p for p in pending if p.number == back.number or survives(p, back.change.to)]
        shield = ladder.cooler(back.alarm, state.history, memory, limits.actions)
        if shield is not None:
            count += 1
            applied.append(Applied(count, shield, back.alarm))
            history = noted(history, snapshot.step, shield)
            pending = [*pending, Pending(count, shield, snapshot.step)]
        memory = alarms.gone_back(memory)
    since, stop = patience(state, snapshot, helpless, limits)
    copies = kept_copies(state.snapshots, snapshot, memory, applied, limits)
    # what is only said is not in force: nothing of it can be judged or taken back
    in_force = tuple(pending) if limits.acting else ()
    said = since is not None and (state.stopped or stop is not None)
    stop = None if state.stopped else stop
    state = State(memory, in_force, history, count, copies, since, said)
    return state, Decisions(raised, judged, undone, tuple(applied), copies, stop)


def survives(item: Pending, to: int) -> bool:
    """Whether a change in force is still there after going back to step `to`."""
    return item.step <= to or not isinstance(item.change, Weights | QKClip | Temperature)


def patience(
    state: State, snapshot: Snapshot, helpless: Alarm | None, limits: Limits
) -> tuple[int | None, str | None]:
    """Since when something critical has had no answer, and the sentence once that is too long."""
    now = snapshot.step
    if helpless is None and not snapshot.signals:
        return state.helpless_since, None  # between samples nothing is known to be over
    if helpless is None or not limits.acting:
        return None, None
    since = now if state.helpless_since is None else state.helpless_since
    actions = limits.actions
    # a model of NaN does not come back by itself
    patience = actions.stop_after if math.isfinite(helpless.value) else actions.within
    if now - since < patience:
        return since, None
    return since, ladder.diagnosis(helpless, state.history)


def recovers(alarm: Alarm, memory: Memory) -> bool:
    """Whether what is wrong becomes better by itself: a loss that is too high, and falls."""
    return alarm.signal == "loss" and math.isfinite(alarm.value) and alarms.falling(memory.losses)


def kept_copies(
    copies: tuple[int, ...],
    snapshot: Snapshot,
    memory: Memory,
    applied: list[Applied],
    limits: Limits,
) -> tuple[int, ...]:
    """The steps to keep copies of: every so often, and only while nothing critical is raised."""
    for item in applied:
        if isinstance(item.change, Rollback):
            # what is younger than the copy gone back to belongs to the run that was given up
            return tuple(number for number in copies if number <= item.change.to)
    if not limits.rewinding:
        return ()
    every = limits.actions.snapshot_every
    if snapshot.step == 1:
        copies = (0,)  # the moment before the first step
    # batches since the oldest copy are held: it must not become ever older while nothing is calm
    copies = tuple(step for step in copies if snapshot.step - step <= OLDEST * every)
    calm = not any(level == "critical" for level, *_ in memory.raised)
    calm = calm and memory.worse_since is None
    if not calm or snapshot.step % every:
        return copies
    return (*copies, snapshot.step)[-KEPT:]


def skips(gradient_norm: float, limits: Limits) -> bool:
    """Whether this step's gradients must not move the weights; asked before the optimizer does."""
    return limits.alarms.finite and limits.acting and not math.isfinite(gradient_norm)


def verdicts(
    pending: tuple[Pending, ...], snapshot: Snapshot
) -> tuple[list[Pending], tuple[Judged, ...]]:
    """Compare what was promised with what came, as soon as it is shown or its time is over."""
    left, judged = [], []
    for item in pending:
        expects = item.change.expects
        value = snapshot.signal(expects.signal, expects.target)
        if value is None and snapshot.step >= item.step + 2 * expects.within:
            value = math.nan  # what never came has not been kept
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
    pending: list[Pending],
    judged: tuple[Judged, ...],
    snapshot: Snapshot,
    memory: Memory,
    limits: Limits,
) -> tuple[list[Pending], tuple[Undone, ...]]:
    """Take back what failed and what has run its time; forget what held and is done."""
    now = snapshot.step
    failed = {verdict.number for verdict in judged if not verdict.evidence.held}
    left, undone = [], []
    for item in pending:
        over = item.change.lasts is not None and now >= item.step + item.change.lasts
        if over and ladder.still_needed(item.change, snapshot, memory, limits):
            left.append(replace(item, step=now))
        elif item.number in failed:
            undone.append(Undone(item.number, item.change, "it did not do what it promised"))
        elif over:
            undone.append(Undone(item.number, item.change, OVER))
        elif item.held is None or item.change.lasts is not None:
            left.append(item)
    return left, tuple(undone)
