"""Lines, marks and moments of a run, ready to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sixfold.contracts import Snapshot
from sixfold.report.actions import Action, actions, told
from sixfold.report.headline import metric, stops, verdict, where
from sixfold.report.heat import Spot
from sixfold.report.hexmap import Moment, head_name
from sixfold.report.read import MAPPED, Row, Run, highest
from sixfold.report.scale import Point, decimate, finite, number, smooth, with_gaps
from sixfold.report.svg import LOOKS, Line, Mark


def loss_lines(run: Run) -> list[Line]:
    """Every training loss, faint; its running mean; the validation losses as points."""
    train, validation = metric(run, "loss", "train"), metric(run, "loss", "validation")
    drawn = line_of(run, "loss")
    window = max(1, len(train) // 50) | 1
    lines = [Line("training, every row", drawn, "s0", "pale")] if window > 1 else []
    label = f"training, mean of {window} rows" if window > 1 else "training"
    lines.append(Line(label, with_gaps(smooth(train, window)), "s0"))
    if validation:
        lines.append(Line("validation", validation, "s1", "dots"))
    return lines


def alarms(run: Run, signal: str = "") -> list[Row]:
    """Alarms of a run, of one signal if named."""
    rows = [entry for entry in run.journal if entry["kind"] == "alarm"]
    return [entry for entry in rows if not signal or entry.get("signal") == signal]


def journal_marks(run: Run, signal: str = "", layer: int | None = None) -> list[Mark]:
    """Alarms and changes as marks, of one signal and layer if named."""
    judged = {action.change.get("id"): action for action in actions(run)}
    marks = [] if signal else [
        Mark(entry["step"], "critical", describe(entry)) for entry in stops(run)
    ]  # fmt: skip
    for entry in run.journal:
        if (signal and about(entry) != signal) or (
            layer is not None and entry.get("layer") != layer
        ):
            continue
        if entry["kind"] == "alarm":
            level = entry.get("level")
            kind = level if level in ("warning", "critical") else "notice"
            marks.append(Mark(entry["step"], kind, describe(entry)))
        elif entry["kind"] == "change":
            action = judged[entry.get("id")]
            marks.append(Mark(entry["step"], "held" if action.held else "change",
                              _change_text(run, action), "change"))  # fmt: skip
    return marks


def _change_text(run: Run, action: Action) -> str:
    said = told(action, run.signal_unit(action.signal))
    hand = "by hand\n" if action.change.get("by_hand") else ""
    undone = f"\nundone {said.end}" if said.end else ""
    return (
        f"{describe(action.change)}\n{hand}before: {said.before}\nexpects: {said.expected}\n"
        f"{verdict(action.evidence)}{undone}"
    )


def about(entry: Row) -> str:
    """The signal a journal entry speaks of: its own, or the one a change expects to move."""
    expects = entry.get("expects")
    own = expects.get("signal") if isinstance(expects, Mapping) else entry.get("signal")
    return str(own or "")


def words(entry: Row) -> str:
    """What an entry says, without its level, which is said beside it."""
    return str(entry.get("text") or "").removeprefix(f"{entry.get('level')}: ")


def describe(entry: Row) -> str:
    """A journal entry on one line; what its text already says is not said twice.

    >>> describe({"step": 1200, "kind": "alarm", "level": "critical", "signal": "max_logit",
    ...           "layer": 2, "head": 3, "text": "max_logit of layer 2 head 3 is 131 nats"})
    'step 1,200 critical alarm: max_logit of layer 2 head 3 is 131 nats'
    """
    text = words(entry)
    what, place = str(entry.get("name") or entry.get("signal") or ""), where(entry)
    parts = [entry.get("level"), entry["kind"], what if what not in text else "",
             place if place.replace(" · ", " ") not in text else ""]  # fmt: skip
    lead = " ".join([f"step {entry['step']:,}", *(str(part) for part in parts if part)])
    return f"{lead}: {text}" if text else lead


def broken_marks(points: Sequence[Point], look: str, label: str) -> list[Mark]:
    """A cross where a loss first stops being a number."""
    first = next((int(x) for x, y in points if not math.isfinite(y)), None)
    if first is None:
        return []
    note = f"{label} is NaN from step {first:,}".strip()
    return [Mark(first, "broken", note, look, note)]


# ---------------------------------------------------------------- telemetry


def measured(run: Run, signal: str) -> list[Snapshot]:
    """The snapshots in which a signal was measured, in order, the later of equal steps."""
    rows = {row.step: row for row in run.telemetry if signal in row.signals}
    return [rows[step] for step in sorted(rows)]


def line_of(run: Run, name: str, split: str = "train") -> list[Point]:
    """A metric by step, thinned to more than a page is wide, broken where it was not measured."""
    return decimate(with_gaps(metric(run, name, split)), 2400)


def radius_of(run: Run) -> int | None:
    """Radius of the run's grid, None where its heads sit on none."""
    radius = run.measured.header.get("grid_radius")
    return int(radius) if radius is not None else None


