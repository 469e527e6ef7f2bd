"""Figures for a notebook, as matplotlib objects; nothing global is touched.

>>> from sixfold.contracts import Snapshot
>>> history = [Snapshot(0, 2.3, {"entropy": ((0.9, 0.8),)}, {}, {})]
>>> len(TelemetryVisualizer(history).plot_entropy_evolution().axes)
1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import nn

from sixfold.contracts import Snapshot
from sixfold.geometry.hexgrid import HexGrid, cartesian
from sixfold.report.hexmap import colour_scale, viridis
from sixfold.report.plots import blank, load, panel, with_legend
from sixfold.report.scale import Point, finite, kind_of, with_gaps
from sixfold.report.svg import LIGHT, LOOKS


@runtime_checkable
class OnGrid(Protocol):
    """A module whose heads live on a hexagonal grid: its attribute `grid` is a `HexGrid`."""

    grid: HexGrid


class TelemetryVisualizer:
    """The four plots of a history of snapshots."""

    def __init__(self, history: Sequence[Snapshot]) -> None:
        self.history = tuple(history)

    def plot_entropy_evolution(self) -> Any:
        """Entropy of every head over time (thin) and the mean of each layer (thick)."""
        figure = blank(8, 4)
        axes = panel(figure, (1, 1, 1), "Attention entropy", "of log n")
        for layer, heads in enumerate(self._heads("entropy")):
            for points in heads:
                _draw(axes, points, LOOKS[layer % 8], width=0.6, alpha=0.45)
            mean = _across(heads, lambda values: math.fsum(values) / len(values))
            _draw(axes, mean, LOOKS[layer % 8], label=f"layer {layer}")
        axes.set_ylim(-0.02, 1.02)
        return with_legend(figure)

    def plot_condition_numbers(self) -> Any:
        """Largest condition number of each layer's query, key and value projections."""
        figure = blank(11, 3.6)
        for place, part in enumerate(("q", "k", "v"), 1):
            title = {"q": "Queries", "k": "Keys", "v": "Values"}[part]
            axes = panel(figure, (1, 3, place), f"{title}: condition number", "")
            for layer, heads in enumerate(self._heads(f"condition_{part}")):
                _draw(axes, _across(heads, max), LOOKS[layer % 8], label=f"layer {layer}")
            _log_if_wide(axes)
        return with_legend(figure)

    def plot_computational_profile(self) -> Any:
        """Time of each measured part of a step, in us."""
        figure = blank(8, 4)
        axes = panel(figure, (1, 1, 1), "Time per step and part", "us")
        for i, name in enumerate(dict.fromkeys(n for row in self.history for n in row.times_us)):
            points = [(r.step, r.times_us[name]) for r in self.history if name in r.times_us]
            _draw(axes, points, LOOKS[i % 8], label=name)
        _log_if_wide(axes)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        return with_legend(figure)

    def plot_gradient_flow(self) -> Any:
        """Gradient norms: the largest head of each layer, and the whole model where recorded."""
        figure = blank(8, 4)
        axes = panel(figure, (1, 1, 1), "Gradient norm", "")
        for layer, heads in enumerate(self._heads("gradient_norm")):
            _draw(axes, _across(heads, max), LOOKS[layer % 8], label=f"layer {layer}")
        name = "gradient_norm"
        whole = [(row.step, row.scalars[name]) for row in self.history if name in row.scalars]
        _draw(axes, whole, "ink", label="whole model", width=1.0)
        _log_if_wide(axes)
        return with_legend(figure)

    def _heads(self, signal: str) -> list[list[list[Point]]]:
        """Points by layer, then head."""
        rows = [row for row in self.history if signal in row.signals]
        shape = [len(heads) for heads in rows[-1].signals[signal]] if rows else []
        return [
            [
                [(row.step, row.signals[signal][layer][head]) for row in rows]
                for head in range(count)
            ]
            for layer, count in enumerate(shape)
        ]


def grid_of(model: nn.Module) -> HexGrid:
    """The grid of the first module, from the outside in, that has one.

    Raises ValueError where no module has an attribute `grid` that is a `HexGrid`.
    """
    for module in model.modules():
        if isinstance(module, OnGrid) and isinstance(module.grid, HexGrid):
            return module.grid
    raise ValueError(f"{type(model).__name__} has no module whose `grid` is a HexGrid")


