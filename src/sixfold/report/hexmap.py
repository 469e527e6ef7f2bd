"""Head maps: one signal of every head of a layer, on the hexagonal grid the heads live on.

Colours are viridis (Smith and van der Walt, 2015): even in lightness, safe for the colour-blind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from sixfold.geometry.hexgrid import HexGrid, cartesian
from sixfold.report.scale import Scale, kind_of, number

_VIRIDIS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
    (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
)  # fmt: skip


class Moment(NamedTuple):
    """One column of maps: the values by layer and head, and the heads to point out."""

    step: int
    layers: Sequence[Sequence[float]]
    alarmed: frozenset[tuple[int, int]] = frozenset()
    changed: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class MapStyle:
    """How maps of one signal are drawn. `radius` is the grid's, None for a row of cells."""

    title: str
    unit: str
    scale: Scale
    radius: int | None
    width: int = 528


def viridis(fraction: float) -> str:
    """The colour at a fraction of the scale.

    >>> viridis(0), viridis(1)
    ('#440154', '#fde725')
    """
    place = min(max(fraction, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    share = place - index
    low, high = _VIRIDIS[index], _VIRIDIS[index + 1]
    return "#" + "".join(
        f"{round(a + share * (b - a)):02x}" for a, b in zip(low, high, strict=True)
    )


def colour_scale(values: Sequence[float], fixed: tuple[float, float] | None = None) -> Scale:
    """The scale from value to colour: fixed, or from least to greatest, logarithmic if wide."""
    known = [value for value in values if math.isfinite(value)]
    low, high = fixed or (min(known, default=0.0), max(known, default=1.0))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return Scale(low, high, 0.0, 1.0, "linear" if fixed else kind_of(known, 8))


def places(radius: int | None, num_heads: int) -> list[tuple[float, float]]:
    """Centres of the cells in units of a hexagon's side: on the grid, or in a row without one."""
    if radius is not None and HexGrid(radius).num_heads == num_heads:
        return [cartesian(q, r) for q, r in HexGrid(radius).coordinates]
    return [(math.sqrt(3) * (i - (num_heads - 1) / 2), 0.0) for i in range(num_heads)]


def head_name(layer: int, head: int, radius: int | None, num_heads: int) -> str:
    """A head in words, with its coordinate where it has one.

    >>> head_name(2, 3, 1, 7)
    'layer 2 head 3 H(0,0)'
    """
    on_grid = radius is not None and HexGrid(radius).num_heads == num_heads
    cell = f" {HexGrid(radius).coordinates[head]!r}" if radius is not None and on_grid else ""
    return f"layer {layer} head {head}{cell}"


def hex_maps(moments: Sequence[Moment], look: MapStyle) -> str:
    """Small multiples: a row for every layer, a column for every moment."""
    columns = max(len(moments), 1)
    num_layers = max((len(m.layers) for m in moments), default=0)
    left, top = 62.0, 52.0
    cell_width = (look.width - left - 4) / columns
    size = _side(moments, look, cell_width - 8)
    row_height = max(size * _extent(moments, look)[1] + 8, 22.0)
    parts = [bar(look)]
    for column, moment in enumerate(moments):
        x = left + cell_width * (column + 0.5)
        parts.append(label(x, top - 9, number(moment.step), "middle"))
        for layer in range(len(moment.layers)):
            y = top + row_height * (layer + 0.5)
            parts.append(_layer(moment, layer, look, (x, y, size)))
    parts.append(label(2, top - 9, "step", "start"))
    parts += [label(2, top + row_height * (n + 0.5) + 4, f"layer {n}", "start")
              for n in range(num_layers)]  # fmt: skip
    return drawing(look, top + row_height * num_layers + 4, "".join(parts))


def hex_row(moment: Moment, look: MapStyle) -> str:
    """One moment, every layer, wrapping like text; the cells of a slider, layer by layer."""
    columns = min(max(len(moment.layers), 1), 4)
    cell_width = (look.width - 8) / columns
    size = min(_side([moment], look, cell_width - 16), 26.0)
    row_height = max(size * _extent([moment], look)[1], 12.0) + 26
    parts = [bar(look)]
    for layer in range(len(moment.layers)):
        x = 4 + cell_width * (layer % columns + 0.5)
        y = 44 + row_height * (layer // columns)
        parts.append(label(x, y + 8, f"layer {layer}", "middle"))
        parts.append(_layer(moment, layer, look, (x, y + 14 + (row_height - 22) / 2, size)))
    rows = math.ceil(len(moment.layers) / columns)
    return drawing(look, 48 + row_height * rows, "".join(parts))


def _layer(moment: Moment, layer: int, look: MapStyle, place: tuple[float, float, float]) -> str:
    x, y, size = place
    values = moment.layers[layer]
    centres = places(look.radius, len(values))
    # outlined cells last, or their neighbours would cover half the outline
    order = sorted(range(len(values)), key=lambda head: (layer, head) in moment.alarmed)
    return "".join(
        _cell(moment, (layer, head), look, (x + size * dx, y + size * dy, size))
        for head in order
        for dx, dy in (centres[head],)
    )


def _cell(
    moment: Moment, head: tuple[int, int], look: MapStyle, place: tuple[float, float, float]
) -> str:
    """A pointy-top hexagon with its value as tooltip; hollow where nothing was measured."""
    x, y, size = place
    values = moment.layers[head[0]]
    value = values[head[1]]
    name = head_name(*head, look.radius, len(values))
    measured, shape = math.isfinite(value), square if look.radius is None else hexagon
    text = f"{number(value)} {look.unit}".strip() if measured else "no finite value"
    fill = f' fill="{viridis(look.scale.fraction(value))}"' if measured else ""
    rung = " rung" if head in moment.alarmed else ""
    dot = f'<circle class="touched" cx="{x:.1f}" cy="{y:.1f}" r="{min(2.4, size / 2.5):.1f}"/>'
    return (
        f'<path class="{"cell" if measured else "hole"}{rung}" d="{shape(x, y, size)}"{fill}>'
        f"<title>{escape(name)}: {escape(text)} at step {number(moment.step)}</title></path>"
        + (dot if head in moment.changed else "")
    )


def hexagon(x: float, y: float, size: float) -> str:
    """Path of a pointy-top hexagon with corners at distance `size` from its centre."""
    w, h = size * math.sqrt(3) / 2, size / 2
    return (
        f"M{x:.1f} {y - size:.1f}l{w:.1f} {h:.1f}v{size:.1f}l{-w:.1f} {h:.1f}"
        f"l{-w:.1f} {-h:.1f}v{-size:.1f}z"
    )


def square(x: float, y: float, size: float) -> str:
    """Path of a square as wide as a hexagon of this size."""
    side = size * math.sqrt(3)
    return f"M{x - side / 2:.1f} {y - side / 2:.1f}h{side:.1f}v{side:.1f}h{-side:.1f}z"


def _extent(moments: Sequence[Moment], look: MapStyle) -> tuple[float, float]:
    """Width and height of a layer's map in units of a hexagon's side."""
    counts = {len(heads) for moment in moments for heads in moment.layers} or {1}
    cells = [cell for count in counts for cell in places(look.radius, count)]
    return (
        2 * max(abs(x) for x, _ in cells) + math.sqrt(3),
        2 * max(abs(y) for _, y in cells) + 2,
    )


def _side(moments: Sequence[Moment], look: MapStyle, width: float) -> float:
    return min(width / _extent(moments, look)[0], 18.0)


def bar(look: MapStyle) -> str:
    """Title at the left, the colour scale with its ends at the right."""
    unit = f'<tspan class="muted" dx="8">{escape(look.unit)}</tspan>' if look.unit else ""
    right, count, step = look.width - (52 if look.scale.kind == "linear" else 84), 24, 4.0
    left = right - count * step
    log = "" if look.scale.kind == "linear" else " (log)"
    bar = "".join(
        f'<rect x="{left + i * step:.0f}" y="5" width="{step + 0.5}" height="9" '
        f'fill="{viridis(i / (count - 1))}" shape-rendering="crispEdges"/>'
        for i in range(count)
    )
    return (
        f'<text class="title" x="2" y="14">{escape(look.title)}{unit}</text>{bar}'
        + label(left - 6, 14, number(look.scale.low), "end")
        + label(right + 6, 14, number(look.scale.high) + log, "start")
    )


def label(x: float, y: float, text: str, anchor: str) -> str:
    """A few quiet words."""
    return (
        f'<text class="muted" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def drawing(look: MapStyle, height: float, body: str) -> str:
    """A map as SVG."""
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-label="{escape(look.title)} of every head" viewBox="0 0 {look.width} {height:.0f}" '
        f'style="max-width:{look.width}px">{body}</svg>'
    )
