"""A run in about 25 lines of plain text, for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from sixfold.report.actions import actions, told
from sixfold.report.headline import Headline, headline, metric, origin, where
from sixfold.report.read import Run
from sixfold.report.scale import WARP, Point, duration, finite, kind_of, number
from sixfold.report.series import MAPPED, alarms, describe, measured

_BARS = "▁▂▃▄▅▆▇█"


def summary(run: Run) -> str:
    """What the run was, what it came to, and what the governor did about it."""
    facts = headline(run)
    lines = [
        f"run {run.name}",
        f"  {origin(run)}",
        *(f"  {note}" for note in run.notes),
        *(f"  STOP at step {number(row['step'])}: {row.get('reason')}" for row in facts.stops),
        "",
        *_losses(run, facts),
        *_sizes(facts),
        "",
        *_governed(run, facts),
        *_heads(run),
    ]
    return "\n".join(line.rstrip() for line in lines)


def sparkline(points: Sequence[Point], width: int = 40) -> str:
    """A curve in one line of text; a cross where the value is not finite.

    >>> sparkline([(0, 1.0), (1, 2.0), (2, 3.0), (3, float("nan"))], 4)
    '▁▅█×'
    """
    known = finite(points)
    if not known:
        return "×" * min(len(points), width)
    low, high = min(known), max(known)
    place = WARP[kind_of(known)]
    span = (place(high) - place(low)) or 1.0
    out = []
    for column in range(min(width, len(points))):
        at = column * len(points) // min(width, len(points))
        value = points[at][1]
        share = (place(value) - place(low)) / span if math.isfinite(value) else -1.0
        out.append(_BARS[round(share * (len(_BARS) - 1))] if share >= 0 else "×")
    return "".join(out)


def _losses(run: Run, facts: Headline) -> list[str]:
    unit = run.unit("loss")
    lines = []
    for split, point in (("train", facts.final_train), ("validation", facts.final_validation)):
        curve = metric(run, "loss", split)
        if point is None and split == "validation" and not run.config:
            continue
        if point is None:
            lines.append(_row(f"{split} loss", "not measured"))
            continue
        text = f"{number(point[1])} {unit} at step {number(int(point[0]))}".replace("  ", " ")
        lines.append(_row(f"{split} loss", text))
        if len(curve) > 2:
            lines.append(_row("", sparkline(curve)))
    if facts.best_validation is not None:
        step, loss = facts.best_validation
        lines.append(_row("best validation", f"{number(loss)} at step {number(int(step))}"))
    if facts.broken_at is not None:
        lines.append(_row("loss broke", f"not a number from step {number(facts.broken_at)}"))
    return lines


def _sizes(facts: Headline) -> list[str]:
    lines = [_row("steps", number(facts.last_step))]
    if facts.wall_s is not None:
        lines.append(_row("wall time", duration(facts.wall_s)))
    if facts.parameters is not None:
        lines.append(_row("parameters", number(facts.parameters)))
    return lines


def _governed(run: Run, facts: Headline) -> list[str]:
    levels = ", ".join(f"{number(count)} {level}" for level, count in facts.alarms.items())
    lines = [_row("alarms", levels or "0")]
    first = alarms(run)[:1]
    lines += [_row("first alarm", describe(entry)) for entry in first]
    undone = f", {number(facts.undone)} undone" if facts.undone else ""
    kept = f" ({number(facts.held)} of {number(facts.judged)} judged held{undone})"
    made = [action.change.get("applied", True) for action in actions(run)]
    kept = kept if not made or any(made) else " (only said: this governor observes)"
    lines.append(_row("changes", number(facts.changes) + (kept if facts.changes else "")))
    for action in actions(run)[-4:]:
        said = told(action, run.signal_unit(action.signal))
        change = action.change
        hand = " by hand" if change.get("by_hand") else ""
        what = f"step {change['step']:,} {change.get('name')}{hand} at {where(change)}"
        lines.append(_row("", what.replace(" · ", " ")))
        undone = f"; undone {said.end}" if said.end else ""
        lines.append(_row("", f"  before: {said.before}; expected: {said.expected}"))
        lines.append(_row("", f"  after: {said.after}{undone}"))
    return lines


def _heads(run: Run) -> list[str]:
    """The head with the largest logit and the one with the least entropy, when last measured."""
    lines = []
    for signal, choose, word in zip(MAPPED, (max, min), ("largest", "least"), strict=True):
        rows = measured(run, signal)
        values = [
            (value, layer, head)
            for layer, heads in enumerate(rows[-1].signals[signal] if rows else ())
            for head, value in enumerate(heads)
            if math.isfinite(value)
        ]
        if values:
            value, layer, head = choose(values)
            unit = run.signal_unit(signal)
            text = f"{number(value)} {unit}".strip() + f", {word}: layer {layer} head {head}"
            lines.append(_row(signal.replace("_", " "), f"{text}, step {rows[-1].step:,}"))
    return lines


def _row(label: str, text: str) -> str:
    return f"  {label:<16} {textwrap.shorten(text, 120, placeholder=' …')}"
