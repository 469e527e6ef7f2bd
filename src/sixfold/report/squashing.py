"""How sensitivity falls with distance on a graph, as a matplotlib figure.

>>> import torch
>>> from sixfold.geometry.resistance import by_distance
>>> found = by_distance(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]))
>>> len(plot_sensitivity({"mean": found}).axes)
1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sixfold.geometry.resistance import Quartiles
from sixfold.report.plots import blank, panel, with_legend
from sixfold.report.svg import LIGHT, LOOKS

MOST = 8
"""As many models as there are colours."""


def plot_sensitivity(models: Mapping[str, Quartiles], title: str = "Sensitivity") -> Any:
    """A line per model through its medians over a band of its quartiles, on a logarithmic scale.

    A model's line ends where nothing arrives any more: zeros have no logarithm.

    Raises ValueError for no model, and for more than eight.
    """
    if not 1 <= len(models) <= MOST:
        raise ValueError(f"models must be 1 to {MOST}, got {len(models)}")
    figure = blank(7.2, 3.8)
    axes = panel(figure, (1, 1, 1), title, "|| d h_v / d x_u ||")
    for (name, found), look in zip(models.items(), LOOKS, strict=False):
        arrives = found.median > 0
        distance = found.distance[arrives].tolist()
        low, median, high = (
            getattr(found, part)[arrives].tolist() for part in ("low", "median", "high")
        )
        axes.plot(distance, median, color=LIGHT[look], linewidth=1.6, marker=".", label=name)
        axes.fill_between(distance, low, high, color=LIGHT[look], alpha=0.18, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("hops from u to v")
    return with_legend(figure)