def head_lines(run: Run, signal: str, layer: int, named_heads: int) -> list[Line]:
    """A line per head of one layer. The heads the journal speaks of most have a colour."""
    track = run.measured.tracks[signal]
    count = track.shape[layer]
    named = _spoken_of(run, signal, layer)[:named_heads]
    lines = []
    for head in range(count):
        look = LOOKS[named.index(head)] if head in named else "faint"
        name = f"head {head}" if head in named else head_name(layer, head, radius_of(run), count)
        form = "line" if head in named else "thin"
        lines.append(Line(name, track.points(layer, head), look, form))
    return sorted(lines, key=lambda line: line.look != "faint")


def layer_lines(run: Run, signal: str) -> list[Line]:
    """The worst (largest) head of every layer; beyond five layers only four are named."""
    track = run.measured.tracks[signal]
    depth = len(track.shape)
    peaks = [track.points(layer) for layer in range(depth)]
    height = [max(finite(points), default=0.0) for points in peaks]
    order = sorted(range(depth), key=lambda layer: -height[layer])
    named = sorted(order[:4] if depth > 5 else order)
    lines = [
        Line(f"layer {layer}", peaks[layer],
             LOOKS[named.index(layer)] if layer in named else "faint",
             "line" if layer in named else "thin")
        for layer in range(depth)
    ]  # fmt: skip
    return sorted(lines, key=lambda line: line.look != "faint")


def spots(rows: Sequence[Row]) -> list[Spot]:
    """Where and when, for entries that speak of one head."""
    return [
        Spot(int(row["step"]), (int(row["layer"]), int(row["head"])))
        for row in rows
        if (row.get("layer"), row.get("head")) != (None, None) and row.get("head", -1) >= 0
    ]


def moments(run: Run, signal: str, count: int) -> list[Moment]:
    """About evenly spaced moments with the first, the last and the highest value among them.

    The mapped signals share their moments where enough snapshots hold them all. Heads with an
    alarm of this signal, or with a change, since the moment before are pointed out.
    """
    rows = measured(run, signal)
    shared = [row for row in rows if all(name in row.signals for name in MAPPED)]
    out, before = [], -math.inf
    for row in _spread(shared if len(shared) >= count else rows, count):
        alarmed = _heads_between(alarms(run, signal), before, row.step)
        changed = _heads_between(changes(run), before, row.step)
        out.append(Moment(row.step, row.signals[signal], alarmed, changed))
        before = row.step
    return out


def _spread(rows: Sequence[Snapshot], count: int) -> list[Snapshot]:
    if not rows:
        return []
    last = len(rows) - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    signal = next((name for name in MAPPED if name in rows[0].signals), "")
    peak = max(range(len(rows)), key=lambda i: highest(rows[i].signals.get(signal, ())))
    if peak not in chosen and len(chosen) > 2:
        nearest = min(range(1, len(chosen) - 1), key=lambda i: abs(chosen[i] - peak))
        chosen[nearest] = peak
    return [rows[i] for i in sorted(chosen)]


def frames(run: Run, count: int) -> list[Snapshot]:
    """Snapshots for a slider: those in which any mapped signal was measured."""
    rows = {row.step: row for name in MAPPED for row in measured(run, name)}
    return _spread([rows[step] for step in sorted(rows)], count)


def frame_text(run: Run, after: float, step: float) -> str:
    """What the journal says between two moments, three entries at most."""
    entries = [describe(e) for e in run.journal if after < e["step"] <= step]
    more = [f"and {number(len(entries) - 3)} more"] if len(entries) > 3 else []
    return "\n".join(entries[:3] + more)


def changes(run: Run) -> list[Row]:
    """Changes of a run, in order."""
    return [entry for entry in run.journal if entry["kind"] == "change"]


def _heads_between(rows: Sequence[Row], after: float, step: float) -> frozenset[tuple[int, int]]:
    return frozenset(spot.head for spot in spots(rows) if after < spot.step <= step)


def _spoken_of(run: Run, signal: str, layer: int) -> list[int]:
    """Heads of a layer with an alarm or a change about a signal, most spoken of first."""
    found = alarms(run, signal) + [entry for entry in changes(run) if about(entry) == signal]
    heads = [e["head"] for e in found if e.get("layer") == layer and e.get("head") is not None]
    return sorted(set(heads), key=lambda head: (-heads.count(head), head))
