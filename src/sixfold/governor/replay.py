"""Decide a recorded run again, without its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sixfold.governor import journal
from sixfold.governor.limits import Limits
from sixfold.governor.step import State, step

FACTS = ("acting", "rewinding", "untouched", "unscaled")


class Replay(NamedTuple):
    """What the governor would have written.

    snapshots: samples that were decided on; steps between them are decided on too.
    `differs` is the first step at which it would have acted otherwise than it did: what the record
    holds after that step is the answer to another action, so the replay ends there.
    """

    rows: tuple[dict[str, Any], ...]
    snapshots: int
    differs: int | None


def actions(rows: Iterable[Mapping[str, Any]]) -> dict[int, list[Any]]:
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


def replay(
    telemetry: Iterable[Mapping[str, Any]],
    recorded: Iterable[Mapping[str, Any]],
    limits: Limits | None = None,
) -> Replay:
    """Run `step` over a recorded run.

    Args:
        telemetry: rows of ``telemetry.jsonl``, header first.
        recorded: rows of ``journal.jsonl``, header first.
        limits: other limits than those of the run.

    Returns:
        The journal as it would have been, up to the first action that differs.
    """
    telemetry, recorded = iter(telemetry), tuple(recorded)[1:]
    own = journal.load_limits(next(telemetry)["header"]["limits"])
    if limits is None:
        limits = own
    # what could be touched at all is a fact of the run, whatever the limits
    limits = replace(limits, **{name: getattr(own, name) for name in FACTS})
    done = actions(row for row in recorded if not row.get("by_hand"))
    commands = [row for row in recorded if row.get("by_hand")]
    state, rows, count = State(), [], 0
    for row in telemetry:
        snapshot = journal.load_snapshot(row)
        count += bool(snapshot.signals)
        state, decisions = step(state, snapshot, limits)
        now = journal.rows(snapshot.step, decisions, acting=limits.acting)
        rows += now
        if actions(now).get(snapshot.step, []) != done.get(snapshot.step, []):
            return Replay(tuple(rows), count, snapshot.step)
        for asked in (command for command in commands if command["step"] == snapshot.step):
            rows.append(asked)
            state = state.with_change(asked["id"], journal.load_change(asked), snapshot.step)
    return Replay(tuple(rows), count, None)
