"""Decide a recorded run again, without its model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sixfold.governor import journal
from sixfold.governor.limits import Limits
from sixfold.governor.state import State, load_state, resumed
from sixfold.governor.step import step

FACTS = ("acting", "rewinding", "untouched", "unscaled")
"""What could be done at all is a fact of the run, whatever the limits."""
Row = Mapping[str, Any]


class Replay(NamedTuple):
    """What the governor would have written.

    snapshots: samples that were decided on; steps between them are decided on too.
    `differs` is the first step at which it would have acted otherwise than it did: what the record
    holds after that step is the answer to another action, so the replay ends there.
    """

    rows: tuple[dict[str, Any], ...]
    snapshots: int
    differs: int | None


def actions(rows: Iterable[Row]) -> dict[int, list[Any]]:
    """What was done, by step: changes with their arguments, and undoings."""
    found: dict[int, list[Any]] = {}
    for row in rows:
        if row["kind"] == "change":
            what = (
                "change",
                row["name"],
                row["layer"],
                row["head"],
                sorted(row["arguments"].items()),
            )
        elif row["kind"] == "undo":
            what = ("undo", row["id"])
        else:
            continue
        found.setdefault(row["step"], []).append(what)
    return found


def after(state: State, row: Row) -> State:
    """The state after something that no snapshot explains."""
    if row["kind"] == "resumed":
        return load_state(row["state"]) if "state" in row else resumed(state)
    if row["kind"] == "refused":
        return state.without(row["id"])
    if row.get("by_hand"):
        return state.with_change(row["id"], journal.load_change(row), row["step"])
    return state


def precedes(row: Row, now: int) -> bool:
    """Whether something happened before step `now` was decided: limits are told with that step."""
    return row["step"] < now or (row["step"] == now and row["kind"] == "limits")


def replay(
    telemetry: Iterable[Row], recorded: Iterable[dict[str, Any]], limits: Limits | None = None
) -> Replay:
    """Run `step` over a recorded run.

    Commands, limits that were changed on the way, changes that the model refused and the points at
    which the run was resumed are taken from the journal.

    Args:
        telemetry: rows of ``telemetry.jsonl``, header first.
        recorded: rows of ``journal.jsonl``, header first.
        limits: other limits than those of the run.

    Returns:
        The journal as it would have been, up to the first action that differs.
    """
    telemetry, recorded = iter(telemetry), tuple(recorded)[1:]
    own = journal.load_limits(next(telemetry)["header"]["limits"])
    done = actions(row for row in recorded if not row.get("by_hand"))
    given = deque(row for row in recorded if row.get("by_hand") or row["kind"] in journal.GIVEN)
    state, rows, count, last = State(), [], 0, 0

    def take(now: float) -> None:
        nonlocal state, own
        while given and precedes(given[0], now):
            row = given.popleft()
            state = after(state, row)
            own = journal.load_limits(row["limits"]) if "limits" in row else own
            rows.append(row)

    for row in telemetry:
        snapshot = journal.load_snapshot(row)
        take(snapshot.step)
        count += bool(snapshot.signals)
        known = {name: getattr(own, name) for name in FACTS}
        state, decisions = step(
            state, snapshot, replace(own if limits is None else limits, **known)
        )
        now = journal.rows(snapshot.step, decisions, acting=own.acting)
        rows += now
        if actions(now).get(snapshot.step, []) != done.get(snapshot.step, []):
            return Replay(tuple(rows), count, snapshot.step)
        last = snapshot.step
    take(last + 1)
    return Replay(tuple(rows), count, None)
