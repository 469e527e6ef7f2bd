"""Line charts as SVG text, without a plotting library.

Colours are classes, so that one drawing serves light pages, dark pages and files of its own:
`style(LIGHT)` and `style(DARK)` give the rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

from sixfold.report.scale import (
    Kind,
    Point,
    Scale,
    decimate,
    finite,
    kind_of,
    number,
    tick_labels,
    with_gaps,
)

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif"

# lines: Okabe and Ito's colours, which the colour-blind can tell apart; lighter on dark pages
LIGHT: Mapping[str, str] = {
    "paper": "#ffffff", "ink": "#1c2126", "muted": "#66707a", "grid": "#e8ebee", "axis": "#aab2ba",
    "faint": "#b9c1c9", "notice": "#9aa5b1", "warning": "#c77f00", "critical": "#c8102e",
    "change": "#6a3fc0",
    "s0": "#0067a8", "s1": "#d55e00", "s2": "#008a63", "s3": "#b0508a", "s4": "#b98200",
    "s5": "#3a9bd9", "s6": "#7a5230", "s7": "#5b6770",
}  # fmt: skip
DARK: Mapping[str, str] = {
    "paper": "#14171a", "ink": "#e4e7ea", "muted": "#98a2ac", "grid": "#262b30", "axis": "#56606a",
    "faint": "#4a535c", "notice": "#6d7985", "warning": "#e8a33d", "critical": "#ff5f6b",
    "change": "#b79bff",
    "s0": "#58b0ee", "s1": "#ff9350", "s2": "#3ecba0", "s3": "#e691c2", "s4": "#eebb45",
    "s5": "#93d4ff", "s6": "#c69c78", "s7": "#a5b0ba",
}  # fmt: skip
LOOKS = ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")


class Line(NamedTuple):
    """One line of a chart. `look` is a colour class; a value that is not finite is a gap."""

    label: str
    points: Sequence[Point]
    look: str
    form: Literal["line", "thin", "pale", "dots"] = "line"


class Mark(NamedTuple):
    """Something that happened at a step; `text` is its tooltip, `note` is written beside it."""

    step: float
    kind: Literal["notice", "warning", "critical", "change", "held", "broken"]
    text: str
    look: str = ""
    note: str = ""


@dataclass(frozen=True)
class Axes:
    """The frame of a chart.

    `steps` and `values` are ranges that the axes must at least cover; `rest` names the faint lines;
    `along` names what runs along the page, on an axis of the kind `spacing`.
    """

    title: str
    unit: str
    width: int = 528
    height: int = 230
    scale: Literal["auto"] | Kind = "auto"
    steps: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    limits: tuple[float, ...] = ()
    points: int = 600
    rest: str = ""
    along: str = "step"
    spacing: Kind = "linear"


class Key(NamedTuple):
    """One entry of a legend."""

    look: str
    sign: str
    label: str


class Frame(NamedTuple):
    """The two scales of a chart and its y ticks."""

    x: Scale
    y: Scale
    y_ticks: tuple[float, ...]
    y_labels: list[str]


def line_chart(lines: Sequence[Line], marks: Sequence[Mark], axes: Axes) -> str:
    """One chart. Raises ValueError where a logarithmic axis is asked for values of 0 or less."""
    frame = _frame(lines, marks, axes)
    parts = [
        _heading(lines, marks, axes),
        _grid(frame, axes),
        *_marks(marks, frame),
        *_limits(axes.limits, frame),
        *(_line(line, frame, axes) for line in lines),
    ]
    if not any(finite(line.points) for line in lines):
        parts.append(_text(axes.width / 2, axes.height / 2, "nothing measured", "muted", "middle"))
    label = escape(f"{axes.title}, {axes.unit}".strip(", "))
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'viewBox="0 0 {axes.width} {axes.height}" style="max-width:{axes.width}px">'
        + "".join(parts)
        + "</svg>"
    )


def style(colours: Mapping[str, str]) -> str:
    """The rules a chart needs, with literal colours: viewers of plain SVG know no variables."""
    looks = "".join(
        f".chart .{name}{{color:{colour}}}"
        for name, colour in colours.items()
        if name not in ("paper", "ink", "muted", "grid", "axis")
    )
    return (
        f".chart text{{font-family:{FONT};font-size:12px;fill:{colours['ink']}}}"
        ".chart .title{font-size:13px;font-weight:600}"
        f".chart .muted{{fill:{colours['muted']};font-weight:400}}"
        f".chart .grid{{stroke:{colours['grid']};fill:none}}"
        f".chart .axis{{stroke:{colours['axis']};fill:none}}"
        f".chart .paper{{fill:{colours['paper']}}}"
        ".chart .line,.chart .thin,.chart .pale{fill:none;stroke:currentColor;stroke-width:1.7;"
        "stroke-linejoin:round;stroke-linecap:round}"
        ".chart .thin{stroke-width:1}.chart .pale{stroke-width:1;opacity:.4}"
        f".chart .dot{{fill:currentColor;stroke:{colours['paper']}}}"
        ".chart .key{fill:currentColor}"
        ".chart .alarm{stroke:currentColor;stroke-width:1}"
        ".chart .change{stroke:currentColor;stroke-width:1.2;stroke-linejoin:round;"
        f"fill:{colours['paper']}}}"
        ".chart .held{fill:currentColor}"
        ".chart .broken{stroke:currentColor;stroke-width:2;stroke-linecap:round}"
        ".chart .limit{stroke:currentColor;stroke-dasharray:4 3;stroke-width:1}"
        f".chart .hole{{fill:none;stroke:{colours['faint']};stroke-dasharray:2 2}}"
        f".chart .cell{{stroke:{colours['paper']};stroke-width:1}}"
        f".chart .cell.rung{{stroke:{colours['critical']};stroke-width:2}}"
        f".chart .touched{{fill:{colours['paper']};stroke:{colours['ink']}}}" + looks
    )


# ---------------------------------------------------------------- frame


def _frame(lines: Sequence[Line], marks: Sequence[Mark], axes: Axes) -> Frame:
    steps = [x for line in lines for x, _ in line.points] + list(axes.steps)
    values = [y for line in lines for y in finite(line.points)] + [*axes.values, *axes.limits]
    kind = kind_of(values) if axes.scale == "auto" else axes.scale
    if kind == "log" and values and min(values) <= 0:
        raise ValueError(f"{axes.title}: a logarithmic axis has no place for {min(values):g}")
    low, high = _padded(min(values, default=0.0), max(values, default=1.0), kind)
    top, bottom = 28.0 + 16 * len(_legend(lines, marks, axes)), axes.height - 22.0
    y = Scale(low, high, bottom, top, kind)
    y_ticks = y.ticks(max(2, int((bottom - top) / 34)))
    labels = tick_labels(y_ticks, kind)
    left = 12 + 6.8 * max(6, *(len(label) for label in labels))
    first, last = min(steps, default=0.0), max(steps, default=1.0)
    last = last if last > first else first + 1
    x = Scale(first, last, left, axes.width - 12.0, axes.spacing)
    return Frame(x, y, y_ticks, labels)


def _padded(low: float, high: float, kind: Kind) -> tuple[float, float]:
    """A range with a little air; a flat line gets a range of its own."""
    if kind == "log":
        air = (high / low) ** 0.04 if high > low else 2.0
        return low / air, high * air
    if high <= low:
        air = abs(low) * 0.1 or 0.5
        return low - air, high + air
    if kind == "symlog":
        return (low if low == 0 else low - 0.15 * abs(low)), high + 0.15 * abs(high)
    air = 0.04 * (high - low)
    return (low if low == 0 else low - air), (high if high in (0, 1) else high + air)


def _heading(lines: Sequence[Line], marks: Sequence[Mark], axes: Axes) -> str:
    unit = f'<tspan class="muted" dx="8">{escape(axes.unit)}</tspan>' if axes.unit else ""
    title = f'<text class="title" x="2" y="14">{escape(axes.title)}{unit}</text>'
    rows = (
        "".join(
            f'<tspan class="key {key.look}" dx="{10 if i else 0}">{key.sign}</tspan>'
            f'<tspan dx="4">{escape(key.label)}</tspan>'
            for i, key in enumerate(row)
        )
        for row in _legend(lines, marks, axes)
    )
    return title + "".join(
        f'<text x="2" y="{33 + 16 * i}">{row}</text>' for i, row in enumerate(rows)
    )


def _legend(lines: Sequence[Line], marks: Sequence[Mark], axes: Axes) -> list[list[Key]]:
    """Keys in rows that fit the width; none for a single line without companions."""
    named = _named(lines)
    if len(named) < 2 and not axes.rest:
        return []
    keys = [Key(line.look, "●" if line.form == "dots" else "━", line.label) for line in named]
    if axes.rest and len(named) < len(lines):
        keys.append(Key("faint", "━", axes.rest))
    change = next((mark.look for mark in marks if mark.kind in ("change", "held")), None)
    if change is not None and not axes.rest:
        keys.append(Key(change, "▲", "change"))
    if not axes.rest and any(mark.kind in ("notice", "warning", "critical") for mark in marks):
        keys.append(Key("critical", "|", "alarm"))
    rows: list[list[Key]] = [[]]
    used = 0.0
    for key in keys:
        width = 26 + 6.2 * len(key.label)
        if rows[-1] and used + width > axes.width:
            rows.append([])
            used = 0.0
        rows[-1].append(key)
        used += width
    return rows


def _named(lines: Sequence[Line]) -> list[Line]:
    """Lines that a legend names, in the order of their colours."""
    named = [line for line in lines if line.look != "faint" and line.form != "pale"]
    return sorted(named, key=lambda line: line.look)


def _grid(frame: Frame, axes: Axes) -> str:
    x, y = frame.x, frame.y
    parts = []
    for value, label in zip(frame.y_ticks, frame.y_labels, strict=True):
        at = round(y(value), 1)
        parts.append(f'<path class="grid" d="M{x.start:.1f} {at}H{x.end:.1f}"/>')
        parts.append(_text(x.start - 7, at + 4, label, "muted", "end"))
    parts.append(f'<path class="axis" d="M{x.start:.1f} {y.start}H{x.end:.1f}"/>')
    room = max(64, 20 + 9 * len(number(int(x.high))))
    steps = x.ticks(max(3, int((x.end - x.start) / room)))
    for value, label in zip(steps, tick_labels(steps, axes.spacing), strict=True):
        at = x(value)
        parts.append(f'<path class="axis" d="M{at:.1f} {y.start}v4"/>')
        anchor = "end" if at > axes.width - 10 - 3.2 * len(label) else "middle"
        parts.append(_text(min(at, x.end + 8), y.start + 17, label, "muted", anchor))
    parts.append(_text(2, y.start + 17, axes.along, "muted", "start"))
    return "".join(parts)


def _limits(limits: Sequence[float], frame: Frame) -> list[str]:
    """Dashed lines, the highest first; a label only where it has room."""
    parts, above = [], -math.inf
    for limit in sorted(limits, reverse=True):
        at = frame.y(limit)
        parts.append(
            f'<path class="limit critical" d="M{frame.x.start:.1f} {at:.1f}H{frame.x.end:.1f}"/>'
        )
        if at - above > 14:
            parts.append(_text(frame.x.end, at - 4, f"limit {number(limit)}", "muted", "end"))
            above = at
    return parts


# ---------------------------------------------------------------- lines and marks


def _line(line: Line, frame: Frame, axes: Axes) -> str:
    if line.form == "dots":
        return _dots(line, frame, axes)
    limit = axes.points if line.look == "faint" else max(axes.points, 200)
    data = _path(decimate(line.points, limit), frame)
    last = next((p for p in reversed(line.points) if math.isfinite(p[1])), None)
    tail = ": nothing measured"
    if last:
        tail = f": {number(last[1])} at {axes.along} {number(int(last[0]))}"
    return (
        f'<path class="{line.form} {line.look}" d="{data}">'
        f"<title>{escape(line.label + tail)}</title></path>"
    )


def _path(points: Sequence[Point], frame: Frame) -> str:
    """Path data with a move after every gap; a lone point is a dot (a line of no length)."""
    out: list[str] = []
    length = 0
    for x, y in [*points, (0.0, math.nan)]:
        if math.isfinite(y):
            place = f"{frame.x(x):.1f} {frame.y(y):.1f}"
            out.append(f"M{place}" if length == 0 else f" {place}")
            length += 1
        else:
            if length == 1:
                out.append("h0")
            length = 0
    return "".join(out)


def _dots(line: Line, frame: Frame, axes: Axes) -> str:
    points = decimate([p for p in line.points if math.isfinite(p[1])], axes.points)
    radius = 3.2 if len(points) <= 80 else 2.0
    dots = (
        f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}"><title>'
        f"{escape(line.label)} {number(y)} at {axes.along} {number(int(x))}</title></circle>"
        for x, y in points
    )
    # what grows by factors keeps no rhythm that a pause could be seen by
    joined = points if axes.spacing == "log" else with_gaps(points)
    thread = f'<path class="thin" d="{_path(joined, frame)}"/>' if points else ""
    return f'<g class="{line.look}">{thread}{"".join(dots)}</g>'


def _marks(marks: Sequence[Mark], frame: Frame) -> list[str]:
    """Alarms (the worst of each 3-pixel column), then changes, then where a value broke."""
    worst: dict[int, Mark] = {}
    order = ("notice", "warning", "critical")
    alarms = [mark for mark in marks if mark.kind in order]
    for mark in sorted(alarms, key=lambda m: -order.index(m.kind)):
        worst.setdefault(int(frame.x(mark.step) / 3), mark)
    return [
        *(_alarm(mark, frame) for mark in worst.values()),
        *(_change(mark, frame) for mark in marks if mark.kind in ("change", "held")),
        *(_broken(mark, frame) for mark in marks if mark.kind == "broken"),
    ]


def _alarm(mark: Mark, frame: Frame) -> str:
    """A thin line: full height where critical, shorter from the top for a lesser level."""
    height = frame.y.start - frame.y.end
    share = {"notice": 0.06, "warning": 0.12}.get(mark.kind, 1.0)
    fade = ' opacity=".45"' if share == 1.0 else ""
    return (
        f'<path class="alarm {mark.kind}" d="M{frame.x(mark.step):.1f} {frame.y.end:.1f}'
        f'v{height * share:.1f}"{fade}><title>{escape(mark.text)}</title></path>'
    )


def _change(mark: Mark, frame: Frame) -> str:
    """A triangle on the axis, filled where the change kept what it promised."""
    held = " held" if mark.kind == "held" else ""
    return (
        f'<path class="change {mark.look}{held}" d="M{frame.x(mark.step):.1f} '
        f'{frame.y.start - 9:.1f}l5 9h-10z"><title>{escape(mark.text)}</title></path>'
    )


def _broken(mark: Mark, frame: Frame) -> str:
    """A cross at the top edge where a value stopped being a number, with its note beside it."""
    at, top = frame.x(mark.step), frame.y.end + 6
    inner = at > (frame.x.start + frame.x.end) / 2
    note = _text(at - 10 if inner else at + 10, top + 4, mark.note, "", "end" if inner else "start")
    return (
        f'<path class="broken {mark.look}" d="M{at - 4:.1f} {top - 4:.1f}l8 8m0-8l-8 8">'
        f"<title>{escape(mark.text)}</title></path>{note if mark.note else ''}"
    )


def _text(x: float, y: float, text: str, look: str, anchor: str) -> str:
    shown = f' class="{look}"' if look else ""
    return f'<text{shown} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
