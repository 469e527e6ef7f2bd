"""A row of tokens as SVG text: how far neighbours are apart above, groups by scale below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from sixfold.attention.hierarchy import Group
from sixfold.report.hexmap import label
from sixfold.report.scale import Scale, number
from sixfold.report.svg import LOOKS

WIDE = 1080.0
"""Of a drawing; tokens that have no room begin another line."""
OVERFLOW = 1e38
"""What is apart by more, in nats, is drawn as high as there is room."""
LEFT, TALL, ROW, LETTER = 72.0, 44.0, 17.0, 7.9
SIGNS = {code: 0x2400 + code for code in range(0x20)} | {0x7F: "␡"}
"""Of control characters: a drawing cannot hold them."""
NONE = dict.fromkeys([*range(0xD800, 0xE000), 0xFFFE, 0xFFFF], "�")
"""No characters at all: halves of surrogate pairs and the like, which no file can hold."""
VISIBLE = str.maketrans(SIGNS | NONE | {" ": "␣", "\n": "⏎", "\t": "⇥"})
LEGIBLE = str.maketrans(
    {code: VISIBLE[code] for code in (SIGNS | NONE) if chr(code) not in "\t\n\r"}
)
CELL, SINK, BEGINS, JOINS, FULL = "cell", "sink", "begins", "joins", "full"
LOOK = {BEGINS: "s0", SINK: "s2", JOINS: "faint", FULL: "warning"}
NAMES = {
    CELL: "a cell begins",
    SINK: "a sink, or beside one",
    BEGINS: "a group begins",
    JOINS: "below the threshold: joined",
    FULL: "joined for want of room",
}


class Head(NamedTuple):
    """What one head made of one sequence.

    groups: of all scales; gaps: how far each token is from the one before in its cell, nats, inf
    where a cell begins and nan where the token is of no cell; capacity: groups of a cell at most.
    """

    groups: Sequence[Group]
    gaps: Sequence[float]
    threshold: float
    capacity: int


class Line(NamedTuple):
    """Tokens [start, stop) on one line below `above`; `edges`: their left ones, and the right."""

    start: int
    stop: int
    edges: Sequence[float]
    above: float

    def span(self, group: Group) -> tuple[float, float] | None:
        """The part of a group that is on this line."""
        first, last = max(group.start, self.start), min(group.stop, self.stop)
        if first >= last:
            return None
        return self.edges[first - self.start], self.edges[last - self.start]


def visible(token: str) -> str:
    """A token with its blanks as signs.

    >>> visible(" the\\n")
    '␣the⏎'
    """
    return token.translate(VISIBLE)


def legible(text: str) -> str:
    """A text as a page can hold it, its blanks as they are.

    >>> legible("the\\0\\n")
    'the␀\\n'
    """
    return text.translate(LEGIBLE)


def there(head: Head, group: Group) -> list[int]:
    """The tokens of a group: of what lies between them, none that was hidden."""
    return [at for at in range(group.start, group.stop) if not math.isnan(head.gaps[at])]


def spelled(head: Head, group: Group, tokens: Sequence[str]) -> str:
    """The text of a group."""
    return "".join(visible(tokens[at]) for at in there(head, group))


def fates(head: Head) -> list[str]:
    """What became of each token's neighbourhood to the one before, at the finest scale."""
    begun = {group.start: group.began for group in head.groups if group.scale == 0}

    def fate(at: int, gap: float) -> str:
        if gap == math.inf:
            return CELL
        if at in begun:
            return SINK if math.isinf(begun[at]) else BEGINS
        return JOINS if gap < head.threshold else FULL

    return [fate(at, gap) for at, gap in enumerate(head.gaps)]


def reasons(head: Head) -> list[str]:
    """Why each group began, and why it goes on as far as it does."""
    finer = {(group.scale + 1, group.start, group.stop) for group in head.groups}
    return [
        _reason(head, group, same=(group.scale, group.start, group.stop) in finer)
        for group in head.groups
    ]


def _reason(head: Head, group: Group, *, same: bool) -> str:
    """Of one group, which may be the same as one of the finer scale."""
    if math.isfinite(group.began):
        began = (
            f"began {number(group.began)} nats from what is before, "
            f"not below the threshold of {number(head.threshold)}"
        )
    elif group.place == 0:
        began = "begins its cell"
    else:
        began = "is a sink, or stands beside one"
    if len(there(head, group)) == 1:
        return f"{began}; alone"
    if same:
        return f"{began}; joined nothing more at this scale"
    inside = f"neighbours inside at most {number(group.apart)} nats apart"
    if group.apart < head.threshold:
        return f"{began}; {inside}: consensus"
    return f"{began}; {inside}: joined for want of room, a cell has {head.capacity} groups"


def lines(tokens: Sequence[str], tall: float) -> Iterator[Line]:
    """Tokens in lines that fit the drawing, each as wide as its text, `tall` from line to line."""
    start, edges, above = 0, [LEFT], 44.0
    for at, token in enumerate(tokens):
        wide = max(14.0, LETTER * len(visible(token)) + 6)
        if edges[-1] + wide > WIDE and at > start:
            yield Line(start, at, edges, above)
            start, edges, above = at, [LEFT], above + tall
        edges.append(edges[-1] + wide)
    yield Line(start, len(tokens), edges, above)


