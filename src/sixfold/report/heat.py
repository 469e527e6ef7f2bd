"""Heat maps of heads that sit on no grid: a row for each head, time along the page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from sixfold.report.hexmap import MapStyle, bar, drawing, label, viridis
from sixfold.report.scale import Scale, number, rhythm, tick_labels
from sixfold.report.thin import Track

COLUMNS, SHADES = 96, 48
LEFT, TOP, TALL = 62.0, 34.0, 420.0
Cell = tuple[int, int]


class Spot(NamedTuple):
    """Something that happened to a head at a step."""

    step: int
    head: tuple[int, int]


class Grid(NamedTuple):
    """A value for every head and stretch of time; `first` and `last` are its ends."""

    values: np.ndarray
    first: int
    last: int

    def column(self, step: float) -> int:
        """The stretch that a step falls into."""
        count, span = self.values.shape[1], self.last - self.first + 1
        return min(max(int((step - self.first) * count / span), 0), count - 1)


def heat_map(
    track: Track, look: MapStyle, alarms: Iterable[Spot], changes: Iterable[Spot], *, least: bool
) -> str:
    """One signal of every head over time.

    A cell has the largest value of its stretch of time, or where `least` the smallest. Outlined
    cells had an alarm, dots are changes.
    """
    grid = gridded(track, least=least)
    rows = list(placed(track.shape))
    height = rows[0][2]
    width = (look.width - LEFT - 6) / grid.values.shape[1]
    parts = [bar(look), *_shades(grid, rows, look, (width, height)), *_names(track, rows)]
    at = {head: y for head, y, _ in rows}
    cells = {(grid.column(spot.step), spot.head) for spot in alarms if spot.head in at}
    parts += [
        f'<path class="cell rung" fill="none" d="M{LEFT + column * width:.1f} {at[head]:.1f}'
        f'h{width:.1f}v{height:.1f}h{-width:.1f}z"/>'
        for column, head in sorted(cells)
    ]
    touched = {(grid.column(spot.step), spot.head) for spot in changes if spot.head in at}
    size = min(2.4, max(1.4, height / 2.5))
    parts += [
        f'<circle class="touched" cx="{LEFT + (column + 0.5) * width:.1f}" '
        f'cy="{at[head] + height / 2:.1f}" r="{size:.1f}"/>'
        for column, head in sorted(touched)
    ]
    parts += _tips(track, rows, look)
    bottom = rows[-1][1] + height
    parts += _axis(grid, look, bottom)
    return drawing(look, bottom + 22, "".join(parts))


def gridded(track: Track, *, least: bool) -> Grid:
    """A track in stretches of equal length, none shorter than the rhythm it was measured in."""
    found, first, last = track.extremes(), track.steps[0], track.steps[-1]
    beat = rhythm(track.steps) or 1
    count = max(1, min(COLUMNS, int((last - first) / beat) + 1))
    grid = Grid(np.full((sum(track.shape), count), np.nan), first, last)
    values, reduce = (found.low, np.fmin) if least else (found.high, np.fmax)
    for row, end in zip(values[:, : sum(track.shape)], found.end.tolist(), strict=True):
        column = grid.column(end)
        grid.values[:, column] = reduce(grid.values[:, column], row)
    return grid


def placed(shape: Sequence[int]) -> Iterator[tuple[Cell, float, float]]:
    """Every head, where its row begins and how high it is; a little air between layers."""
    height = min(14.0, max(2.5, (TALL - 3 * len(shape)) / max(sum(shape), 1)))
    y = TOP
    for layer, heads in enumerate(shape):
        for head in range(heads):
            yield (layer, head), y, height
            y += height
        y += 3


def _shades(
    grid: Grid, rows: Sequence[tuple[Cell, float, float]], look: MapStyle, size: tuple[float, float]
) -> list[str]:
    """A path for each colour: neighbours of one colour are one stroke of it."""
    width, height = size
    strokes: dict[int, list[str]] = defaultdict(list)
    for values, (_, y, _) in zip(grid.values.tolist(), rows, strict=True):
        shades = [_shade(value, look.scale) for value in values]
        start = 0
        for column in range(1, len(shades) + 1):
            if column < len(shades) and shades[column] == shades[start]:
                continue
            if shades[start] is not None:
                x, wide = LEFT + start * width, (column - start) * width
                strokes[shades[start]].append(
                    f"M{x:.1f} {y:.1f}h{wide:.1f}v{height:.1f}h{-wide:.1f}z"
                )
            start = column
    return [
        f'<path fill="{viridis(shade / (SHADES - 1))}" shape-rendering="crispEdges" '
        f'd="{"".join(paths)}"/>'
        for shade, paths in sorted(strokes.items())
    ]


def _shade(value: float, scale: Scale) -> int | None:
    return round(scale.fraction(value) * (SHADES - 1)) if math.isfinite(value) else None


def _names(track: Track, rows: Sequence[tuple[Cell, float, float]]) -> list[str]:
    """Layers by name, as many as have room; single heads where the rows are high enough."""
    parts, above = [], -math.inf
    for layer, heads in enumerate(track.shape):
        mine = [(y, height) for (n, _), y, height in rows if n == layer]
        if not heads or mine[0][0] - above < 12:
            continue
        above = mine[0][0]
        parts.append(label(2, above + min(10, 0.5 * mine[0][1] + 4.5), f"layer {layer}", "start"))
    return parts


def _tips(track: Track, rows: Sequence[tuple[Cell, float, float]], look: MapStyle) -> list[str]:
    """What a row says when pointed at."""
    found = track.extremes()
    parts = []
    for column, ((layer, head), y, height) in enumerate(rows):
        low, high = found.low[:, column], found.high[:, column]
        text = "no finite value"
        if not np.isnan(high).all():
            least, most = int(np.nanargmin(low)), int(np.nanargmax(high))
            text = (
                f"{number(float(low[least]))} (step {number(int(found.low_at[least, column]))}) to "
                f"{number(float(high[most]))} (step {number(int(found.high_at[most, column]))}) "
                f"{look.unit}"
            ).strip()
        parts.append(
            f'<rect x="{LEFT:.0f}" y="{y:.1f}" width="{look.width - LEFT - 6:.0f}" '
            f'height="{height:.1f}" fill="transparent"><title>layer {layer} head {head}: '
            f"{escape(text)}</title></rect>"
        )
    return parts


def _axis(grid: Grid, look: MapStyle, bottom: float) -> list[str]:
    scale = Scale(grid.first, grid.last + 1, LEFT, look.width - 6)
    steps = scale.ticks(6)
    parts = [label(2, bottom + 16, "step", "start")]
    for step, text in zip(steps, tick_labels(steps), strict=True):
        anchor = "end" if scale(step) > look.width - 6 - 3.2 * len(text) else "middle"
        parts.append(f'<path class="axis" d="M{scale(step):.1f} {bottom + 1:.1f}v4"/>')
        parts.append(label(scale(step), bottom + 16, text, anchor))
    return parts
