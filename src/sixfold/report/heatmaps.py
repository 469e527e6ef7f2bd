"""Values by layer and head, between heads, and by stage, as matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sixfold.report.hexmap import colour_scale, viridis
from sixfold.report.plots import blank, load
from sixfold.report.scale import number
from sixfold.report.svg import LIGHT, LOOKS

WRITTEN = 16
"""Values are written into the cells of a map that is no wider than this."""

COLUMNS = 4
"""Matrices in a row."""


class Panel(NamedTuple):
    """One map: rows of values, NaN stays empty; `fixed` are the ends of its colours."""

    title: str
    unit: str
    rows: Sequence[Sequence[float]]
    fixed: tuple[float, float] | None = None


def check() -> None:
    """Raise ModuleNotFoundError, naming the extra, where there is nothing to draw with."""
    load("matplotlib")


def panels(shown: Sequence[Panel], names: Sequence[str]) -> Any:
    """Maps of layers by heads, side by side, with a colour bar each.

    >>> len(panels([Panel("Entropy", "", [[0.5, 0.7]], (0, 1))], ["0"]).axes)
    2
    """
    across, down = min(2, len(shown)), math.ceil(len(shown) / 2)
    widest = max(len(row) for panel in shown for row in panel.rows)
    label = 0.075 * max(map(len, names))
    width = min(9.0, max(4.2, 0.46 * widest + 1.6)) + label
    height = min(9.0, max(1.6, 0.3 * len(names) + 1.1))
    figure = blank(across * width, down * height)
    for place, panel in enumerate(shown, 1):
        axes = _map(figure, (down, across, place), panel)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        _colour_bar(figure, axes, panel)
    return figure


def matrices(shown: Sequence[Panel], unit: str) -> Any:
    """Maps of heads by heads on the scale of colours of the first."""
    across = min(COLUMNS, len(shown))
    down = math.ceil(len(shown) / across)
    side = min(3.6, max(2.0, 0.27 * max(len(panel.rows) for panel in shown) + 0.8))
    # a title is as wide as its matrix, or the next one starts on it
    width = max(side, 0.085 * max(len(panel.title) for panel in shown) + 0.4)
    figure = blank(across * width + 1.0, down * side)
    for place, panel in enumerate(shown, 1):
        axes = _map(figure, (down, across, place), panel)
        axes.set_aspect("equal")
        axes.set_yticks(axes.get_xticks())
    _colour_bar(figure, figure.axes, shown[0]).set_label(unit, fontsize=9)
    return figure


def stacks(
    title: str, unit: str, parts: Sequence[Mapping[str, float]], names: Sequence[str]
) -> Any:
    """One bar for each layer, of its parts one after another."""
    figure = blank(7.5, max(1.8, 0.3 * len(names) + 1.1))
    axes = figure.add_subplot(1, 1, 1)
    axes.set_title(f"{title} ({unit})", loc="left", fontsize=11)
    known = list(dict.fromkeys(name for row in parts for name in row))
    ends = [0.0] * len(parts)
    for look, name in zip(LOOKS, known, strict=False):
        lengths = [row.get(name, 0.0) for row in parts]
        axes.barh(range(len(parts)), lengths, left=ends, color=LIGHT[look], label=name)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("layer")
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=LIGHT["muted"], labelsize=9)
    if len(known) > 1:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return figure


def _map(figure: Any, place: tuple[int, int, int], panel: Panel) -> Any:
    axes = figure.add_subplot(*place)
    title = f"{panel.title} ({panel.unit})" if panel.unit else panel.title
    axes.set_title(title, loc="left", fontsize=10)
    widest = max(map(len, panel.rows))
    rows = [[*row, *[math.nan] * (widest - len(row))] for row in panel.rows]
    axes.imshow(rows, aspect="auto", interpolation="nearest", **_colours(panel))
    step = 1 if widest <= WRITTEN else math.ceil(widest / 8)
    axes.set_xticks(range(0, widest, step))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=LIGHT["muted"], labelsize=8, length=0)
    if widest <= WRITTEN and len(rows) <= 2 * WRITTEN:
        _write(axes, panel)
    return axes


def _write(axes: Any, panel: Panel) -> None:
    """The value of each cell, in the ink that is readable on it."""
    scale = colour_scale(_values(panel), panel.fixed)
    for y, row in enumerate(panel.rows):
        for x, value in enumerate(row):
            if math.isfinite(value):
                ink = LIGHT["paper"] if scale.fraction(value) < 0.6 else LIGHT["ink"]
                text = f"{value:.2f}".lstrip("0") if panel.fixed else number(float(f"{value:.2g}"))
                shown = "0" if text == ".00" else text
                axes.text(x, y, shown, ha="center", va="center", fontsize=7, color=ink)


def _values(panel: Panel) -> list[float]:
    return [value for row in panel.rows for value in row if math.isfinite(value)]


def _colours(panel: Panel) -> dict[str, Any]:
    """Colour map and norm, logarithmic where the values are wide."""
    colours = load("matplotlib.colors")
    scale = colour_scale(_values(panel), panel.fixed)
    table = colours.ListedColormap([viridis(i / 255) for i in range(256)]).with_extremes(
        bad=LIGHT["grid"]
    )
    kinds = {"linear": colours.Normalize, "log": colours.LogNorm, "symlog": colours.AsinhNorm}
    norm = kinds[scale.kind](vmin=scale.low, vmax=scale.high)
    return {"cmap": table, "norm": norm}


def _colour_bar(figure: Any, axes: Any, panel: Panel) -> Any:
    mappable = load("matplotlib.cm").ScalarMappable(**_colours(panel))
    bar = figure.colorbar(mappable, ax=axes, aspect=28, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=LIGHT["muted"], labelsize=8)
    return bar