def brackets(head: Head, tokens: Sequence[str], title: str) -> tuple[str, float]:
    """The drawing and its height: all tokens that are of a cell, and their groups.

    The last line is free, for what is pointed at or focused.
    """
    tokens = tokens[: len(head.gaps)]
    scales = 1 + max(group.scale for group in head.groups)
    known = [gap for gap in (*head.gaps, head.threshold) if abs(gap) < OVERFLOW]
    top = max(known, default=0.0) or 1.0
    rows = list(lines(tokens, TALL + 46 + ROW * scales))
    bottom = rows[-1].above + TALL + 46 + ROW * scales
    became = fates(head)
    parts = [f'<text class="title" x="2" y="14">{escape(title)}</text>', _legend(head, became)]
    for line in rows:
        base = line.above + TALL
        parts += _bars(head, became, line, Scale(0.0, 1.04 * top, base, line.above))
        parts += _tokens(tokens, line)
        parts += [
            label(2, base + 35 + ROW * scale, f"scale {scale}", "start") for scale in range(scales)
        ]
    for group, why in zip(head.groups, reasons(head), strict=True):
        text = f"“{spelled(head, group, tokens)}”: {why}"
        parts.append(_group(group, len(there(head, group)), text, rows, bottom + 13))
    return "".join(parts), bottom + 18


def style(colours: Mapping[str, str]) -> str:
    """The rules that these drawings need beside those of charts."""
    return (
        ".chart .token{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
        f".chart .group rect{{fill:currentColor;stroke:{colours['paper']};stroke-width:1}}"
        f".chart .group .paper{{font-size:10px;fill:{colours['paper']}}}"
        ".chart .alone rect{opacity:.35}.chart .bar{fill:currentColor}"
        ".chart .tip{visibility:hidden}.chart .group{outline:none}"
        ".chart .group:hover .tip,.chart .group:focus .tip{visibility:visible}"
        ".chart:focus-within .group:hover:not(:focus) .tip{visibility:hidden}"
        f".chart .group:hover rect,.chart .group:focus rect{{opacity:1;stroke:{colours['ink']};"
        "stroke-width:2}"
    )


def _legend(head: Head, became: Sequence[str]) -> str:
    """What the colours mean, of those that occur."""
    seen = {what for what, gap in zip(became, head.gaps, strict=True) if not math.isnan(gap)}
    keys = [(LOOK[name], "▮", NAMES[name]) for name in LOOK if name in seen]
    if math.isfinite(head.threshold):
        keys.append(("critical", "┄", f"threshold {number(head.threshold)} nats"))
    keys.append(("faint", "┊", NAMES[CELL]))
    shown = (
        f'<tspan class="key {look}" dx="{10 if i else 0}">{sign}</tspan>'
        f'<tspan dx="4">{text}</tspan>'
        for i, (look, sign, text) in enumerate(keys)
    )
    return f'<text x="2" y="33">{"".join(shown)}</text>'


def _bars(head: Head, became: Sequence[str], line: Line, bars: Scale) -> list[str]:
    """A bar for each token, on its left edge: how far it is from the one before."""
    left, right = line.edges[0], line.edges[-1]
    parts = [
        f'<path class="axis" d="M{left:.1f} {bars.start:.1f}H{right:.1f}"/>',
        label(2, bars.end + 10, "nats apart", "start"),
    ]
    if math.isfinite(head.threshold):
        y = bars(head.threshold)
        parts.append(f'<path class="limit critical" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
    for at, x in zip(range(line.start, line.stop), line.edges, strict=False):
        gap = head.gaps[at]
        if math.isnan(gap):
            continue
        what = became[at]
        if what == CELL:
            parts.append(f'<path class="hole" d="M{x:.1f} {bars.end:.1f}V{bars.start + 24:.1f}"/>')
            continue
        y = bars(max(gap, 0.0))
        parts.append(
            f'<rect class="bar {LOOK[what]}" x="{x - 2.5:.1f}" y="{y:.1f}" width="5" '
            f'height="{bars.start - y:.1f}"><title>{number(gap)} nats: {NAMES[what]}</title></rect>'
        )
    return parts


def _tokens(tokens: Sequence[str], line: Line) -> list[str]:
    """The text, token by token."""
    shown = zip(tokens[line.start : line.stop], pairwise(line.edges), strict=True)
    return [
        f'<text class="token" x="{(left + right) / 2:.1f}" y="{line.above + TALL + 17:.1f}" '
        f'text-anchor="middle">{escape(visible(token))}</text>'
        for token, (left, right) in shown
    ]


def _group(group: Group, size: int, text: str, rows: Sequence[Line], tip: float) -> str:
    """A group as a bar under its tokens, which says `text` at height `tip` when focused."""
    parts = []
    for line in rows:
        if (span := line.span(group)) is None:
            continue
        y = line.above + TALL + 24 + ROW * group.scale
        left, wide = span[0] + 1, span[1] - span[0] - 2
        parts.append(f'<rect x="{left:.1f}" y="{y:.1f}" width="{wide:.1f}" height="13" rx="3"/>')
        if size > 1:
            parts.append(
                f'<text class="paper" x="{left + wide / 2:.1f}" y="{y + 10:.1f}" '
                f'text-anchor="middle">{size}</text>'
            )
    alone = " alone" if size == 1 else ""
    return (
        f'<g class="group {LOOKS[group.scale % len(LOOKS)]}{alone}" tabindex="0" role="img" '
        f'aria-label="scale {group.scale}, {escape(text)}">{"".join(parts)}'
        f'<text class="tip" x="2" y="{tip:.1f}">{escape(text)}</text></g>'
    )
