"""What every matplotlib figure here is made with."""

from __future__ import annotations

import importlib
from typing import Any

from sixfold.report.svg import LIGHT


def load(name: str) -> Any:
    """A module of matplotlib.

    Raises ModuleNotFoundError that names the extra, where it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'sixfold[cli]'") from error


def blank(width: float, height: float) -> Any:
    """A figure with its own canvas: it can be saved and shown, and belongs to no global list."""
    figure = load("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    load("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def panel(figure: Any, place: tuple[int, int, int], title: str, unit: str) -> Any:
    """Axes over steps at a place of a figure."""
    axes = figure.add_subplot(*place)
    axes.set_title(f"{title} ({unit})" if unit else title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(load("matplotlib.ticker").MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT["axis"])
    axes.tick_params(colors=LIGHT["muted"], labelsize=9)
    axes.grid(visible=True, axis="y", color=LIGHT["grid"])
    axes.set_axisbelow(True)
    return axes


def with_legend(figure: Any) -> Any:
    """Put a legend beside the last plot, if it has several named lines."""
    axes = figure.axes[-1]
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return figure