def plot_hexagonal_grid(
    model: nn.Module, title: str = "Heads on the grid", values: Sequence[float] | None = None
) -> Any:
    """The heads of a model as hexagons, joined to their neighbours, coloured by `values` if given.

    Raises ValueError for a model without a grid, or for a number of values other than its heads.
    """
    grid = grid_of(model)
    if values is not None and len(values) != grid.num_heads:
        raise ValueError(f"{grid.num_heads} heads need as many values, got {len(values)}")
    figure = blank(6, 6)
    axes = figure.add_subplot(1, 1, 1)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_aspect("equal")
    axes.set_axis_off()
    _edges(axes, grid)
    _cells(axes, grid, values)
    if values is not None:
        _colour_bar(figure, axes, values)
    span = math.sqrt(3) * (grid.radius + 0.75)
    axes.set_xlim(-span, span)
    axes.set_ylim(span, -span)
    return with_legend(figure)


def _edges(axes: Any, grid: HexGrid) -> None:
    pairs = [(a, b) for a in grid.coordinates for b in a.neighbours() if b in grid.index and a < b]
    for a, b in pairs:
        (x, y), (u, v) = cartesian(*a), cartesian(*b)
        axes.plot([x, u], [y, v], color=LIGHT["axis"], linewidth=1.4, zorder=1)


def _cells(axes: Any, grid: HexGrid, values: Sequence[float] | None) -> None:
    patches = load("matplotlib.patches")
    scale = colour_scale(values) if values is not None else None
    for head, cell in enumerate(grid.coordinates):
        value = values[head] if values is not None else math.nan
        known = scale is not None and math.isfinite(value)
        fill = viridis(scale.fraction(value)) if scale is not None and known else LIGHT["paper"]
        dark = scale is not None and known and scale.fraction(value) < 0.6
        ink = LIGHT["paper"] if dark else LIGHT["ink"]
        centre = cartesian(*cell)
        shape = patches.RegularPolygon(centre, 6, radius=0.78, facecolor=fill, zorder=2)
        shape.set_edgecolor(LIGHT["muted"])
        axes.add_patch(shape)
        size = max(4.0, 26 / (grid.radius + 1.4))
        axes.text(*centre, repr(cell), ha="center", va="center", fontsize=min(size, 11), color=ink)


def _colour_bar(figure: Any, axes: Any, values: Sequence[float]) -> None:
    scale = colour_scale(values)
    colours = load("matplotlib.colors")
    norms = {
        "linear": colours.Normalize,
        "log": colours.LogNorm,
        "symlog": partial(colours.AsinhNorm, 1.0),
    }
    table = colours.ListedColormap([viridis(i / 255) for i in range(256)])
    mappable = load("matplotlib.cm").ScalarMappable(
        norms[scale.kind](vmin=scale.low, vmax=scale.high), table
    )
    bar = figure.colorbar(mappable, ax=axes, shrink=0.6, aspect=28, pad=0.02)
    bar.outline.set_visible(False)


# ---------------------------------------------------------------- plumbing


def _draw(
    axes: Any,
    points: Sequence[Point],
    look: str,
    label: str = "",
    width: float = 1.6,
    alpha: float = 1.0,
) -> None:
    """One line with its gaps; a lone point stays visible as a small dot."""
    if not finite(points):
        return
    x, y = zip(*with_gaps(points), strict=True)
    axes.plot(x, y, color=LIGHT[look], linewidth=width, alpha=alpha, label=label or "_",
              marker=".", markersize=2 * width if len(x) < 40 else 0)  # fmt: skip


def _across(
    heads: Sequence[Sequence[Point]], reduce: Callable[[list[float]], float]
) -> list[Point]:
    """One value per step from the finite values of all heads, NaN where there are none."""
    out = []
    for column in zip(*heads, strict=True):
        known = finite(column)
        out.append((column[0][0], reduce(known) if known else math.nan))
    return out


def _log_if_wide(axes: Any) -> None:
    values = [v for line in axes.lines for v in line.get_ydata() if math.isfinite(v)]
    axes.set_yscale({"symlog": "asinh"}.get(kind_of(values), kind_of(values)))
