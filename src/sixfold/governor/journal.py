"""What the governor writes down: telemetry for replay, a journal for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import HeadId, Snapshot
from sixfold.geometry.hexgrid import HexGrid
from sixfold.governor.alarms import WHOLE, Alarm
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits
from sixfold.governor.step import Applied, Decisions, Judged, Undone
from sixfold.governor.watch.collect import UNITS
from sixfold.record import Log

TELEMETRY, JOURNAL = "telemetry.jsonl", "journal.jsonl"


def open_logs(
    folder: Path | str | None,
    layers: Sequence[MultiHeadAttention],
    grid: HexGrid | None,
    limits: Limits,
    positions: Mapping[str, int],
) -> tuple[Log, ...]:
    """The two logs of a run in `folder`, or none."""
    if folder is None:
        return ()
    header = {
        "layers": len(layers),
        "num_heads": layers[0].heads.num_heads,
        "grid_radius": None if grid is None else grid.radius,
        "units": UNITS,
        "limits": asdict(limits),
    }
    return tuple(
        Log(Path(folder) / name, header, positions.get(name, 0)) for name in (TELEMETRY, JOURNAL)
    )


def load_limits(values: Mapping[str, Any]) -> Limits:
    """Limits from the header of a log."""
    alarms = dict(values["alarms"])
    if alarms["gradient"] is not None:
        alarms["gradient"] = tuple(alarms["gradient"])
    return Limits(AlarmLimits(**alarms), ActionLimits(**values["actions"]))


def load_snapshot(row: Mapping[str, Any]) -> Snapshot:
    """A snapshot from its row in the telemetry."""
    signals = {name: tuple(tuple(v) for v in values) for name, values in row["signals"].items()}
    return Snapshot(row["step"], row["loss"], signals, row["scalars"], row["times_us"])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal, without its header."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def write(logs: Sequence[Log], snapshot: Snapshot, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append to the logs, if there are any."""
    if logs:
        telemetry, journal = logs
        telemetry.append(snapshot._asdict())
        for row in rows:
            journal.append(row)


def name_of(head: HeadId) -> str:
    """How a head is called in text."""
    return "the model" if head == WHOLE else f"layer {head.layer} head {head.head}"


def rows(now: int, decisions: Decisions, mode: str) -> list[dict[str, Any]]:
    """The journal rows of one step, in the order things happened."""
    return [
        *(alarm_row(alarm) for alarm in decisions.alarms),
        *(evidence_row(judged) for judged in decisions.judged),
        *(undo_row(now, undone, mode) for undone in decisions.undone),
        *(change_row(now, applied, mode) for applied in decisions.applied),
    ]


def sentence(decisions: Decisions, mode: str) -> tuple[str, ...]:
    """One step in one sentence, for whoever is watching; nothing where nothing was decided."""
    made = "made" if mode == "act" else "would make"
    parts = [f"{made} {heads_by(decisions.applied)}"] if decisions.applied else []
    if decisions.undone:
        parts.append(
            f"{'took' if mode == 'act' else 'would take'} back {heads_by(decisions.undone)}"
        )
    if not parts and not decisions.alarms:
        return ()
    worst = "critical" if any(a.level == "critical" for a in decisions.alarms) else "not critical"
    alarms = f"{len(decisions.alarms)} alarms ({worst})" if decisions.alarms else ""
    return ("; ".join([*([alarms] if alarms else []), *parts]),)


def heads_by(changes: Sequence[Applied] | Sequence[Undone]) -> str:
    """Changes by name, each with its heads as layer.head."""
    heads: dict[str, list[str]] = {}
    for item in changes:
        target = item.change.target
        heads.setdefault(item.change.name, []).append(f"{target.layer}.{target.head}")
    return ", ".join(f"{name} at heads {' '.join(where)}" for name, where in heads.items())


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


def change_row(now: int, applied: Applied, mode: str) -> dict[str, Any]:
    """A change made, or in observing mode one that would have been made."""
    change, expects = applied.change, applied.change.expects
    values = {k: v for k, v in asdict(change).items() if k not in ("target", "expects")}  # type: ignore[call-overload]
    sign = "below" if expects.direction == "fall" else "above"
    said = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
    text = (
        f"{'made' if mode == 'act' else 'would make'} {change.name} ({said}) at "
        f"{name_of(change.target)}: expects {expects.signal} {sign} {expects.bound:.4g} "
        f"within {expects.within} steps"
    )
    return {
        "step": now, "kind": "change", "id": applied.number, "name": change.name,
        "layer": change.target.layer, "head": change.target.head, "arguments": values,
        "expects": {k: v for k, v in asdict(expects).items() if k != "target"},
        "cost": change.cost, "applied": mode == "act", "text": text,
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
        "step": evidence.step, "kind": "evidence", "id": judged.number, "held": evidence.held,
        "value": evidence.value, "text": text,
    }  # fmt: skip


def undo_row(now: int, undone: Undone, mode: str) -> dict[str, Any]:
    """A change taken back."""
    took = "took" if mode == "act" else "would take"
    text = f"{took} back {undone.change.name} #{undone.number}: {undone.reason}"
    return {"step": now, "kind": "undo", "id": undone.number, "reason": undone.reason, "text": text}


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
        f"  heads      {sum(map(len, last.signals.get('max_logit', ())))}"
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
    ):
        found = extreme(history, signal, worst)
        if found:
            lines.append(
                f"  {signal:<16} {worst.__name__} {found[0]:.4g} at {name_of(found[1])}, "
                f"step {found[2]}"
            )
    recent = [f"  step {row['step']:>6}  {row['text']}" for row in journal[-8:]]
    return "\n".join(lines + (["  latest:", *recent] if recent else []))


def extreme(
    history: Sequence[Snapshot], signal: str, worst: Any
) -> tuple[float, HeadId, int] | None:
    """Worst value of a signal in the last sample that has it, where, and when."""
    for snapshot in reversed(history):
        layers = snapshot.signals.get(signal)
        if layers:
            cells = [(v, HeadId(i, j)) for i, row in enumerate(layers) for j, v in enumerate(row)]
            value, head = worst(cells, key=lambda cell: cell[0])
            return value, head, snapshot.step
    return None


def health_of(journal: Sequence[Mapping[str, Any]], now: int) -> str:
    """One word from the alarms of the last hundred steps."""
    levels = {row["level"] for row in journal if row["kind"] == "alarm" and row["step"] > now - 100}
    return "critical" if "critical" in levels else "degraded" if "warning" in levels else "healthy"
