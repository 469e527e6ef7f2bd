"""What the governor writes down, row by row: telemetry for replay, a journal for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sixfold.contracts import WHOLE, Change, HeadId, Snapshot
from sixfold.geometry.hexgrid import HexGrid
from sixfold.governor.alarms import Alarm
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits
from sixfold.governor.state import State, revive, state_dict
from sixfold.governor.step import Applied, Decisions, Judged, Undone
from sixfold.governor.watch.collect import UNITS
from sixfold.governor.watch.layer import Layer

TELEMETRY, JOURNAL = "telemetry.jsonl", "journal.jsonl"
SIGNALS = (
    "max_logit", "entropy", "gradient_norm", "gradient_mean", "update_ratio", "rank_distance",
    "sigma_max_v", "condition_q", "condition_k", "condition_v", "weight_norm",
    "weight_growth", "gradient_share", "frozen", "loss", "mixing", "tokens_per_s",
)  # fmt: skip
"""What an alarm can be about."""
GIVEN = ("limits", "resumed", "refused")
"""Kinds of rows that no snapshot explains: a replay takes them as they are."""


def header(layers: Sequence[Layer], limits: Limits) -> dict[str, Any]:
    """What the rows of a log are about."""
    grid = layers[0].grid if layers else None
    return {
        "layers": len(layers),
        "names": [layer.name for layer in layers],
        "num_heads": layers[0].num_heads if layers else 0,
        "grid_radius": None if grid is None else grid.radius,
        "units": UNITS,
        "limits": asdict(limits),
    }


def load_limits(values: Mapping[str, Any]) -> Limits:
    """Limits from the header of a log."""
    alarms = {k: tuple(v) if isinstance(v, list) else v for k, v in values["alarms"].items()}
    rest = {name: tuple(values[name]) for name in ("untouched", "unscaled")}
    rest |= {name: values[name] for name in ("acting", "rewinding")}
    return Limits(AlarmLimits(**alarms), ActionLimits(**values["actions"]), **rest)


def load_snapshot(row: Mapping[str, Any]) -> Snapshot:
    """A snapshot from its row in the telemetry."""
    signals = {name: tuple(tuple(v) for v in values) for name, values in row["signals"].items()}
    return Snapshot(row["step"], row["loss"], signals, row["scalars"], row["times_us"])


def load_change(row: Mapping[str, Any]) -> Change:
    """A change from its row in the journal."""
    target = [row["layer"], row["head"]]
    return revive(row["name"], {**row["arguments"], "target": target, "expects": row["expects"]})


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal, without its header."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def name_of(head: HeadId) -> str:
    """How a head is called in text."""
    if head == WHOLE:
        return "the model"
    return f"layer {head.layer}" + (f" head {head.head}" if head.head >= 0 else "")


def rows(now: int, decisions: Decisions, *, acting: bool) -> list[dict[str, Any]]:
    """The journal rows of one step, in the order things happened."""
    return [
        *(alarm_row(alarm) for alarm in decisions.alarms),
        *(evidence_row(judged) for judged in decisions.judged),
        *(undo_row(now, undone, acting=acting) for undone in decisions.undone),
        *(change_row(now, applied, acting=acting) for applied in decisions.applied),
        *([stop_row(now, decisions.stop)] if decisions.stop is not None else []),
    ]


def sentence(decisions: Decisions, *, acting: bool) -> tuple[str, ...]:
    """One step in one sentence, for whoever is watching; nothing where nothing was decided."""
    made = "made" if acting else "would make"
    parts = [f"{made} {heads_by(decisions.applied)}"] if decisions.applied else []
    if decisions.undone:
        parts.append(f"{'took' if acting else 'would take'} back {heads_by(decisions.undone)}")
    if decisions.stop is not None:
        parts.append(f"going on is no use: {decisions.stop}")
    if not parts and not decisions.alarms:
        return ()
    return ("; ".join([*worst(decisions.alarms), *parts]),)


def worst(alarms: Sequence[Alarm]) -> list[str]:
    """The first critical alarm, or the first at all, and how many came with it."""
    if not alarms:
        return []
    first = min(alarms, key=lambda alarm: alarm.level != "critical")
    others = len(alarms) - 1
    return [alarm_row(first)["text"] + (f", and {others} more" if others else "")]


def heads_by(changes: Sequence[Applied] | Sequence[Undone]) -> str:
    """Changes by name, each with its heads as layer.head."""
    heads: dict[str, list[str]] = {}
    for item in changes:
        target = item.change.target
        where = "the model" if target == WHOLE else f"{target.layer}.{target.head}"
        heads.setdefault(item.change.name, []).append(where)
    return ", ".join(f"{name} at {' '.join(where)}" for name, where in heads.items())


def alarm_row(alarm: Alarm) -> dict[str, Any]:
    """An alarm."""
    where = {"layer": alarm.target.layer, "head": alarm.target.head}
    text = (
        f"{alarm.level}: {alarm.signal} of {name_of(alarm.target)} is {alarm.value:.4g}, "
        f"limit {alarm.limit:.4g}"
    )
    known = {
        "level": alarm.level,
        "signal": alarm.signal,
        "value": alarm.value,
        "limit": alarm.limit,
    }
    return {"step": alarm.step, "kind": "alarm", **where, **known, "text": text}


def change_row(now: int, applied: Applied, *, acting: bool) -> dict[str, Any]:
    """A change made, or in observing mode one that would have been made."""
    change, expects = applied.change, applied.change.expects
    values = {k: v for k, v in asdict(change).items() if k not in ("target", "expects")}  # type: ignore[call-overload]
    sign = "below" if expects.direction == "fall" else "above"
    said = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, int | float) else f"{key} {value}"
        for key, value in values.items()
    )
    text = (
        f"{'made' if acting else 'would make'} {change.name}{f' ({said})' if said else ''} at "
        f"{name_of(change.target)}: expects {expects.signal} {sign} {expects.bound:.4g} "
        f"within {expects.within} steps"
    )
    return {
        "step": now, "kind": "change", "id": applied.number, "name": change.name,
        "layer": change.target.layer, "head": change.target.head, "arguments": values,
        "expects": asdict(expects) | {"target": list(expects.target)},
        "cost": change.cost, "applied": acting, "text": text,
    }  # fmt: skip


def evidence_row(judged: Judged) -> dict[str, Any]:
    """What came of a change."""
    evidence, expects = judged.evidence, judged.change.expects
    text = (
        f"{judged.change.name} #{judged.number} {'held' if evidence.held else 'failed'}: "
        f"{expects.signal} of {name_of(judged.change.target)} is {evidence.value:.4g}, "
        f"promised {expects.bound:.4g}"
    )
    return {
        "step": evidence.step, "kind": "evidence", "id": judged.number,
        "layer": judged.change.target.layer, "head": judged.change.target.head,
        "held": evidence.held,
        "value": evidence.value, "text": text,
    }  # fmt: skip


def undo_row(now: int, undone: Undone, *, acting: bool) -> dict[str, Any]:
    """A change taken back."""
    took = "took" if acting else "would take"
    text = f"{took} back {undone.change.name} #{undone.number}: {undone.reason}"
    layer, head = undone.change.target
    return {
        "step": now, "kind": "undo", "id": undone.number, "layer": layer, "head": head,
        "reason": undone.reason, "text": text,
    }  # fmt: skip


def command_row(now: int, number: int, change: Change) -> dict[str, Any]:
    """A change made by hand."""
    signal = change.expects.signal
    asked = Alarm(now, "notice", signal, change.target, math.nan, math.nan)
    return change_row(now, Applied(number, change, asked), acting=True) | {"by_hand": True}


def refused_row(now: int, number: int, change: Change, error: Exception) -> dict[str, Any]:
    """A change that could not be made or taken back."""
    layer, head = change.target
    text = f"{change.name} #{number} at {name_of(change.target)} could not be made: {error}"
    return {
        "step": now, "kind": "refused", "id": number, "layer": layer, "head": head, "text": text,
    }  # fmt: skip


def limits_row(now: int, limits: Limits, before: Limits) -> dict[str, Any]:
    """Limits that hold from this step on."""
    old, new = flat(before), flat(limits)
    changed = ", ".join(f"{name} {new[name]}" for name in new if new[name] != old[name])
    return {
        "step": now, "kind": "limits", "limits": asdict(limits),
        "text": f"limits from here on: {changed}",
    }  # fmt: skip


def flat(limits: Limits) -> dict[str, str]:
    """Limits without their groups, in words."""
    values = asdict(limits)
    values |= values.pop("alarms") | values.pop("actions")
    return {
        name: " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }


def resumed_row(now: int, past: State | None) -> dict[str, Any]:
    """The run goes on in another process after this step.

    past: what was known then, where the log does not tell.
    """
    known = {} if past is None else {"state": state_dict(past)}
    return {"step": now, "kind": "resumed", **known, "text": f"resumed after step {now}"}


def stop_row(now: int, reason: str) -> dict[str, Any]:
    """The advice to stop."""
    return {"step": now, "kind": "stop", "reason": reason, "text": f"stop: {reason}"}


def report(
    history: Sequence[Snapshot],
    journal: Sequence[Mapping[str, Any]],
    grid: HexGrid | None,
    mode: str,
) -> str:
    """The governor's report as text."""
    journal = list(journal)
    if not history:
        return "Sixfold governor: nothing measured yet (run a forward pass, then process_step)"
    last = history[-1]
    kinds = [row["kind"] for row in journal]
    held = [row["held"] for row in journal if row["kind"] == "evidence"]
    health = health_of(journal, last.step)
    lines = [
        f"Sixfold governor ({mode}), step {last.step}: {health}",
        *[f"  stop       {row['reason']}" for row in journal if row["kind"] == "stop"][-1:],
        f"  heads      {max(sum(map(len, s.signals.get('max_logit', ()))) for s in history)}"
        + (f" on a hexagonal grid of radius {grid.radius} per layer" if grid else ""),
        f"  alarms     {kinds.count('alarm')}",
        f"  changes    {kinds.count('change')}, of which {sum(held)} of {len(held)} judged held; "
        f"{kinds.count('undo')} taken back",
    ]
    for signal, worst in (
        ("max_logit", max),
        ("entropy", min),
        ("condition_q", max),
        ("gradient_norm", max),
        ("update_ratio", max),
        ("redundancy", max),
        ("rank_distance", min),
    ):
        found = extreme(history, signal, worst)
        if found:
            lines.append(
                f"  {signal:<16} {worst.__name__} {found[0]:.4g} at {name_of(found[1])}, "
                f"step {found[2]}"
            )
    skips = [row for row in journal if row.get("name") == "gradient_skip"]
    told = [row for row in journal if row not in skips[:-1]][-8:]
    recent = [f"  step {row['step']:>6}  {row['text']}" for row in told]
    return "\n".join(lines + (["  latest:", *recent] if recent else []))


def extreme(
    history: Sequence[Snapshot], signal: str, worst: Any
) -> tuple[float, HeadId, int] | None:
    """Worst value of a signal in the last sample that has it, where, and when."""
    for snapshot in reversed(history):
        layers = enumerate(snapshot.signals.get(signal, ()))
        cells = [(v, HeadId(i, j)) for i, row in layers for j, v in enumerate(row)]
        cells = [cell for cell in cells if math.isfinite(cell[0])]
        if cells:
            value, head = worst(cells, key=lambda cell: cell[0])
            return value, head, snapshot.step
    return None


def health_of(journal: Sequence[Mapping[str, Any]], now: int) -> str:
    """One word from the alarms of the last hundred steps."""
    levels = {row["level"] for row in journal if row["kind"] == "alarm" and row["step"] > now - 100}
    return "critical" if "critical" in levels else "degraded" if "warning" in levels else "healthy"
